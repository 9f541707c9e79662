"""Levels as they are: what an entropy-coded matrix is decoded into, and multiplied from; and a codec of eight bits.

    W' = level * scale(row, group) * 2^exponent,   levels are bytes plus 128, or 16-bit numbers plus 32768

`levels-8` rounds to the nearest level of a group's scale in the rotated basis: near the original, and multiplied
without a table on every machine. `levels-16` is a form in memory, which nothing is packed with.
"""

from __future__ import annotations

import math
from functools import cached_property
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from waterfill.base.errors import WaterfillError
from waterfill.base.lazy import torch
from waterfill.codecs.contract import Encoded, Shape
from waterfill.codecs.feedback import Feedback
from waterfill.codecs.table import TableCodec

REACH = 4.0  # standard deviations that the largest level of eight bits stands for: where least is lost
MOST_LEVEL = 127


class Levels(TableCodec):
    """Codec `levels-8` or `levels-16`."""

    p = 1

    def __init__(self, bits: int) -> None:
        self.bits = self.precision = bits
        self.n = 1 << bits
        self.name = f"levels-{bits}"
        self.for_files = bits == 8

    @cached_property
    def array(self) -> npt.NDArray[np.float32]:
        """The level of every code, `[n, 1]`."""
        return (np.arange(self.n, dtype=np.float32) - self.n // 2)[:, None]

    def distortion(self, shape: Shape) -> float:
        """Of a uniform quantiser: a twelfth of the squared step, and what lies beyond the largest level."""
        self._check_for_files()
        tail, density = NormalDist().cdf(-REACH), math.exp(-REACH * REACH / 2) / math.sqrt(2 * math.pi)
        beyond = 2 * ((1 + REACH * REACH) * tail - REACH * density)  # E (|x| - reach)^2 there
        return (REACH / MOST_LEVEL) ** 2 / 12 + beyond

    def encode(
        self, weight: torch.Tensor, *, exponent: int = 0, rho: float = 1.0, feedback: Feedback | None = None
    ) -> Encoded:
        self._check_for_files()
        return super().encode(weight, exponent=exponent, rho=rho, feedback=feedback)

    def nearest(self, unit: torch.Tensor) -> torch.Tensor:
        levels = (unit * (MOST_LEVEL / REACH)).round_().clamp_(-MOST_LEVEL, MOST_LEVEL)
        return levels.to(torch.int64) + self.n // 2

    def _check_for_files(self) -> None:
        if not self.for_files:
            raise WaterfillError(f"{self.name} is a form in memory: nothing can be packed with it")


def levels(name: str) -> Levels:
    """Codec from its name."""
    if name not in ("levels-8", "levels-16"):
        raise WaterfillError(f"codec {name!r} is neither levels-8 nor levels-16")
    return Levels(int(name.removeprefix("levels-")))
