"""Rates of entropy-coded matrices: equal slopes, budgets met to the byte, and what the exact solver says of it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from tests.support.models import tiny_llama, tiny_mixtral
from tests.support.plans import assert_sound, codecs_of, planned, sensitivity_of
from waterfill.base.errors import BudgetError
from waterfill.codecs import Trellis, get_codec
from waterfill.files.architecture import Architecture, describe
from waterfill.files.checkpoint import open_checkpoint
from waterfill.planning.allocate import allocate
from waterfill.planning.loss import Coefficients, predicted_kl
from waterfill.planning.menu import make_menus
from waterfill.planning.plan import Plan
from waterfill.planning.refine import refine


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    return describe(open_checkpoint(tiny_llama(tmp_path_factory.mktemp("models") / "dense")), ())


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    return describe(open_checkpoint(tiny_mixtral(tmp_path_factory.mktemp("models") / "mixtral")), ())


def rates_of(plan: Plan) -> list[float]:
    codecs = [get_codec(tensor.codec) for tensor in plan.tensors]
    assert all(isinstance(codec, Trellis) for codec in codecs)
    return [codec.rate for codec in codecs if isinstance(codec, Trellis)]


def slopes_of(plan: Plan) -> list[float]:
    """Loss that one more byte would save, of each matrix, by a difference of a twentieth of a bit."""
    slopes = []
    for tensor, rate in zip(plan.tensors, rates_of(plan), strict=True):
        c, step = Coefficients(tensor.alpha, tensor.beta), 0.05
        points = [get_codec(f"trellis-s64-r{r:.4f}").menu_point(tensor.shape) for r in (rate - step, rate + step)]
        losses = [predicted_kl(c, point.t2, tensor.rho, point.along) for point in points]
        slopes.append((losses[0] - losses[1]) / (points[1].size_bytes - points[0].size_bytes))
    return slopes


@pytest.mark.parametrize("bits", [2.5, 3.25, 4.0])
def test_every_matrix_gains_the_same_from_one_more_byte(dense: Architecture, bits: float) -> None:
    plan = planned(dense, bits=bits)
    slopes = np.array(slopes_of(plan))
    assert slopes.max() / slopes.min() < 1.35
    assert len(set(rates_of(plan))) > len(plan.tensors) // 2
    assert_sound(plan, dense, sensitivity_of(dense))


@pytest.mark.parametrize("bits", [2.0, 3.0, 5.0])
def test_the_exact_solver_on_a_fine_menu_agrees(dense: Architecture, bits: float) -> None:
    sensitivity = sensitivity_of(dense)
    menus = make_menus(dense, sensitivity.tensors, "auto")
    limit = int(bits * menus.weights / 8)
    found = allocate(menus.choices, limit)
    points = refine(menus, found.choices, (), spare_bytes=limit - found.size_bytes)
    loss = math.fsum(
        predicted_kl(sensitivity.tensors[m.name], p.t2, t.rho, p.along)
        for m, p, t in zip(dense.matrices, points, menus.plans(points), strict=True)
    )
    assert sum(point.size_bytes for point in points) <= limit
    assert loss <= found.loss * (1 + 1e-12)
    assert loss >= found.loss * 0.985, "rates between those of the menu gain little"


def test_at_high_rates_the_closed_form_holds(dense: Architecture) -> None:
    """R_i - R_j = 1/2 log2 of (alpha_i / N_i) / (alpha_j / N_j), side information aside."""
    plan = planned(dense, bits=5.0, gain="unbiased")
    codecs = [get_codec(tensor.codec) for tensor in plan.tensors]
    core = [
        codec.core_rate(t.shape) for codec, t in zip(codecs, plan.tensors, strict=True) if isinstance(codec, Trellis)
    ]
    cost = [tensor.alpha + tensor.beta / tensor.shape[1] for tensor in plan.tensors]  # of noise in any direction
    expected = [0.5 * math.log2(c / tensor.weights) for c, tensor in zip(cost, plan.tensors, strict=True)]
    deviation = np.array(core) - np.array(expected)
    assert deviation.std() < 0.03


@pytest.mark.parametrize("uniform", [False, True])
def test_a_size_is_met_from_below_to_a_ten_thousandth(dense: Architecture, uniform: bool) -> None:
    whole = planned(dense, bits=9.0).size_bytes
    for size in range(whole // 4, whole // 2, whole // 17):
        plan = planned(dense, size_bytes=size, uniform=uniform)
        # What cannot be spent is less than a step of the rate of one matrix; these matrices are very small.
        step = 2 * (len(plan.tensors) if uniform else 1) + 1e-4 * sum(tensor.weights for tensor in plan.tensors) / 8
        assert size - max(1e-4 * size, step) <= plan.size_bytes <= size
        if uniform:
            assert len(set(codecs_of(plan).values())) == 1


def test_ties_share_a_rate(dense: Architecture) -> None:
    plan = planned(dense, bits=3.0, ties=("*.q_proj,*.k_proj,*.v_proj",))
    codecs = codecs_of(plan)
    for layer in range(2):
        names = [f"model.layers.{layer}.self_attn.{name}_proj" for name in "qkv"]
        assert len({codecs[name] for name in names}) == 1


def test_the_smallest_artifact_within_a_loss(dense: Architecture) -> None:
    coarse = planned(dense, max_kl=0.05, codecs=("trellis-s64-r2.0000", "trellis-s64-r3.0000", "trellis-s64-r4.0000"))
    plan = planned(dense, max_kl=0.05)
    assert 0.0499 < plan.predicted.kl <= 0.05
    assert plan.size_bytes < coarse.size_bytes


def test_generous_budgets_keep_matrices_as_they_are_and_tight_ones_are_refused(
    dense: Architecture, mixtral: Architecture
) -> None:
    assert set(codecs_of(planned(dense, size_bytes=10**9)).values()) == {"raw"}
    assert set(rates_of(planned(mixtral, size_bytes=10**9))) == {9.0}
    with pytest.raises(BudgetError, match="the smallest feasible"):
        planned(dense, bits=0.1)


def test_states_are_those_that_were_asked_for(dense: Architecture) -> None:
    eight = planned(dense, bits=3.0, codecs=("trellis-s8",))
    assert {get_codec(name).states for name in codecs_of(eight).values()} == {8}  # type: ignore[attr-defined]
    assert planned(dense, bits=3.0).predicted.kl < eight.predicted.kl
    memory = planned(dense, bits=3.0, purpose="memory")
    assert all(name.startswith(("higgs", "bitshift")) for name in codecs_of(memory).values())
    grids = planned(dense, bits=3.0, purpose="memory", codecs=("higgs-*",))
    assert all(name.startswith("higgs") for name in codecs_of(grids).values())
    assert eight.predicted.kl < 0.8 * grids.predicted.kl
    assert eight.predicted.kl < memory.predicted.kl < 0.9 * grids.predicted.kl


def test_a_model_of_many_matrices_is_planned_with_a_coarse_menu(
    dense: Architecture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fine = planned(dense, bits=3.0)
    monkeypatch.setattr("waterfill.planning.menu.MANY_MATRICES", 1)
    coarse = planned(dense, bits=3.0)
    assert coarse.predicted.kl == pytest.approx(fine.predicted.kl, rel=2e-3)
