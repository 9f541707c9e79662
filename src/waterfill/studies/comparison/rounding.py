"""Rounding to the nearest of evenly spaced levels in groups: the baseline of every comparison, and no library's own."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from waterfill.files.artifact import Buffer
from waterfill.studies.comparison.base import Method
from waterfill.studies.comparison.stored import QuantisedMatrix, quantised, run_quantiser

GROUP = 64
Zero = Literal["none", "integer", "minimum"]
BITS = (2, 3, 4, 5, 6, 8)


def round_to_nearest(weight: Tensor, bits: int, zero: Zero) -> QuantisedMatrix:
    """Uniform levels per group of 64. Scales and integer zero points as in GPTQ's and AWQ's baselines, a minimum as in
    GGUF's Q4_1; scales and minima in fp16, indices and zero points in their bits."""
    groups = weight.reshape(-1, GROUP) if weight.shape[1] % GROUP == 0 else weight
    top = 2**bits - 1
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    if zero == "none":
        high = torch.maximum(high, -low)
        low = -high
    elif zero == "integer":  # an integer can stand for zero only if zero lies within
        low, high = low.clamp(max=0), high.clamp(min=0)
    scale = half((high - low) / top).clamp_min(torch.finfo(torch.float16).tiny)
    if zero == "minimum":
        low = half(low)
        rounded = ((groups - low) / scale).round().clamp(0, top) * scale + low
    else:
        offset = torch.full_like(low, (top + 1) // 2) if zero == "none" else (-low / scale).round().clamp(0, top)
        rounded = ((groups / scale + offset).round().clamp(0, top) - offset) * scale
    buffers = {"codes": _bytes("codes", bits * weight.numel()), "scales": Buffer("scales", "F16", (len(groups),))}
    if zero == "integer":
        buffers["zeros"] = _bytes("zeros", bits * len(groups))
    elif zero == "minimum":
        buffers["zeros"] = Buffer("zeros", "F16", (len(groups),))
    return quantised(rounded.view_as(weight), buffers)


def half(values: Tensor) -> Tensor:
    """As fp16 holds them."""
    return values.half().float()


def _bytes(key: str, bits: int) -> Buffer:
    return Buffer(key, "U8", (-(-bits // 8),))


METHODS = tuple(
    Method(
        name=f"rtn-{bits}",
        title=f"round to nearest, {bits} bits",
        family="round to nearest",
        run=partial(run_quantiser, partial(round_to_nearest, bits=bits, zero="integer")),
        options=f"group {GROUP}, integer zero",
    )
    for bits in BITS
)
