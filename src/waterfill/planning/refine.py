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
from functools import lru_cache

import numpy as np

from waterfill.codecs import MenuPoint, Rates, get_codec
from waterfill.files.artifact.format import is_packed
from waterfill.planning.menu import Menus
from waterfill.planning.slopes import GRID, Source, slopes_of

Shape = tuple[int, int]

BISECTIONS = 40


class _Points(dict[int, MenuPoint]):
    """Points of a matrix by steps of its rate, made when they are first asked for: like matrices share most."""

    def __init__(self, shape: Shape, kind: Rates) -> None:
        self._shape, self._kind = shape, kind

    def __missing__(self, steps: int) -> MenuPoint:
        self[steps] = point = self._kind.codec(steps * self._kind.step).menu_point(self._shape)
        return point


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
    slopes = slopes_of(menus, sources)
    steps = np.array([source.kind.step for source in sources])
    coded = _coded(menus, sources)

    def size(candidates: Sequence[MenuPoint]) -> int:
        return sum(candidates[i].size_bytes for i, _, _ in coded)

    def at(price: float) -> list[MenuPoint]:
        moved, rates = list(points), np.floor(slopes.rates(price) / steps).astype(np.int64).tolist()
        for i, number, known in coded:
            moved[i] = known[rates[number]]
        return moved

    limit = size(points) + (spare_bytes or 0)

    def good(candidates: Sequence[MenuPoint]) -> bool:
        return size(candidates) <= limit if max_kl is None else menus.loss(candidates) <= max_kl

    low, high = math.log(slopes.least), math.log(slopes.most)  # of the price: few bytes at a high one
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
    return tuple(refined if menus.loss(refined) <= menus.loss(points) else points)


def _sources(menus: Menus, points: Sequence[MenuPoint], ties: Sequence[Sequence[int]]) -> list[Source]:
    tied = {i for tie in ties for i in tie}
    groups = [tuple(tie) for tie in ties] + [(i,) for i in range(len(points)) if i not in tied]
    kinds = {name: _kind(menus, name) for name in {point.codec for point in points}}
    return [
        Source(group, kind, sum(math.prod(menus.matrices[i].shape) for i in group))
        for group in groups
        if (kind := kinds[points[group[0]].codec]) is not None
    ]


def _kind(menus: Menus, codec: str) -> Rates | None:
    """The rates that a matrix of that codec may take in its place."""
    rates = get_codec(codec).rates if is_packed(codec) else None
    return rates if rates is not None and rates in menus.any_rate and rates.step <= 1 / GRID else None


def _coded(menus: Menus, sources: Sequence[Source]) -> list[tuple[int, int, _Points]]:
    """Every matrix of the sources: its index, its source's, and the points of its shape and kind."""
    known = lru_cache(maxsize=None)(_Points)
    return [
        (i, number, known(menus.matrices[i].shape, source.kind))
        for number, source in enumerate(sources)
        for i in source.members
    ]


def _spend(menus: Menus, sources: Sequence[Source], points: list[MenuPoint], spare_bytes: int) -> None:
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
