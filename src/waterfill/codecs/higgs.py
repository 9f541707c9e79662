"""HIGGS, fixed rate: rotate, scale, nearest point of an MSE-optimal Gaussian grid (arXiv 2411.17525, Algorithm 1).

    weight [rows, in] --rotate--> --/ scale per (row, group)--> vectors of p --> index of the nearest of n points
    stored: scales F16 [rows, groups], codes U8 [rows * row_bytes]

The scale that is stored is not the one used for finding codes. Codes are found at the group's RMS, where the grid is
optimal; the stored scale then carries the gain (`waterfill.planning.loss`), computed exactly for each group.

fp16 scales are kept in their best range by one power of two per tensor, `exponent`: |weight| <= 2^(exponent + 12).
"""

from __future__ import annotations

import math
import re
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from waterfill.base.errors import WaterfillError
from waterfill.base.lazy import torch
from waterfill.codecs.contract import Encoded, Shape
from waterfill.codecs.grids import grid
from waterfill.codecs.groups import group_sizes, group_sums, per_weight
from waterfill.codecs.hadamard import groups, rotate
from waterfill.codecs.indices import pack
from waterfill.codecs.nearest import IntervalSearch, NearestSearch
from waterfill.codecs.table import TableCodec

HEADROOM_BITS = 12  # a group's RMS stays under 2^12, which leaves fp16 (65504) room for any sensible gain
MIN_MAGNITUDE_BITS = -100  # below 2^-100 weights may as well be zero, and 2^-exponent has to be a float32
MAX_SCALE = 65504.0  # of fp16
BYTE_T2 = 0.005  # relative error of a grid above which points in bytes are exact enough: theirs is 0.0001
MIN_COSINE = 1e-2  # squared cosine under which a group's codes say nothing about it (all zeros): stored as zero


def scale_exponent(largest: float) -> int:
    """The power of two by which scales are divided, from the tensor's largest magnitude."""
    return max(math.frexp(largest)[1], MIN_MAGNITUDE_BITS) - HEADROOM_BITS if largest > 0 else 0


class Higgs(TableCodec):
    """Codec `higgs-p{p}-n{n}`: vectors of `p` weights, grid of `n` points."""

    def __init__(self, p: int, n: int) -> None:
        self.p, self.n = p, n
        self.name = f"higgs-p{p}-n{n}"
        self.grid = grid(p, n)
        self.precision = 8 if self.grid.t2 > BYTE_T2 and (p > 1 or n <= 16) else 16

    @property
    def array(self) -> npt.NDArray[np.float32]:
        return self.grid.array

    def distortion(self, shape: Shape) -> float:
        return self.grid.t2

    def feedback(self, width: int) -> bool:
        return all(group.stop % self.p == 0 for group in groups(width)[:-1])  # no vector lies in two groups

    def encode(self, weight: torch.Tensor, *, exponent: int = 0, rho: float = 1.0) -> Encoded:
        rows, width = weight.shape
        rotated = rotate(weight.to(torch.float32) * 2.0**-exponent)
        norms = group_sums(rotated.square())  # [rows, groups]
        rms = (norms / group_sizes(width, torch.float32)).sqrt()
        unit = rotated / per_weight(rms.clamp_min(torch.finfo(torch.float32).tiny), width)
        indices = self._nearest(unit)
        points = self.vectors(indices, width)
        scales = _scales(rotated, points, norms, rho)
        error = rotated - points * per_weight(scales.to(torch.float32), width)
        unit_power = 4.0**exponent
        return Encoded(
            shape=(rows, width),
            buffers={"scales": scales, "codes": pack(indices, self.n).flatten()},
            exponent=exponent,
            noise_power=float(error.double().square().sum()) * unit_power,
            power=float(norms.double().sum()) * unit_power,
        )

    def _nearest(self, unit: torch.Tensor) -> torch.Tensor:
        """Index of the grid point nearest to each p-vector of `unit` `[rows, width]` -> int64 `[rows, vectors]`."""
        if self.p == 1:
            return _intervals(self.n).search(unit)
        vectors = torch.nn.functional.pad(unit, (0, -unit.shape[1] % self.p)).view(-1, self.p)
        return _search(self.p, self.n).search(vectors).view(len(unit), -1)


@lru_cache(maxsize=64)  # of a megabyte at most
def _search(p: int, n: int) -> NearestSearch:
    return NearestSearch(grid(p, n).points)


@lru_cache(maxsize=64)
def _intervals(n: int) -> IntervalSearch:
    points = grid(1, n).array[:, 0]
    return IntervalSearch((points[1:] + points[:-1]) / np.float32(2))


def _scales(rotated: torch.Tensor, points: torch.Tensor, norms: torch.Tensor, rho: float) -> torch.Tensor:
    """Stored scale of each group, fp16 `[rows, groups]`: u |w|^2 / <w, q> with u = 1 / (1 + rho tau)."""
    inner = group_sums(rotated * points)
    cosine2 = inner.square() / (norms * group_sums(points.square())).clamp_min(torch.finfo(torch.float32).tiny)
    usable = cosine2 > MIN_COSINE
    tau = torch.where(usable, 1 / cosine2.clamp_min(MIN_COSINE) - 1, 0)
    exact = norms / torch.where(usable, inner, 1)
    return torch.where(usable, exact / (1 + rho * tau), 0).clamp_max(MAX_SCALE).to(torch.float16)


@lru_cache(maxsize=1024)
def higgs(name: str) -> Higgs:
    """Codec from its name, `higgs-p2-n16`."""
    match = re.fullmatch(r"higgs-p([1-9][0-9]*)-n([1-9][0-9]*)", name)
    if match is None:
        raise WaterfillError(f"codec {name!r} is not a HIGGS codec; expected a name like higgs-p2-n16")
    return Higgs(int(match[1]), int(match[2]))
