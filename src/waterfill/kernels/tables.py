"""Grids as integers: what the kernels look up and multiply.

A grid point becomes a whole number of steps, in 8 bits where that adds little to the grid's own error, else in 12 (the
activations go along). The step is the one that rounds the points best: four levels fit 127 steps almost exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from waterfill.codecs import Higgs, Levels, TableCodec

LIMITS = {8: 127, 16: 2047}  # largest table entry and activation
EXACT_WORDS = 512  # products of 2047 x 2047 that surely fit a 32-bit sum
BYTE_T2 = 0.005  # relative error of a grid above which bytes are exact enough: theirs is 0.0001
STEPS_TRIED = 512


@dataclass(frozen=True, eq=False)
class IntegerGrid:
    """points ~ units * step."""

    units: torch.Tensor  # int16 [n, p]
    step: float
    precision: int  # 8 or 16 bits, of table entries and activations


@lru_cache(maxsize=4096)
def integer_grid(codec: TableCodec) -> IntegerGrid:
    """The integer form of a codec's points."""
    if isinstance(codec, Levels):
        return IntegerGrid(codec.points.to(torch.int16), 1.0, codec.bits)
    assert isinstance(codec, Higgs)
    bytes_suffice = codec.grid.t2 > BYTE_T2 and (codec.p > 1 or codec.n <= 16)
    precision = 8 if bytes_suffice else 16
    points = codec.grid.points.to(torch.float64)
    least_step = float(points.abs().amax()) / LIMITS[precision]
    steps = least_step * torch.linspace(1, 1.25, STEPS_TRIED, dtype=torch.float64)
    if points.numel() > 1024:  # many points round equally well with any step
        steps = steps[:1]
    rounded = (points / steps[:, None, None]).round()
    errors = (rounded * steps[:, None, None] - points).square().sum((1, 2))
    best = int(errors.argmin())
    return IntegerGrid(rounded[best].to(torch.int16), float(steps[best]), precision)


def register_table(codec: TableCodec, isa: str = "") -> bool:
    """Whether the table fits vector registers, of every instruction set or of `isa` in particular."""
    if isinstance(codec, Levels):
        return True
    if integer_grid(codec).precision == 16:
        return codec.p == 1 and codec.n <= 256
    return codec.n <= 256 and (codec.p <= 2 or (isa == "avx512vbmi" and codec.p == 4))
