"""Rows that are drawn, and what they say of all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from waterfill.files.architecture import Architecture, Matrix
from waterfill.planning import costs
from waterfill.planning.costs import Costs, drawn_rows, inclusion, row_costs

SIZES = st.lists(st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1e-12, 1e9])), min_size=1, max_size=60)


@given(SIZES, st.data())
def test_chances_go_by_the_costs_and_add_up(sizes: list[float], data: st.DataObject) -> None:
    wanted = data.draw(st.integers(1, len(sizes)))
    x = torch.tensor(sizes, dtype=torch.float64)
    chances = inclusion(x, wanted)
    assert float(chances.sum()) == pytest.approx(wanted)
    assert float(chances.min()) > 0
    assert float(chances.max()) <= 1 + 1e-12
    below = chances < 1
    shares = chances[below] / (x[below] + costs.FLOOR * x.mean())
    if float(x.sum()) > 0 and len(shares):
        assert float(shares.max()) == pytest.approx(float(shares.min()), rel=1e-6)


@settings(max_examples=20)
@given(SIZES, st.data())
def test_every_row_is_drawn_as_often_as_its_chance_is(sizes: list[float], data: st.DataObject) -> None:
    wanted = data.draw(st.integers(1, len(sizes)))
    chances = inclusion(torch.tensor(sizes, dtype=torch.float64), wanted)
    draws, often = 300, torch.zeros(len(sizes))
    for k in range(draws):
        rows = drawn_rows(chances, (k + 0.5) / draws)
        assert wanted - 1 <= len(rows) <= wanted + 1
        often[rows] += 1 / draws
    torch.testing.assert_close(often.double(), chances, atol=2 / draws, rtol=0)


def matrix_of(dense: Architecture, name: str) -> Matrix:
    return next(matrix for matrix in dense.matrices if matrix.name == name)


def test_a_product_says_what_its_gradient_says(dense: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly of few rows, and on average of many."""
    matrix = matrix_of(dense, "model.layers.0.mlp.up_proj")
    torch.manual_seed(0)
    weight = torch.randn(matrix.shape) * torch.logspace(-1, 1, matrix.shape[0])[:, None]
    x, slope = torch.randn(30, matrix.shape[1]), torch.randn(30, matrix.shape[0]) * torch.rand(matrix.shape[0])
    arguments = matrix.parameter, weight, x, slope, slope @ weight
    whole, exact = Costs([matrix]), Costs([matrix])
    whole.add(matrix.parameter, weight, slope.T @ x, 1)
    exact.add_product(*arguments)
    assert exact.across[matrix.name] == pytest.approx(whole.across[matrix.name], rel=1e-4)
    assert exact.along[matrix.name] == pytest.approx(whole.along[matrix.name], rel=1e-3)
    monkeypatch.setattr(costs, "LEAST_ROWS", 4)
    found = []
    for seed in range(400):
        sampled = Costs([matrix], seed)
        sampled.add_product(*arguments)
        assert sampled.along == exact.along
        found.append(sampled.across[matrix.name] / whole.across[matrix.name])
    assert np.mean(found) == pytest.approx(1, abs=4 * np.std(found) / 20)
    assert 0 < np.std(found) < 0.15, "rows are drawn by what they are likely to cost"


def test_rows_that_cost_nothing_are_harmless() -> None:
    assert float(row_costs(torch.zeros(3, 8), torch.zeros(3, 8)).sum()) == 0
    assert inclusion(torch.zeros(8, dtype=torch.float64), 2).tolist() == [0.25] * 8
