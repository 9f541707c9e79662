"""How fast this machine multiplies, by some milliseconds of it: in which dtype to measure, and how long it will take.

A token of a pass costs, in operations per weight: 2 forward, 2 for its gradient, and half of one for a quarter of the
weights'; half as much again for the rest. One of a trial costs 2 with noise and 2 without. One of own text costs 2, in
products with few rows, at about half the speed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from waterfill.base import process
from waterfill.planning.inventory import PlannedMatrix

SMALL_WEIGHTS = 1 << 25  # of a model that is measured in float32 whatever the machine is fast in
FASTER = 1.5  # times as fast as float32 bfloat16 has to be, which rounds gradients to 1/256
PER_TOKEN, PER_TRIED_TOKEN, PER_OWN_TOKEN = 7, 4, 4  # operations per weight
PER_PASS = 1000  # of all that is no product: reading and converting weights, sums over their groups
_ROWS, _WIDTH, _TRIALS = 512, 1024, 4


@cache
def speed(dtype: torch.dtype) -> float:
    """Operations per second of products like those of a pass: the best of some."""
    x, weight = torch.ones(_ROWS, _WIDTH, dtype=dtype), torch.ones(_WIDTH, _WIDTH, dtype=dtype)
    best = math.inf
    for _ in range(_TRIALS):
        start_s = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        best = min(best, time.perf_counter() - start_s)
    return 2 * _ROWS * _WIDTH * _WIDTH / best


def fast_dtype(matrices: Sequence[PlannedMatrix]) -> torch.dtype:
    """bfloat16 for large models that are stored in it, on machines that are fast in it; else float32."""
    stored = {matrix.dtype for matrix in matrices}
    if stored != {"BF16"} or _weights(matrices) < SMALL_WEIGHTS:
        return torch.float32
    return torch.bfloat16 if speed(torch.bfloat16) >= FASTER * speed(torch.float32) else torch.float32


@dataclass(frozen=True)
class Forecast:
    """What measuring some sequences will take."""

    tokens: int
    seconds: float
    peak_bytes: int  # of the process, by the largest of what is in memory at once


def forecast(
    matrices: Sequence[PlannedMatrix],
    *,
    passes: int,
    sequences: int,
    sampled: int,
    tried: int = 0,
    length: int,
    vocabulary: int,
    layers: int,
    dtype: torch.dtype,
) -> Forecast:
    """Of so many passes over so many sequences; some have to be `sampled` first, and a plan is then `tried` on some."""
    weights, tokens = _weights(matrices), sequences * length
    seconds = PER_TOKEN * weights * tokens / speed(dtype) + PER_PASS * weights * passes / speed(torch.float32)
    seconds += sampling_s(matrices, sampled * length)
    seconds += PER_TRIED_TOKEN * weights * tried * length / speed(dtype)
    width = max(min(matrix.shape) for matrix in matrices)
    block = weights // max(1, layers)
    logits = 3 * 4 * length * vocabulary
    peak = process.resident_bytes() + 3 * dtype.itemsize * block + logits + layers * length * width * dtype.itemsize
    return Forecast(tokens, seconds, peak)


def sampling_s(matrices: Sequence[PlannedMatrix], tokens: int) -> float:
    """Seconds that so many tokens of own text take."""
    return PER_OWN_TOKEN * _weights(matrices) * tokens / speed(torch.float32)


def _weights(matrices: Sequence[PlannedMatrix]) -> int:
    return sum(math.prod(matrix.shape) for matrix in matrices)
