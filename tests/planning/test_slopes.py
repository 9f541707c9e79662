"""Slopes of many matrices at once: hulls and interpolation, against one matrix at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from waterfill.planning import slopes
from waterfill.planning.loss import Floats
from waterfill.planning.slopes import GRID, Slopes


def hull_of(sizes: list[float], losses: list[float]) -> list[int]:
    """Every vertex by the definition: no chord between two other points of other sizes lies on or below it."""
    distinct = [k for k in range(len(sizes)) if k == 0 or sizes[k] > sizes[k - 1]]
    return [
        k
        for k in distinct
        if not any(
            sizes[a] < sizes[k] < sizes[b]
            and (losses[b] - losses[a]) * (sizes[k] - sizes[a]) <= (losses[k] - losses[a]) * (sizes[b] - sizes[a])
            for a in distinct
            for b in distinct
        )
    ]


@settings(deadline=None)
@given(st.data(), st.integers(1, 5), st.integers(1, 9))
def test_hulls_are_those_of_the_definition(data: st.DataObject, sources: int, rates: int) -> None:
    """Whole numbers, of which nothing is rounded."""
    rows = st.lists(st.integers(0, 12), min_size=rates, max_size=rates)
    sizes = np.array([sorted(data.draw(rows)) for _ in range(sources)], np.float64)
    losses = np.array([data.draw(rows) for _ in range(sources)], np.float64)
    hull, last = slopes._hulls(sizes, losses)
    for row in range(sources):
        expected = hull_of(sizes[row].tolist(), losses[row].tolist())
        assert hull[row, : last[row] + 1].tolist() == expected


@given(st.lists(st.floats(1e-12, 1e-3), min_size=1, max_size=12), st.floats(1e-13, 1e-2))
def test_rates_are_interpolated_as_numpy_does(values: list[float], price: float) -> None:
    falling = -np.log(np.array(sorted(values, reverse=True)))
    vertices = np.arange(5, 6 + len(values), dtype=np.int32)[None]
    padded: Floats = np.append(falling, [math.inf, math.inf])[None]
    many = Slopes(padded, np.pad(vertices, ((0, 0), (0, 2))), min(values), max(values))
    middles = (vertices[0, :-1] / GRID + vertices[0, 1:] / GRID) / 2
    for asked in (price, *values):
        assert many.rates(asked)[0] == pytest.approx(np.interp(-math.log(asked), falling, middles), abs=1e-12)
