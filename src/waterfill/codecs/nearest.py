"""Exact nearest grid point of many vectors, without comparing every vector with every point.

    points [n, p] ──► boxes, and for each the points that are nearest to some place in it
    vectors [N, p] ──► the box of each ──sort──► box by box, distances to its few points alone ──► indices [N]

A point c is left out of a box where some rival r is nearer everywhere. |x - c|² - |x - r|² is linear in x, so in a box
of centre m and half-widths h it is at least |m - c|² - |m - r|² - 2 Σ h_a |c_a - r_a|: where that is positive, c cannot
be nearest. With 4096 points in four dimensions 50 remain on average.

Distances are computed in float64, so that the index found does not depend on the machine or on how its BLAS adds.
numpy rather than torch, whose argmax takes ten times as long.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

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
        self._points = points.numpy().astype(np.float64)
        n, p = points.shape
        self._bins = round(BOXES ** (1 / p))
        edges = _edges(self._points, self._bins)
        self._intervals = _interval_table(edges)
        lists = [*_candidates(self._points, edges), np.arange(n)]  # the last one is for everything outside
        self._lists = np.concatenate(lists)
        self._ends = np.cumsum([len(some) for some in lists]).tolist()
        # nearest = argmax <x, c> - |c|^2 / 2 = argmax <(x, 1), (c, -|c|^2 / 2)>
        self._table = np.column_stack([self._points, -np.square(self._points).sum(1) / 2])

    def search(self, vectors: torch.Tensor) -> torch.Tensor:
        """float32 `[N, p]` -> index of the nearest point, int64 `[N]`."""
        x = vectors.numpy()
        boxes = self._box_of(x)
        order = np.argsort(boxes, kind="stable")  # a radix sort, as these are 16-bit numbers
        counts = np.bincount(boxes, minlength=len(self._ends)).tolist()
        sorted_x = np.ones((len(x), x.shape[1] + 1))
        sorted_x[:, :-1] = np.take(x, order, axis=0)
        found = np.empty(len(x), dtype=np.int64)
        at = first = 0
        for count, end in zip(counts, self._ends, strict=True):
            if count:
                some = self._lists[first:end]
                found[at : at + count] = some[_argmax_product(sorted_x[at : at + count], self._table[some])]
                at += count
            first = end
        indices = np.empty_like(found)
        indices[order] = found
        return torch.from_numpy(indices)

    def _box_of(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
        half = int(REACH * STEPS)
        steps = np.clip(np.floor(x * np.float32(STEPS)), -half - 1, half).astype(np.int32) + (half + 1)
        box = sum(self._intervals[axis][steps[:, axis]] for axis in range(x.shape[1]))
        return np.minimum(box, len(self._ends) - 1).astype(np.uint16)


def _argmax_product(x: Floats, table: Floats) -> Integers:
    """Index of the row of `table` that has the largest product with each row of `x`, a few rows at a time."""
    step = max(1, SCRATCH // len(table))
    if len(x) <= step:
        return np.argmax(x @ table.T, axis=1)
    return np.concatenate([np.argmax(x[i : i + step] @ table.T, axis=1) for i in range(0, len(x), step)])


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
        distances = np.stack([np.square(m[:, a, None] - points[:, a]) for a in range(p)]).sum(0)
        box, point = _not_ruled_out(points, h, distances)
        lists += np.split(point, np.searchsorted(box, np.arange(1, len(m))))
    return lists


def _not_ruled_out(points: Floats, half: Floats, distances: Floats) -> tuple[Integers, Integers]:
    """(box, point) pairs that remain, sorted; `distances` `[boxes, n]` are squared and count from the boxes' centres."""
    rivals = torch.from_numpy(distances).topk(min(RIVALS, len(points)), largest=False).indices.numpy()
    box, point = (pairs.ravel() for pairs in np.indices(distances.shape))
    for rival in rivals.T:
        least = distances[box, point] - distances[box, rival[box]]
        least -= 2 * (half[box] * np.abs(points[point] - points[rival[box]])).sum(1)
        kept = least <= SLACK
        box, point = box[kept], point[kept]
    return box, point
