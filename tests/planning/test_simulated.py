"""Inventories of shapes alone: those of real models of the same sizes, and the plans of those."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.models import tiny_deepseek_v3, tiny_llama
from tests.support.plans import planned
from waterfill.files.architecture import Architecture, describe
from waterfill.files.checkpoint import open_checkpoint
from waterfill.planning.inventory import Inventory

models: Any = pytest.importorskip("benchmarks.scale.models", reason="benchmarks/ is not here")
sensitivities: Any = pytest.importorskip("benchmarks.scale.sensitivities")

DENSE = models.Dense(layers=2, hidden=64, heads=4, kv_heads=2, head=16, mlp=172, vocabulary=256)
SPARSE = models.Experts(
    layers=3,
    hidden=64,
    heads=4,
    query_rank=48,
    key_rank=32,
    head=16,
    rotary=16,
    mlp=172,
    expert=48,
    experts=4,
    active=2,
    vocabulary=256,
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    return describe(open_checkpoint(tiny_llama(tmp_path_factory.mktemp("models") / "dense")))


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    return describe(open_checkpoint(tiny_deepseek_v3(tmp_path_factory.mktemp("models") / "sparse", layers=3)))


def matrices_of(inventory: Inventory) -> list[Any]:
    return [(m.name, m.shape, m.dtype, m.role, m.parameter, m.stored_shape) for m in inventory.matrices]


def test_a_dense_inventory_is_that_of_the_model(dense: Architecture) -> None:
    simulated = models.simulate(DENSE)
    assert matrices_of(simulated) == matrices_of(dense)
    assert [(k.name, k.shape, k.dtype) for k in simulated.kept] == [(k.name, k.shape, k.dtype) for k in dense.kept]


def test_an_inventory_of_experts_is_that_of_the_model_but_for_gate_and_up(sparse: Architecture) -> None:
    simulated = models.simulate(SPARSE)
    rows: Counter[tuple[str, int]] = Counter()
    for matrix in simulated.matrices:
        fused = matrix.name.replace(".experts.gate_proj", ".experts.gate_up_proj")
        rows[fused.replace(".experts.up_proj", ".experts.gate_up_proj"), matrix.shape[1]] += matrix.shape[0]
    assert rows == Counter({(m.name, m.shape[1]): m.shape[0] for m in sparse.matrices})
    assert {(k.name, k.shape) for k in simulated.kept} == {(k.name, k.shape) for k in sparse.kept}
    roles = {m.name: m.role for m in sparse.matrices}
    assert all(m.role == roles.get(m.name, "expert") for m in simulated.matrices)


@settings(max_examples=25, deadline=None)
@given(st.floats(2.2, 8.0), st.sampled_from(["storage", "memory"]), st.integers(0, 100), st.booleans())
def test_plans_are_those_of_the_model(dense: Architecture, bits: float, purpose: str, seed: int, size: bool) -> None:
    simulated = models.simulate(DENSE)
    sensitivity = sensitivities.draw_sensitivity(DENSE, simulated, seed)
    budget: dict[str, Any] = {"size_bytes": int(bits * simulated.weights / 8) + 20_000} if size else {"bits": bits}
    plans = [planned(inventory, sensitivity, purpose=purpose, **budget) for inventory in (simulated, dense)]
    assert plans[0].to_json() == plans[1].to_json()


def test_the_large_models_have_their_published_numbers_of_weights() -> None:
    assert models.simulate(models.LLAMA_405B).weights == pytest.approx(405.85e9, rel=1e-4)
    trillion = models.simulate(models.KIMI_1T)
    assert trillion.weights == pytest.approx(1.026e12, rel=1e-3)
    assert sum(matrix.role == "expert" for matrix in trillion.matrices) == 60 * 384 * 3


def test_sensitivities_follow_tokens_and_depth() -> None:
    simulated = models.simulate(SPARSE)
    drawn = sensitivities.draw_sensitivity(SPARSE, simulated)
    assert list(drawn.tensors) == [matrix.name for matrix in simulated.matrices]
    assert (
        drawn
        == sensitivities.draw_sensitivity(SPARSE, simulated)
        != sensitivities.draw_sensitivity(SPARSE, simulated, 1)
    )
    for matrix in simulated.matrices:
        c = drawn.tensors[matrix.name]
        assert (c.tokens == drawn.tokens) or matrix.role == "expert"
        assert c.alpha > 0
        assert c.beta > 0
