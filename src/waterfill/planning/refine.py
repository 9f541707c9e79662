"""Reverse water-filling: the best rates of entropy-coded matrices are real numbers, not entries of a menu.

The allocation on the menu decides which matrices are coded so; here their rates are moved to where every one of them
gains the same loss from one more byte. At high rates, where a bit quarters t2 = c 2^-2R, that has the familiar form

    R_i = 1/2 log2( 2 ln 2 alpha_i c / (theta N_i) ),    theta: nats per bit, N_i: weights

and at low rates, where neither the gain nor the curve of the code is that simple, slopes are taken from the same loss
and curves as the menu's, on its lower convex hull.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from waterfill.codecs import MenuPoint, Rates, get_codec
from waterfill.files.artifact.format import is_packed
from waterfill.planning.loss import gain_rho, predicted_kl
from waterfill.planning.menu import Menus

Floats = npt.NDArray[np.float64]

GRID = 16  # points per bit on which slopes are taken
BISECTIONS = 40


@dataclass(frozen=True)
class _Source:
    """Matrices that share a rate: usually one."""

    members: tuple[int, ...]
    kind: Rates
    weights: int
    slopes: Floats  # loss saved per byte, falling
    rates: Floats  # where it is so much

    def rate(self, price: float) -> float:
        """The rate at which one more byte saves so much."""
        return float(np.interp(-math.log(price), -np.log(self.slopes), self.rates))


def refine(
    menus: Menus,
    chosen: Sequence[int],
    ties: Sequence[Sequence[int]],
    *,
    spare_bytes: int | None = None,
    max_kl: float | None = None,
) -> tuple[MenuPoint, ...]:
    """The points of an allocation with the rates of its matrices made equal in slope, where they may have any.

    Args:
        chosen: of the allocation, one index per matrix.
        ties: matrices that share one codec.
        spare_bytes: what they may grow by in all; or
        max_kl: the loss of the whole model that has to be kept to, with the fewest bytes.
    """
    points = [menus.points[i][choice] for i, choice in enumerate(chosen)]
    sources = _sources(menus, points, ties)
    if not sources:
        return tuple(points)
    coded = [i for source in sources for i in source.members]

    def cost(candidates: Sequence[MenuPoint]) -> float:
        return math.fsum(_loss(menus, i, candidates[i]) for i in range(len(points)))

    def size(candidates: Sequence[MenuPoint]) -> int:
        return sum(candidates[i].size_bytes for i in coded)

    def at(price: float) -> list[MenuPoint]:
        moved = list(points)
        for source in sources:
            step = source.kind.step
            rate = math.floor(source.rate(price) / step) * step
            for i in source.members:
                moved[i] = _point(menus, i, source.kind, rate)
        return moved

    limit = size(points) + (spare_bytes or 0)

    def good(candidates: Sequence[MenuPoint]) -> bool:
        return size(candidates) <= limit if max_kl is None else cost(candidates) <= max_kl

    slopes = np.concatenate([source.slopes for source in sources])
    low, high = math.log(slopes.min()), math.log(slopes.max())  # of the price: few bytes at a high one
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if good(at(math.exp(middle))) == (max_kl is None):
            high = middle
        else:
            low = middle
    refined = at(math.exp(high if max_kl is None else low))
    if not good(refined):
        return tuple(points)
    if max_kl is not None:
        return tuple(refined if size(refined) < size(points) else points)
    _spend(menus, sources, refined, limit - size(refined))
    return tuple(refined if cost(refined) <= cost(points) else points)


def _sources(menus: Menus, points: Sequence[MenuPoint], ties: Sequence[Sequence[int]]) -> list[_Source]:
    tied = {i for tie in ties for i in tie}
    groups = [tuple(tie) for tie in ties] + [(i,) for i in range(len(points)) if i not in tied]
    sources = []
    for group in groups:
        name = points[group[0]].codec
        rates = get_codec(name).rates if is_packed(name) else None
        if rates is not None and rates in menus.any_rate and rates.step <= 1 / GRID:
            sources.append(_source(menus, group, rates))
    return sources


def _source(menus: Menus, members: tuple[int, ...], kind: Rates) -> _Source:
    rates = np.arange(math.ceil(kind.least * GRID), int(kind.most * GRID) + 1) / GRID
    points = [[_point(menus, i, kind, float(rate)) for rate in rates] for i in members]
    sizes = np.array([[point.size_bytes for point in row] for row in points], np.float64).sum(0)
    losses = np.array([[_loss(menus, i, p) for p in row] for i, row in zip(members, points, strict=True)]).sum(0)
    hull: list[int] = []
    for k in range(len(rates)):
        if hull and sizes[k] <= sizes[hull[-1]]:
            continue  # no smaller than the least size
        while len(hull) > 1 and _slope(sizes, losses, hull[-2], hull[-1]) <= _slope(sizes, losses, hull[-1], k):
            hull.pop()
        hull.append(k)
    between = list(pairwise(hull))
    slopes = np.array([_slope(sizes, losses, a, b) for a, b in between] or [0.0])
    middles = np.array([(rates[a] + rates[b]) / 2 for a, b in between] or [rates[0]])
    floor = max(float(slopes.max()), 1e-30) * 1e-15
    return _Source(
        members, kind, sum(math.prod(menus.matrices[i].shape) for i in members), np.maximum(slopes, floor), middles
    )


def _slope(sizes: Floats, losses: Floats, a: int, b: int) -> float:
    return float((losses[a] - losses[b]) / (sizes[b] - sizes[a]))


def _spend(menus: Menus, sources: Sequence[_Source], points: list[MenuPoint], spare_bytes: int) -> None:
    """Give what rounding left over to the largest sources that can use it, a step of the rate at a time."""
    for source in sorted(sources, key=lambda source: -source.weights):
        while True:
            rate = get_codec(points[source.members[0]].codec).rate + source.kind.step
            larger = {i: _point(menus, i, source.kind, rate) for i in source.members}
            growth = sum(point.size_bytes - points[i].size_bytes for i, point in larger.items())
            if growth > spare_bytes or rate > source.kind.most or growth == 0:
                break
            spare_bytes -= growth
            for i, point in larger.items():
                points[i] = point


def _point(menus: Menus, i: int, kind: Rates, rate: float) -> MenuPoint:
    return _point_of(menus.matrices[i].shape, kind, rate)


@lru_cache(maxsize=1 << 16)  # matrices of a model have few shapes
def _point_of(shape: tuple[int, int], kind: Rates, rate: float) -> MenuPoint:
    return kind.codec(rate).menu_point(shape)


def _loss(menus: Menus, i: int, point: MenuPoint) -> float:
    c = menus.coefficients[i]
    return predicted_kl(c, point.t2, gain_rho(menus.gain, c), point.along)
