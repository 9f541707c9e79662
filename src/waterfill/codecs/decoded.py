"""The form in memory of codecs that no kernel knows: levels of 12 bits, which their rows are decoded into.

    stored buffers --decode--> rows of W --rotate--> levels of 12 bits per weight, one scale per group --> kernels

As exact as the activations, which kernels round to 12 bits as well: with 1/2047 of a group's largest weight as its
step, the relative error is some 0.0005. It takes two bytes per weight, whatever the codec does, and every product of a
streamed matrix decodes it in Python; so it is said once. A codec whose weights are whole numbers times scales of the
rotation's groups has a better way, and defines `memory` and `to_memory` itself.
"""

from __future__ import annotations

import logging
from functools import lru_cache

import numpy as np

from waterfill.base.lazy import torch
from waterfill.codecs.groups import per_weight
from waterfill.codecs.hadamard import groups

FORM = "levels-16"
MOST_LEVELS = {16: 2047, 8: 127}  # of 12 bits with a sign: sums of products of two stay within 32 bits

_log = logging.getLogger("waterfill.kernels")


def rounded(rotated: torch.Tensor, bits: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 rows in the rotated basis, `[rows, width]` -> scales F16 `[rows, groups]`, codes U8 of `levels-16`, or of
    `levels-8`; a group's largest weight is the largest level."""
    width, most = rotated.shape[1], MOST_LEVELS[bits]
    largest = torch.stack([rotated[:, g.start : g.stop].abs().amax(1) for g in groups(width)], dim=1)
    # Never below largest / most, however fp16 rounds it: by 2^-11 of itself, or by 2^-25 where it is subnormal.
    scales = (largest / most * (1 + 2.0**-10) + 2.0**-25).to(torch.float16)
    steps = per_weight(scales.to(torch.float32), width)
    levels = torch.where(steps > 0, rotated / steps, 0).round()
    codes = (levels.numpy() + (1 << (bits - 1))).astype("<u2" if bits == 16 else np.uint8).view(np.uint8)
    return scales, torch.from_numpy(codes).reshape(-1)


@lru_cache(maxsize=1024)
def say_once(codec: str) -> None:
    """Say of a codec that its matrices are multiplied in this form."""
    _log.info(
        "%s: no kernel reads its codes; they are decoded as they are loaded, to two bytes per weight "
        "(and again for every product where the model is streamed, slowly)",
        codec,
    )
