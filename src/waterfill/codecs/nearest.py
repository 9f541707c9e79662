"""Exact nearest grid point of many vectors, without comparing every vector with every point.

    points [n, p] ──► boxes, and for each the points that are nearest to some place in it
    vectors [N, p] ──► the box of each ──sort──► box by box, distances to its few points alone ──► indices [N]

A point c is left out of a box where some rival r is nearer everywhere. |x - c|² - |x - r|² is linear in x, so in a box
of centre m and half-widths h it is at least |m - c|² - |m - r|² - 2 Σ h_a |c_a - r_a|: where that is positive, c cannot
be nearest. Of 4096 points in four dimensions 60 remain, on average.

Distances are float64: what is nearest then does not depend on how a machine's BLAS adds, short of exact ties. They are
numpy's because torch's argmax takes ten times as long.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from waterfill.base.lazy import torch

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

BOXES = 4096  # more would cost more to prepare than they save on a matrix of a few million weights
RIVALS = 16  # points around a box's centre that try to rule out all others
REACH = 4.0  # boxes cover |x_a| < REACH; what little lies outside is compared with every point
STEPS = 128  # box edges are multiples of 1 / STEPS, so that a table finds a coordinate's interval
SLACK = 1e-9  # a point stays listed if rounding could be all that rules it out
SCRATCH = 1 << 17  # distances alive at a time: 1 MiB, about a core's cache


class NearestSearch:
    """Finds the nearest of `points`, float `[n, p]`; the first of them on a tie."""

    def __init__(self, points: torch.Tensor) -> None:
        c = points.numpy().astype(np.float64)
        n, p = c.shape
        edges = _edges(c, bins=round(BOXES ** (1 / p)))
        lists = [*_candidates(c, edges), np.arange(n)]  # the last one is for everything outside
        self._intervals = _interval_table(edges)
        self._lists = np.concatenate(lists).astype(np.int32)
        self._ends = np.cumsum([len(some) for some in lists]).tolist()
        # nearest = argmax <x, c> - |c|^2 / 2 = argmax <(x, 1), (c, -|c|^2 / 2)>
        self._table = np.column_stack([c, -np.square(c).sum(axis=1) / 2])

    def search(self, vectors: torch.Tensor) -> torch.Tensor:
        """float32 `[N, p]` -> index of the nearest point, int64 `[N]`."""
        x = vectors.numpy()
        boxes = self._box_of(x)
        order = np.argsort(boxes, kind="stable")  # a radix sort, as these are 16-bit numbers
        counts = np.bincount(boxes, minlength=len(self._ends)).tolist()
        sorted_x = np.ones((len(x), x.shape[1] + 1))
        sorted_x[:, :-1] = np.take(x, order, axis=0)
        sorted_indices = np.empty(len(x), dtype=np.int64)
        at = first = 0
        for count, end in zip(counts, self._ends, strict=True):
            if count:
                some = self._lists[first:end]
                sorted_indices[at : at + count] = some[_argmax_product(sorted_x[at : at + count], self._table[some])]
                at += count
            first = end
        indices = np.empty_like(sorted_indices)
        indices[order] = sorted_indices
        return torch.from_numpy(indices)

    def _box_of(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
        half = int(REACH * STEPS)
        steps = np.clip(np.floor(x * np.float32(STEPS)), -half - 1, half).astype(np.int32) + (half + 1)
        box = np.zeros(len(x), dtype=np.int64)
        for axis, table in enumerate(self._intervals):
            box += table[steps[:, axis]]
        outside = len(self._ends) - 1
        return np.minimum(box, outside).astype(np.uint16)


class IntervalSearch:
    """Counts how many of `bounds`, float32 `[n]` and ascending, lie below numbers, as `torch.bucketize` does.

    A table knows it at the steps that numbers are rounded down to, all but the bounds within one step. Those are
    compared, one round after another; usually there is one at most.
    """

    def __init__(self, bounds: npt.NDArray[np.float32]) -> None:
        self._half = math.ceil(np.abs(bounds).max(initial=0) * STEPS) + 1
        steps = (np.arange(-self._half, self._half + 1) / STEPS).astype(np.float32)
        self._below = np.searchsorted(bounds, steps).astype(np.int64)  # of the first step: none
        self._rounds = int(np.diff(self._below).max(initial=0))
        self._bounds = np.append(bounds, np.float32(np.inf))

    def search(self, values: torch.Tensor) -> torch.Tensor:
        """float32 of any shape -> int64 of that shape."""
        x = values.numpy()
        steps = np.clip(np.floor(x * np.float32(STEPS)), -self._half, self._half).astype(np.int32) + self._half
        indices = np.take(self._below, steps)
        for _ in range(self._rounds):
            indices += np.take(self._bounds, indices) < x
        return torch.from_numpy(indices)


def _argmax_product(x: Floats, table: Floats) -> Integers:
    """Index of the row of `table` that has the largest product with each row of `x`, a few rows at a time."""
    step = max(1, SCRATCH // len(table))
    largest = np.empty(len(x), dtype=np.int64)
    for start in range(0, len(x), step):
        np.argmax(x[start : start + step] @ table.T, axis=1, out=largest[start : start + step])
    return largest


def _edges(points: Floats, bins: int) -> Floats:
    """Interval bounds per axis, `[bins + 1, p]`: quantiles of the points, since vectors crowd where they do."""
    inner = np.quantile(points, np.arange(1, bins) / bins, axis=0)
    outer = np.full((1, points.shape[1]), REACH)
    return np.concatenate([-outer, np.clip(np.round(inner * STEPS) / STEPS, -REACH, REACH), outer])


def _interval_table(edges: Floats) -> Integers:
    """`[p, steps]`: the interval of a step on each axis, times the place of that axis in the number of the box.

    The first and the last step are outside all boxes, and worth more than any box.
    """
    bins, p = len(edges) - 1, edges.shape[1]
    half = int(REACH * STEPS)
    steps = np.arange(-half, half) / STEPS
    table = np.full((p, 2 * half + 2), bins**p, dtype=np.int64)
    for axis in range(p):
        table[axis, 1:-1] = np.searchsorted(edges[1:-1, axis], steps, side="right") * bins ** (p - 1 - axis)
    return table


def _candidates(points: Floats, edges: Floats) -> list[Integers]:
    """Per box, in ascending order, the points that are nearest to some place in it, and a few more."""
    p = points.shape[1]
    centres, halves = (edges[1:] + edges[:-1]) / 2, (edges[1:] - edges[:-1]) / 2
    middle, half = (np.stack(np.meshgrid(*axes.T, indexing="ij"), -1).reshape(-1, p) for axes in (centres, halves))
    lists: list[Integers] = []
    for m, h in zip(np.array_split(middle, 64), np.array_split(half, 64), strict=True):
        box, point = _not_ruled_out(points, m, h)
        lists += np.split(point, np.searchsorted(box, np.arange(1, len(m))))
    return lists


def _not_ruled_out(points: Floats, middle: Floats, half: Floats) -> tuple[Integers, Integers]:
    """The (box, point) pairs that no rival rules out, sorted, of boxes with centres and half-widths `[boxes, p]`."""
    distance = np.zeros((len(middle), len(points)))
    for m, c in zip(middle.T, points.T, strict=True):
        distance += np.square(m[:, None] - c)
    rivals = torch.from_numpy(distance).topk(min(RIVALS, len(points)), largest=False).indices.numpy()
    first, *others = rivals.T
    least = distance - distance[np.arange(len(middle)), first][:, None]
    for h, c in zip(half.T, points.T, strict=True):
        least -= 2 * h[:, None] * np.abs(c - c[first][:, None])
    box, point = np.nonzero(least <= SLACK)
    for rival in others:  # the same again, with the few pairs that are left
        least = distance[box, point] - distance[box, rival[box]]
        least -= 2 * (half[box] * np.abs(points[point] - points[rival[box]])).sum(axis=1)
        box, point = box[least <= SLACK], point[least <= SLACK]
    return box, point
