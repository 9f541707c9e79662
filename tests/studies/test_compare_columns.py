"""SliM-LLM and BiLLM: the loop that they share, what is stored, and the usual mistakes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.comparisons import compared
from tests.support.plans import sensitivity_of
from waterfill.files.architecture import describe
from waterfill.files.artifact import Buffer
from waterfill.files.checkpoint import open_checkpoint
from waterfill.files.original import load_original
from waterfill.planning.probe import own_text
from waterfill.studies.comparison import Method, StudiedModel, select
from waterfill.studies.comparison.billm import binarised, find_regions, once, twice
from waterfill.studies.comparison.columns import DAMPING, GROUP, Inputs, inverse_factor, round_columns, salience
from waterfill.studies.comparison.slim import group_bits, to_nearest
from waterfill.studies.comparison.stored import quantised, run_quantiser


def inputs(tokens: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    return torch.randn(tokens, width, generator=generator) @ torch.randn(width, width, generator=generator)


def weights(rows: int, width: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows + width))


def seen(x: Tensor, sample: int = 0) -> Inputs:
    kept = Inputs(x.shape[1], sample)
    for part in x.split(17):
        kept.see(part[None], part)
    return kept


def whole(_: Tensor, block: slice) -> Callable[[Tensor, int], Tensor]:
    return lambda column, k: column.round()


def test_columns_make_up_for_one_another_as_in_optimal_brain_surgery() -> None:
    """Against the inverse of the moments of the columns that are left, taken anew for every column."""
    x, weight = inputs(400, 150), 3 * weights(8, 150)
    moments = seen(x).moments
    rounded = round_columns(weight, inverse_factor(moments), whole, within=True)
    damped = moments.numpy() + DAMPING * moments.diagonal().mean().item() * np.eye(150)
    left = weight.double().numpy()
    for column in range(150):
        inverse = np.linalg.inv(damped[column:, column:])
        error = left[:, column] - np.round(left[:, column])
        left[:, column] = np.round(left[:, column])
        left[:, column + 1 :] -= np.outer(error / inverse[0, 0], inverse[0, 1:])
    assert float((torch.from_numpy(left) == rounded).float().mean()) > 0.995  # but for ties within rounding


def test_without_errors_within_a_block_its_columns_are_rounded_as_they_came() -> None:
    x, weight = inputs(400, 150), 3 * weights(8, 150)
    rounded = round_columns(weight, inverse_factor(seen(x).moments), whole, within=False)
    assert torch.equal(rounded[:, :GROUP], weight[:, :GROUP].round())
    assert not torch.equal(rounded[:, GROUP:], weight[:, GROUP:].round())


def test_columns_that_nothing_is_multiplied_with() -> None:
    x = inputs(60, 40)
    x[:, 3] = 0
    rounded = round_columns(weights(4, 40), inverse_factor(seen(x).moments), whole, within=True)
    assert bool(rounded.isfinite().all())


def test_inputs_keep_some_of_what_they_see() -> None:
    x = inputs(100, 8)
    assert torch.equal(seen(x, sample=40).some, x[:40])
    torch.testing.assert_close(seen(x).moments.float(), x.T @ x, rtol=1e-4, atol=1e-3)


# ------------------------------------------------------------------------------------------------------------ SliM-LLM


@given(groups=st.integers(1, 9), bits=st.sampled_from([2, 3]), rest=st.sampled_from([0, 32]))
@settings(max_examples=25, deadline=None)
def test_as_many_groups_get_a_bit_more_as_get_one_less(groups: int, bits: int, rest: int) -> None:
    width = groups * GROUP + rest
    weight, x = weights(16, width), torch.randn(40, width, generator=torch.Generator().manual_seed(0))
    chosen = group_bits(weight, weight.square(), x, bits)
    assert len(chosen) == groups + (rest > 0)
    assert sum(chosen) == bits * len(chosen)
    assert set(chosen) <= {bits - 1, bits, bits + 1}
    assert chosen == group_bits(weight, weight.square(), x, bits)


def test_salient_groups_get_more_bits() -> None:
    x = torch.randn(200, 6 * GROUP, generator=torch.Generator().manual_seed(1))
    x[:, 2 * GROUP : 3 * GROUP] *= 20
    weight = weights(32, 6 * GROUP)
    salient = salience(weight, inverse_factor(seen(x).moments))
    chosen = group_bits(weight, salient, x, 2)
    assert chosen[2] == 3
    assert 1 in chosen


def test_one_bit_is_a_mean_and_as_much_on_either_side() -> None:
    weight = weights(4, 128) + 0.3
    rounded = to_nearest(weight, 1)
    mean, size = weight.mean(1, keepdim=True), weight.abs().mean(1, keepdim=True)
    torch.testing.assert_close(rounded, mean + size * torch.sign(weight - mean))
    for bits in (2, 3, 4):
        assert all(len(set(row.tolist())) <= 2**bits for row in to_nearest(weight, bits))


# -------------------------------------------------------------------------------------------------------------- BiLLM


def test_every_weight_lies_in_one_region() -> None:
    weight = weights(64, GROUP)
    regions = find_regions(weight, weight.square())
    assert torch.equal(torch.stack(regions).sum(0), torch.ones(64, GROUP, dtype=torch.int64))
    assert torch.equal(regions.salient, regions.salient[:1].expand(64, -1)), "whole columns"


def test_splitting_a_gaussian_in_two_is_its_best_quantiser_of_two_bits() -> None:
    weight = torch.randn(4, 1 << 17, generator=torch.Generator().manual_seed(0))
    everywhere = torch.ones_like(weight, dtype=torch.bool)
    assert float((weight - once(weight, everywhere)).square().mean()) == pytest.approx(1 - 2 / np.pi, abs=0.002)
    errors = []
    for border in np.arange(0.7, 1.3, 0.02):
        near = weight.abs() <= border
        errors.append(float((weight - once(weight, near) - once(weight, ~near)).square().mean()))
    assert min(errors) == pytest.approx(0.1175, abs=0.001)


def test_salient_columns_are_nearer_than_others() -> None:
    weight = weights(64, GROUP)
    weight[:, 5] *= 8
    regions = find_regions(weight, weight.square())
    assert bool(regions.salient[0, 5])
    error = (weight - binarised(weight, regions)).square() / weight.square().mean(0)
    assert float(error[regions.salient].mean()) < float(error[~regions.salient].mean())


def test_numbers_of_regions_are_stored_as_they_are_counted() -> None:
    weight = weights(8, GROUP)
    everywhere = torch.ones_like(weight, dtype=torch.bool)
    for row in once(weight, everywhere):
        assert len(set(row.tolist())) == 2
    assert all(len(set(row.tolist())) <= 4 for row in twice(weight, everywhere))


# ------------------------------------------------------------------------------------------------------ on a real model


@pytest.fixture(scope="module")
def trained(ref_llama: Path) -> tuple[StudiedModel, Tensor]:
    checkpoint = open_checkpoint(ref_llama)
    architecture = describe(checkpoint)
    model = load_original(checkpoint, torch.float32)
    measured = replace(sensitivity_of(architecture), fingerprint=checkpoint.fingerprint)
    tokens = own_text(model, range(40), 128, seed=0)
    subject = StudiedModel("ref", checkpoint, architecture, model, measured, tokens[:32])
    return subject, tokens[32:].flatten()


def in_groups(weight: Tensor, bits: int) -> Any:
    """Rounding to nearest with SliM-LLM's ranges, where no group has more bits than another."""
    rounded = torch.cat([to_nearest(part, bits) for part in weight.split(GROUP, dim=1)], dim=1)
    return quantised(rounded, {"codes": Buffer("codes", "U8", (weight.numel() * bits // 8,))})


def residual(weight: Tensor) -> Any:
    """Signs, and signs of what they leave, by blocks: what BiLLM is to be better than with fewer signs."""
    parts = weight.split(GROUP, dim=1)
    rounded = torch.cat([twice(part, torch.ones_like(part, dtype=torch.bool)) for part in parts], dim=1)
    return quantised(rounded, {"signs": Buffer("signs", "U8", (weight.numel() // 4,))})


@pytest.mark.slow
def test_the_orderings_of_the_papers(trained: tuple[StudiedModel, Tensor]) -> None:
    subject, ids = trained
    plain = Method("residual", "residual", "test", partial(run_quantiser, residual))
    nearest = [
        Method(f"nearest-{bits}", "n", "test", partial(run_quantiser, partial(in_groups, bits=bits))) for bits in (2, 3)
    ]
    rows = {row.method: row for row in compared(subject, ids, *select(["slim-*", "billm"]), plain, *nearest).rows}
    assert all(row.problem is None for row in rows.values()), rows
    for bits in (2, 3):
        assert rows[f"slim-{bits}"].kl < rows[f"nearest-{bits}"].kl
    assert rows["billm"].kl < rows["residual"].kl
    bits_of = {name: rows[name].bits for name in ("slim-2", "slim-3", "billm")}
    assert bits_of["slim-3"] == pytest.approx(bits_of["slim-2"] + 1, abs=0.35)
    assert bits_of["billm"] > 2.5, "all that is stored, not the signs alone"
