"""Any-Precision: one index for all precisions, levels that are means, and the best split of a level in two."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support import models
from tests.support.comparisons import compared
from tests.support.plans import sensitivity_of
from waterfill.files.architecture import describe
from waterfill.files.checkpoint import open_checkpoint
from waterfill.files.original import load_original
from waterfill.studies.comparison import StudiedModel, select
from waterfill.studies.comparison.anyprec import MOST_BITS, SEED_BITS, _Sums, nested_levels, split, squared_gradients

ROWS, WIDTH = 5, 300


def drawn(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights, some of them 0 and a row of few values, and what they count, some of it nothing."""
    generator = torch.Generator().manual_seed(seed)
    weight, importance = torch.randn(2, ROWS, WIDTH, generator=generator)
    weight[:, :7], weight[3] = 0, weight[3].sign()
    importance = importance.square()
    importance[1, ::3], importance[2] = 0, 0
    return weight, importance


def test_an_index_of_fewer_bits_is_the_beginning_of_one_of_more() -> None:
    weight, importance = drawn()
    _, whole = nested_levels(weight, importance, MOST_BITS)
    for bits in range(SEED_BITS, MOST_BITS):
        assert torch.equal(nested_levels(weight, importance, bits)[1], whole >> (MOST_BITS - bits))


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_levels_are_the_weighed_means_of_their_members(bits: int) -> None:
    weight, importance = drawn(1)
    levels, index = nested_levels(weight, importance, bits)
    for row in range(ROWS):
        counts = importance[row] * (weight[row] != 0)
        counts = counts if counts.sum() else torch.ones(WIDTH)
        for level in index[row].unique():
            inside = index[row] == level
            share = counts[inside] if counts[inside].sum() else torch.ones(int(inside.sum()))
            mean = (weight[row][inside].double() * share).sum() / share.sum()
            assert float(levels[row, level]) == pytest.approx(float(mean), rel=1e-3, abs=1e-6)


def test_more_bits_never_lose_more_and_eight_lose_little() -> None:
    weight, importance = drawn(2)
    errors = []
    for bits in range(SEED_BITS, MOST_BITS + 1):
        levels, index = nested_levels(weight, importance, bits)
        errors.append(float((importance * (levels.gather(1, index) - weight).square()).sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01 * errors[0]


def test_a_split_is_the_best_of_all() -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(1, 40, generator=generator, dtype=torch.float64).sort(dim=1).values
    counts = torch.rand(1, 40, generator=generator, dtype=torch.float64)
    index = split(_Sums(values, counts), torch.zeros(1, 40, dtype=torch.int64), 1)[0].numpy()
    x, w = values[0].numpy(), counts[0].numpy()

    def loss(at: int) -> float:
        parts = ((x[:at], w[:at]), (x[at:], w[at:]))
        return float(sum((v * (p - np.average(p, weights=v)) ** 2).sum() for p, v in parts))

    assert int((index == 0).sum()) == min(range(1, 40), key=loss)


def test_the_seed_is_near_the_best_for_a_gaussian() -> None:
    weight = torch.randn(4, 20_000, generator=torch.Generator().manual_seed(4))
    levels, index = nested_levels(weight, torch.ones_like(weight), 3)
    assert float((levels.gather(1, index) - weight).square().mean()) == pytest.approx(0.03454, rel=0.03)  # Max 1960


def test_a_level_that_nothing_falls_into_is_that_of_its_parent() -> None:
    weight = torch.tensor([[-1.0, -1.0, 1.0, 1.0]])
    levels, index = nested_levels(weight, torch.ones_like(weight), 5)
    assert torch.equal(levels.gather(1, index), weight)
    assert set(levels.flatten().tolist()) <= {-1.0, 1.0, 0.0}


def test_squared_gradients_and_bytes(tmp_path: Path) -> None:
    path = models.tiny_llama(tmp_path / "model", tokenizer=True)
    checkpoint = open_checkpoint(path)
    architecture = describe(checkpoint)
    model = load_original(checkpoint, torch.float32)
    ids = torch.randint(3, 60, (3, 64), generator=torch.Generator().manual_seed(5))
    subject = StudiedModel(
        "m", checkpoint, architecture, model, sensitivity_of(architecture, fingerprint=checkpoint.fingerprint), ids
    )
    name = architecture.matrices[3].parameter
    parameter = dict(model.named_parameters())[name].requires_grad_(True)
    expected = torch.zeros_like(parameter)
    for sequence in ids:
        with torch.enable_grad():
            loss = model(sequence[None], labels=sequence[None]).loss
            expected += torch.autograd.grad(loss, parameter)[0].square()
    found = squared_gradients(subject)[3]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-12)
    rows = {
        row.method: row for row in compared(subject, ids.flatten(), *select(["anyprec-3", "anyprec-4", "rtn-3"])).rows
    }
    assert rows["anyprec-4"].kl < rows["anyprec-3"].kl < rows["rtn-3"].kl  # type: ignore[operator]
    weights = sum(m.shape[0] * m.shape[1] for m in architecture.matrices)
    tables = sum(m.shape[0] * 16 * 8 for m in architecture.matrices)
    assert rows["anyprec-3"].bits == pytest.approx(3 + tables / weights, rel=0.02)
