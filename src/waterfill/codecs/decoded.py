"""Codecs that no kernel knows: their rows are decoded when they are loaded, and multiplied from levels of 12 bits.

    stored buffers --decode--> rows of W --rotate--> levels of 12 bits per weight, one scale per group --> kernels

As exact as the activations, which kernels round to 12 bits as well: with 1/2047 of a group's largest weight as its
step, the relative error is some 0.0005. It takes two bytes per weight, whatever the codec does, and every product of a
streamed matrix decodes it in Python; so whoever does it says so once. A codec whose weights are whole numbers times
scales of the rotation's groups has a better way, and defines `memory` and `to_memory` itself.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from waterfill.base.lazy import torch
from waterfill.codecs.contract import BLOCK_WEIGHTS, Codec, Encoded, Shape
from waterfill.codecs.groups import per_weight
from waterfill.codecs.hadamard import groups, rotate
from waterfill.codecs.levels import Levels

MOST_LEVEL = 2047  # of 12 bits with a sign: sums of products of two stay within 32 bits
LEVELS = Levels(16)

_log = logging.getLogger("waterfill.kernels")


class DecodedCodec(Codec):
    """Base of codecs with a fixed number of bytes per row that say no more than how rows are encoded and decoded."""

    @property
    def memory(self) -> Levels:
        return LEVELS

    def to_memory(self, buffers: Mapping[str, torch.Tensor], shape: Shape, exponent: int) -> Mapping[str, torch.Tensor]:
        _say(self.name)
        step, parts = max(1, BLOCK_WEIGHTS // shape[1]), []
        for start in range(0, shape[0], step):
            rows = slice(start, min(start + step, shape[0]))
            some = (rows.stop - start, shape[1])
            encoded = Encoded(some, self._rows(buffers, shape, rows), exponent, noise_power=0.0, power=0.0)
            parts.append(rounded(rotate(self.decode(encoded)) * 2.0**-exponent))
        layout = LEVELS.layout(shape)
        scales, codes = (torch.cat([part[i] for part in parts]) for i in range(2))
        return {"scales": scales, "codes": codes.view(layout["codes"].shape)}

    def _rows(self, buffers: Mapping[str, torch.Tensor], shape: Shape, rows: slice) -> Mapping[str, torch.Tensor]:
        """Buffers of consecutive rows, of those of a matrix."""
        found = {}
        for key, part in self.layout(shape).items():
            flat = buffers[key].contiguous().reshape(-1).view(torch.uint8)
            some = flat[rows.start * part.row_bytes : rows.stop * part.row_bytes].view(buffers[key].dtype)
            found[key] = some.reshape(-1, *part.shape[1:])
        return found


def rounded(rotated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 rows in the rotated basis, `[rows, width]` -> scales F16 `[rows, groups]`, codes U8 `[rows * 2 * width]`,
    of `LEVELS`."""
    width = rotated.shape[1]
    largest = torch.stack([rotated[:, g.start : g.stop].abs().amax(1) for g in groups(width)], dim=1)
    # Never below largest / MOST_LEVEL, however fp16 rounds it: by 2^-11 of itself, or by 2^-25 where it is subnormal.
    scales = (largest / MOST_LEVEL * (1 + 2.0**-10) + 2.0**-25).to(torch.float16)
    steps = per_weight(scales.to(torch.float32), width)
    levels = torch.where(steps > 0, rotated / steps, 0).round()
    codes = (levels.numpy() + LEVELS.n // 2).astype("<u2").view(np.uint8)
    return scales, torch.from_numpy(codes).reshape(-1)


@lru_cache(maxsize=1024)
def _say(codec: str) -> None:
    _log.info(
        "%s: no kernel reads its codes; they are decoded as they are loaded, to two bytes per weight "
        "(and again for every product where the model is streamed, slowly)",
        codec,
    )
