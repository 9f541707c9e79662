"""HIGGS, fixed rate: rotate, scale, nearest point of an MSE-optimal Gaussian grid (arXiv 2411.17525, Algorithm 1).

weight [rows, in] --rotate--> --/ scale per (row, group)--> vectors of p --> index of the nearest of n points
stored: scales F16 [rows, groups], codes U8 [rows * row_bytes]
"""

from __future__ import annotations

import re
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from waterfill.base.errors import WaterfillError
from waterfill.base.lazy import torch
from waterfill.codecs.contract import Shape
from waterfill.codecs.feedback import Blocks, runs
from waterfill.codecs.grids import grid
from waterfill.codecs.nearest import IntervalSearch, NearestSearch
from waterfill.codecs.table import TableCodec

FEEDBACK_COLUMNS = 16  # of a block; fewer would take longer and gain little
BYTE_T2 = 0.005  # relative error of a grid above which points in bytes are exact enough: theirs is 0.0001


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

    def feedback(self, width: int) -> Blocks:
        return runs(width, FEEDBACK_COLUMNS * self.p if FEEDBACK_COLUMNS % self.p else FEEDBACK_COLUMNS)

    def nearest(self, unit: torch.Tensor) -> torch.Tensor:
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


@lru_cache(maxsize=1024)
def higgs(name: str) -> Higgs:
    """Codec from its name, `higgs-p2-n16`."""
    match = re.fullmatch(r"higgs-p([1-9][0-9]*)-n([1-9][0-9]*)", name)
    if match is None:
        raise WaterfillError(f"codec {name!r} is not a HIGGS codec; expected a name like higgs-p2-n16")
    return Higgs(int(match[1]), int(match[2]))
