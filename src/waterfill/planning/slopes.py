"""What one more byte saves, by rate: slopes of the losses of matrices whose rates may be any, for all of them at once.

    Source ──points of a grid of rates──► sizes, losses ──lower convex hull──► slopes, falling ──► the rates at a price

A hundred thousand matrices have few shapes: what depends on the shape alone is made once, and the rest goes through
arrays `[sources, rates]`, thousands of sources at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from waterfill.codecs import MenuPoint, Rates
from waterfill.planning.loss import Floats
from waterfill.planning.menu import Menus

Ints = npt.NDArray[np.intp]

GRID = 16  # points per bit on which slopes are taken
CHUNK = 1 << 12  # sources at a time: some tens of megabytes


@dataclass(frozen=True)
class Source:
    """Matrices that share a rate: usually one."""

    members: tuple[int, ...]
    kind: Rates
    weights: int


@dataclass(frozen=True, eq=False)
class Slopes:
    """Loss saved per byte between neighbouring vertices of each source's hull."""

    falling: Floats  # [sources, vertices - 1], -ln of the slopes, which ascends; infinite past the last
    vertices: npt.NDArray[np.int32]  # [sources, vertices], rates in units of 1 / GRID
    least: float  # of all slopes, nats per token and byte
    most: float

    def rates(self, price: float) -> Floats:
        """The rate of every source at which one more byte saves so much, float64 `[sources]`: what `np.interp` gives,
        to the bit."""
        x, rows = -math.log(price), np.arange(len(self.falling))
        last = np.isfinite(self.falling).sum(1) - 1
        at = (self.falling <= x).sum(1) - 1
        low = np.clip(at, 0, last)
        rate = self._middle(rows, low)
        inside = np.flatnonzero((at >= 0) & (at < last))
        low, high = low[inside], low[inside] + 1
        run = self.falling[inside, high] - self.falling[inside, low]
        rise = self._middle(inside, high) - rate[inside]
        rate[inside] += rise / run * (x - self.falling[inside, low])
        return rate

    def _middle(self, rows: Ints, at: Ints) -> Floats:
        """The rate halfway between a vertex and the next, where the slope between them is taken to be."""
        middle: Floats = (self.vertices[rows, at] / GRID + self.vertices[rows, at + 1] / GRID) / 2
        return middle


def slopes_of(menus: Menus, sources: Sequence[Source]) -> Slopes:
    """The slopes of all sources, of which there is one at least."""
    kinds = {source.kind for source in sources}
    most = max(len(_grid(kind)) for kind in kinds)
    slopes, vertices = np.zeros((len(sources), most)), np.zeros((len(sources), most + 1), np.int32)
    for kind in kinds:
        alike = np.array([number for number, source in enumerate(sources) if source.kind == kind])
        for some in np.array_split(alike, -(-len(alike) // CHUNK)):
            sizes, losses = _on_grid(menus, [sources[number] for number in some], kind)
            hull, last = _hulls(sizes, losses)
            vertices[some, : hull.shape[1]] = _grid(kind)[0] + hull
            slopes[some, : hull.shape[1] - 1] = _between(sizes, losses, hull, last)
    least, greatest = slopes.min(initial=math.inf, where=slopes > 0), slopes.max()
    with np.errstate(divide="ignore"):  # past the last
        return Slopes(-np.log(slopes), vertices, float(least), float(greatest))


@lru_cache(maxsize=64)
def _grid(kind: Rates) -> range:
    """Rates in units of 1 / GRID."""
    return range(math.ceil(kind.least * GRID), int(kind.most * GRID) + 1)


@lru_cache(maxsize=1 << 10)
def _points(shape: tuple[int, int], kind: Rates) -> tuple[MenuPoint, ...]:
    return tuple(kind.codec(rate / GRID).menu_point(shape) for rate in _grid(kind))


def _on_grid(menus: Menus, sources: Sequence[Source], kind: Rates) -> tuple[Floats, Floats]:
    """Bytes and losses of sources of one kind on its grid of rates, float64 `[sources, rates]` each."""
    members = [i for source in sources for i in source.members]
    sizes, losses = np.empty((2, len(members), len(_grid(kind))))
    by_shape: dict[tuple[int, int], list[int]] = {}
    for row, i in enumerate(members):
        by_shape.setdefault(menus.matrices[i].shape, []).append(row)
    for shape, rows in by_shape.items():
        points = _points(shape, kind)
        sizes[rows] = [point.size_bytes for point in points]
        losses[rows] = menus.losses([members[row] for row in rows], points)
    if len(members) == len(sources):
        return sizes, losses
    ends = np.cumsum([len(source.members) for source in sources])[:-1]
    summed = (np.stack([rows.sum(0) for rows in np.split(values, ends)]) for values in (sizes, losses))
    return next(summed), next(summed)


def _hulls(sizes: Floats, losses: Floats) -> tuple[Ints, Ints]:
    """Lower convex hulls over rising sizes, of all rows at once, point after point (Andrew's monotone chain): vertices
    `[sources, rates + 1]`, and the index of the last of each row. Points no larger than the least size are left out."""
    sources, rates = sizes.shape
    hull, last = np.zeros((sources, rates + 1), np.intp), np.zeros(sources, np.intp)
    for k in range(1, rates):
        taken = np.flatnonzero(sizes[:, k] > sizes[np.arange(sources), hull[np.arange(sources), last]])
        some = taken[last[taken] > 0]
        while len(some):
            a, b = hull[some, last[some] - 1], hull[some, last[some]]
            some = some[_slope(sizes, losses, some, a, b) <= _slope(sizes, losses, some, b, k)]
            last[some] -= 1
            some = some[last[some] > 0]
        last[taken] += 1
        hull[taken, last[taken]] = k
    return hull, last


def _slope(sizes: Floats, losses: Floats, rows: Ints, a: Ints, b: Ints | int) -> Floats:
    slope: Floats = (losses[rows, a] - losses[rows, b]) / (sizes[rows, b] - sizes[rows, a])
    return slope


def _between(sizes: Floats, losses: Floats, hull: Ints, last: Ints) -> Floats:
    """Slopes between vertices, above zero, and zero past the last; of a lone vertex one next to nothing."""
    rows, number = np.arange(len(hull))[:, None], np.arange(hull.shape[1] - 1)
    with np.errstate(invalid="ignore", divide="ignore"):  # past the last
        slopes = _slope(sizes, losses, rows, hull[:, :-1], hull[:, 1:])
    slopes[number >= last[:, None]] = 0.0
    floor = np.maximum(slopes.max(1, keepdims=True), 1e-30) * 1e-15
    return np.where(number < np.maximum(last[:, None], 1), np.maximum(slopes, floor), 0.0)
