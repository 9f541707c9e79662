"""Levels as they are: what an entropy-coded matrix is decoded into, and multiplied from.

    W' = level * scale(row, group) * 2^exponent,   levels are bytes plus 128, or 16-bit numbers plus 32768

A codec of memory, not of files: nothing is packed with it.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import numpy.typing as npt

from waterfill.base.errors import WaterfillError
from waterfill.base.lazy import torch
from waterfill.codecs.contract import Encoded, Shape
from waterfill.codecs.table import TableCodec


class Levels(TableCodec):
    """Codec `levels-8` or `levels-16`."""

    p = 1
    for_files = False

    def __init__(self, bits: int) -> None:
        self.bits = self.precision = bits
        self.n = 1 << bits
        self.name = f"levels-{bits}"

    @cached_property
    def array(self) -> npt.NDArray[np.float32]:
        """The level of every code, `[n, 1]`."""
        return (np.arange(self.n, dtype=np.float32) - self.n // 2)[:, None]

    def distortion(self, shape: Shape) -> float:
        raise WaterfillError(f"{self.name} is a form in memory: nothing can be packed with it")

    def encode(self, weight: torch.Tensor, *, exponent: int = 0, rho: float = 1.0) -> Encoded:
        raise WaterfillError(f"{self.name} is a form in memory: nothing can be packed with it")


def levels(name: str) -> Levels:
    """Codec from its name."""
    if name not in ("levels-8", "levels-16"):
        raise WaterfillError(f"codec {name!r} is neither levels-8 nor levels-16")
    return Levels(int(name.removeprefix("levels-")))
