"""Sensitivities of another model, of a table, or of nothing: they divide a budget and promise nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import waterfill
from tests.support.commands import Command
from tests.support.models import tiny_llama, tiny_mixtral
from waterfill.base.errors import BudgetError, WaterfillError
from waterfill.files.architecture import Architecture, describe
from waterfill.files.checkpoint import Checkpoint, open_checkpoint
from waterfill.planning.borrowed import given_sensitivity, uniform_sensitivity
from waterfill.planning.loss import Coefficients
from waterfill.planning.sensitivity import Sensitivity


def opened(path: Path) -> tuple[Checkpoint, Architecture]:
    checkpoint = open_checkpoint(path)
    return checkpoint, describe(checkpoint)


def measured(architecture: Architecture, fingerprint: str, **alphas: float) -> Sensitivity:
    """alpha by the end of a name, and by its layer; beta is twice as much."""
    tensors = {}
    for matrix in architecture.matrices:
        parts = matrix.name.split(".")
        layer = int(parts[2]) if "layers" in parts else 0
        alpha = alphas.get(matrix.name.rpartition(".")[2], 1.0) * (1 + layer)
        tensors[matrix.name] = Coefficients(alpha, 2 * alpha)
    return Sensitivity(fingerprint, "fisher", {"kind": "self"}, nll=2.0, tokens=100, tensors=tensors)


def test_a_siblings_are_those_of_the_same_kind_at_the_same_depth(tmp_path: Path) -> None:
    small = opened(tiny_llama(tmp_path / "small", layers=2))[1]
    checkpoint, architecture = opened(tiny_llama(tmp_path / "large", layers=4))
    found = given_sensitivity(measured(small, "other", up_proj=5.0), checkpoint, architecture.matrices)
    assert found.fingerprint == checkpoint.fingerprint
    assert found.probe == {"kind": "sibling", "source": "other"}
    for kind, factor in (("mlp.up_proj", 5.0), ("self_attn.q_proj", 1.0)):
        alphas = [found.tensors[f"model.layers.{i}.{kind}"].alpha for i in range(4)]
        # Layers lie at 1/8, 3/8, 5/8 and 7/8; those of the sibling at 1/4 and 3/4; half as much each.
        assert alphas == pytest.approx([factor * value / 2 for value in (1, 1.25, 1.75, 2)])
        assert found.tensors[f"model.layers.1.{kind}"].beta == pytest.approx(2 * alphas[1])
    assert found.tensors["model.embed_tokens"].alpha == 1.0


def test_those_of_the_same_weights_are_as_they_were(tmp_path: Path) -> None:
    checkpoint, architecture = opened(tiny_llama(tmp_path))
    own = measured(architecture, checkpoint.fingerprint)
    assert given_sensitivity(own, checkpoint, architecture.matrices) is own


def test_experts_of_a_layer_share_what_those_of_a_sibling_have_together(tmp_path: Path) -> None:
    checkpoint, architecture = opened(tiny_mixtral(tmp_path))
    found = given_sensitivity(measured(architecture, "other"), checkpoint, architecture.matrices)
    expected = measured(architecture, "")
    for name, coefficients in expected.tensors.items():
        assert found.tensors[name].alpha == pytest.approx(coefficients.alpha), name


def test_what_a_sibling_lacks_is_as_sensitive_per_weight_as_the_rest(tmp_path: Path) -> None:
    checkpoint, architecture = opened(tiny_llama(tmp_path))
    own = measured(architecture, "other")
    some = {name: c for name, c in own.tensors.items() if "up_proj" not in name}
    found = given_sensitivity(
        Sensitivity("other", "fisher", {}, nll=0, tokens=1, tensors=some), checkpoint, architecture.matrices
    )
    sizes = {matrix.name: math.prod(matrix.shape) for matrix in architecture.matrices}
    usual = sum(c.alpha for c in some.values()) / sum(sizes[name] for name in some)
    name = "model.layers.0.mlp.up_proj"
    assert found.tensors[name].alpha == pytest.approx(usual * sizes[name])


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    checkpoint, architecture = opened(tiny_llama(tmp_path))
    alien = Sensitivity("x", "fisher", {}, nll=0, tokens=1, tensors={"h.0.attn": Coefficients(1, 1)})
    with pytest.raises(WaterfillError, match=r"fingerprint x has no matrix like model\.embed_tokens or any other"):
        given_sensitivity(alien, checkpoint, architecture.matrices)


def table(path: Path, **changed: Any) -> Path:
    """A table of the matrices of tiny Llamas' first layer, and of one that they do not have."""
    names = [f"model.layers.0.{n}" for n in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.gate_proj")]
    entries: dict[str, Any] = {name: {"alpha": 1.0 + i, "shape": [1, 1]} for i, name in enumerate(names)}
    path.write_text(json.dumps({"metric": "perplexity", "tensors": {**entries, "alien": {"alpha": -0.1}, **changed}}))
    return path


def test_a_table_says_which_matrices_matter_more(tmp_path: Path) -> None:
    checkpoint, architecture = opened(tiny_llama(tmp_path / "model"))
    found = given_sensitivity(table(tmp_path / "alphas.json"), checkpoint, architecture.matrices)
    assert found.probe == {"kind": "table", "source": "alphas.json"}
    assert found.tensors["model.layers.0.mlp.up_proj"].alpha == pytest.approx(1.5)  # one layer's, over both


@pytest.mark.parametrize("alpha", ["1", None, True, math.nan])
def test_a_table_of_anything_else_is_refused(alpha: Any, tmp_path: Path) -> None:
    checkpoint, architecture = opened(tiny_llama(tmp_path / "model"))
    with pytest.raises(WaterfillError, match=r"alphas\.json: alpha of 'x' is .*, expected a number"):
        given_sensitivity(table(tmp_path / "alphas.json", x={"alpha": alpha}), checkpoint, architecture.matrices)


def test_uniform_counts_every_weight_the_same(tmp_path: Path) -> None:
    _, architecture = opened(tiny_llama(tmp_path))
    found = uniform_sensitivity("f", architecture.matrices)
    assert sum(c.alpha for c in found.tensors.values()) == pytest.approx(1)
    plan = waterfill.plan(tmp_path, bits=4, alpha="uniform")
    weights = sum(tensor.weights for tensor in plan.tensors)
    error = sum(tensor.weights * tensor.t2 for tensor in plan.tensors) / weights
    assert plan.predicted.kl == pytest.approx(error, rel=0.02)
    assert not plan.promises
    assert (plan.predicted.kl_high, plan.predicted.ppl, plan.predicted.in_regime) == (None, None, False)


def test_what_is_not_measured_is_said(command: Command, tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", tokenizer=True)
    said = command("plan", model, "--bits", 4, "--alpha", "uniform").out
    assert "relative squared error" in said
    assert "was not measured" in said
    said = command("plan", model, "--bits", 4, "--sensitivity", table(tmp_path / "alphas.json")).out
    assert "no loss: the sensitivities are those of a table, alphas.json" in " ".join(said.split())
    small = tiny_llama(tmp_path / "small", layers=1, tokenizer=True)
    command("plan", small, "--bits", 4, "--probe", "random", "--sequences", 2, "--length", 8, "--save", tmp_path / "p")
    said = command("plan", model, "--bits", 4, "--sensitivity", tmp_path / "p.sensitivity.json").out
    assert "a guess, no promise" in " ".join(said.split())
    waterfill.pack(model, tmp_path / "packed", bits=4, alpha="uniform")
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x\n" * 40)
    assert waterfill.evaluate(tmp_path / "packed", model, text, context=16).predicted_kl is None


def test_a_loss_is_no_budget_where_none_is_known(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path)
    with pytest.raises(BudgetError, match="--max-kl takes sensitivities that were measured"):
        waterfill.plan(model, max_kl=0.1, alpha="uniform")
    with pytest.raises(WaterfillError, match="--alpha uniform and --sensitivity do not go together"):
        waterfill.plan(model, bits=4, alpha="uniform", sensitivity=table(tmp_path / "a.json"))
