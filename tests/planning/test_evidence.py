"""Matrices that the probe reached hardly or not at all: counted, given the sensitivity of like ones, and named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import waterfill
from tests.support.commands import Command
from tests.support.models import tiny_gpt2, tiny_gpt_oss, tiny_mixtral
from tests.support.plans import planned, sensitivity_of
from waterfill.base.errors import WaterfillError
from waterfill.files.architecture import Architecture, Matrix, describe
from waterfill.files.checkpoint import open_checkpoint
from waterfill.planning.evidence import HALF, Evidence, weigh
from waterfill.planning.loss import Coefficients
from waterfill.planning.plan import Plan
from waterfill.planning.sensitivity import Sensitivity, measure


def matrix(name: str, role: Any = "linear", shape: tuple[int, int] = (32, 64)) -> Matrix:
    return Matrix(name, f"{name}.weight", None, False, shape, "BF16", role, ())


def random_tokens(vocabulary: range, *shape: int) -> torch.Tensor:
    return torch.randint(vocabulary.start, vocabulary.stop, shape, generator=torch.Generator().manual_seed(1))


# -- counting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "method"),
    [(tiny_gpt2, "fisher"), (tiny_mixtral, "fisher"), (tiny_gpt_oss, "fisher"), (tiny_mixtral, "perturb")],
)
def test_tokens_are_counted_by_matrix(build: Any, method: Any, tmp_path: Path) -> None:
    """All of them, or by the routers' own count where there are experts."""
    path = build(tmp_path, dtype=torch.float32, layers=1)
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="eager").eval()
    tokens = random_tokens(range(256), 2, 9)
    counts = routed(model, tokens)
    matrices = [m for m in describe(open_checkpoint(path)).matrices if method == "fisher" or m.expert is not None]
    found = measure(model, matrices, tokens, method=method).tensors
    for one in matrices:
        count = found[one.name].tokens
        assert count is not None
        assert count >= tokens.numel() if one.expert is None else count == counts[one.expert], one.name


def routed(model: Any, tokens: torch.Tensor) -> list[int]:
    """Tokens by expert of the one mixture, as its router says."""
    indices: list[torch.Tensor] = []
    experts = [module for module in model.modules() if hasattr(module, "is_transposed")]
    handles = [module.register_forward_pre_hook(lambda _, args: indices.append(args[1])) for module in experts]
    model(input_ids=tokens)
    for handle in handles:
        handle.remove()
    return torch.cat(indices).flatten().bincount(minlength=4).tolist() if indices else []


# -- priors ------------------------------------------------------------------------------------------------------------


def test_what_was_measured_by_every_token_stays(dense: Architecture) -> None:
    for tokens in (None, 28, 32):
        found = {m.name: Coefficients(0.1 * i, 0.2, 0.01, 0.02, tokens) for i, m in enumerate(dense.matrices)}
        assert weigh(dense.matrices, found, 28) == {name: Evidence(c) for name, c in found.items()}


@pytest.mark.parametrize("tokens", [0, 1, HALF, 1000, 10_000])
def test_few_tokens_count_less(tokens: int) -> None:
    experts = [matrix(f"layers.0.experts.up.{i}", "expert") for i in range(3)]
    found = {
        m.name: Coefficients(a, 10 * a, tokens=n)
        for m, a, n in zip(experts, (2.0, 4.0, 9.0), (10**6, 10**6, tokens), strict=True)
    }
    share = tokens / (tokens + HALF * (1 - tokens / 10**6))
    usual = (2 + 4 + 9) / 3 if tokens else (2 + 4) / 2
    got = weigh(experts, found, 10**6)[experts[2].name]
    assert got.measured == pytest.approx(share)
    assert got.like == "layers.0.experts.up.*"
    assert got.coefficients.alpha == pytest.approx(share * 9 + (1 - share) * usual)
    assert got.coefficients.beta == pytest.approx(10 * got.coefficients.alpha)


@pytest.mark.parametrize(
    ("reached", "like", "alpha"),
    [
        ({"layers.0.experts.1.up": 3.0, "layers.1.experts.1.up": 5.0}, "layers.0.experts.*.up", 3.0),
        ({"layers.1.experts.0.up": 5.0, "layers.1.q": 7.0}, "layers.*.experts.*.up", 5.0),
        ({"layers.1.q": 7.0, "head": 1.0}, "all linear matrices", 7.0),
        ({"head": 1.0}, "all matrices", 1.0),
    ],
)
def test_the_closest_like_matrices_are_taken(reached: dict[str, float], like: str, alpha: float) -> None:
    """Per weight: a matrix of twice the size costs twice as much."""
    unreached = matrix("layers.0.experts.0.up", shape=(64, 64))
    matrices = [unreached, *(matrix(name, "head" if name == "head" else "linear") for name in reached)]
    found = {unreached.name: Coefficients(0.0, 0.0, tokens=0)}
    found |= {name: Coefficients(value, value, tokens=100) for name, value in reached.items()}
    got = weigh(matrices, found, 100)[unreached.name]
    assert (got.measured, got.like, got.coefficients.alpha) == (0, like, pytest.approx(2 * alpha))


def test_nothing_was_reached() -> None:
    with pytest.raises(WaterfillError, match=r"no token of the probe reached tower\.0, nor any other"):
        weigh([matrix("tower.0")], {"tower.0": Coefficients(0.0, 0.0, tokens=0)}, 100)


def test_old_files_know_what_was_not_reached(dense: Architecture, tmp_path: Path) -> None:
    measured = sensitivity_of(dense)
    name = dense.matrices[3].name
    measured = replace(measured, tensors={**measured.tensors, name: Coefficients(0.0, 0.0)})
    file = tmp_path / "s.json"
    file.write_text(measured.to_json().replace(',\n   "tokens": null', ""))
    assert "null}" not in file.read_text()
    counts = {key: c.tokens for key, c in Sensitivity.load(file).tensors.items()}
    assert counts == dict.fromkeys(counts) | {name: 0}


# -- plans -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens from 200 on, "another language", go to experts 12 to 15, and all others to the first 12."""
    path = tmp_path_factory.mktemp("experts")
    config = Qwen3MoeConfig(
        hidden_size=64,
        moe_intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=256,
        num_experts=16,
        num_experts_per_tok=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = Qwen3MoeForCausalLM(config)
        for parameter in model.parameters():
            fan_in = parameter.shape[-1] if parameter.ndim > 1 else 100
            parameter.add_(torch.randn_like(parameter), alpha=fan_in**-0.5)
        model.model.embed_tokens.weight[:, 0] = -2.0
        model.model.embed_tokens.weight[200:, 0] = 2.0
        for layer in model.model.layers:
            layer.mlp.gate.weight *= 0.2
            layer.mlp.gate.weight[:12, 0] = -1.0
            layer.mlp.gate.weight[12:, 0] = 1.0
            layer.mlp.experts.down_proj *= 4
    model.to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def seen(experts: Path) -> Sensitivity:
    checkpoint = open_checkpoint(experts)
    model = AutoModelForCausalLM.from_pretrained(experts, dtype=torch.float32, experts_implementation="eager").eval()
    probe = {"kind": "text", "sequences": 8, "length": 64, "seed": 0, "text": "a.txt"}
    tokens = random_tokens(range(200), 8, 64)
    return measure(model, describe(checkpoint).matrices, tokens, fingerprint=checkpoint.fingerprint, probe=probe)


@torch.inference_mode()
def divergence(packed: Path, original: Path, tokens: torch.Tensor) -> float:
    models = (
        AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32),
        waterfill.load(packed, dtype=torch.float32),
    )
    p, q = (model(input_ids=tokens).logits.log_softmax(-1) for model in models)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_text_that_the_probe_had_nothing_of(experts: Path, seen: Sensitivity, tmp_path: Path) -> None:
    """The experts that only it uses lose no more than where all matrices share one codec."""
    other = random_tokens(range(200, 256), 8, 64)
    for name, more in (("planned", {}), ("uniform", {"uniform": True})):
        waterfill.pack(experts, tmp_path / name, bits=4.0, sensitivity=seen, **more)  # type: ignore[arg-type]
    assert divergence(tmp_path / "planned", experts, other) < 1.2 * divergence(tmp_path / "uniform", experts, other)


def test_plans_say_what_was_not_measured(experts: Path, seen: Sensitivity, command: Command, tmp_path: Path) -> None:
    plan = waterfill.plan(experts, bits=4.0, sensitivity=seen)
    unreached = {tensor.name for tensor in plan.tensors if tensor.measured == 0}
    assert unreached >= {
        f"model.layers.{i}.mlp.experts.{w}.{e}"
        for i in (0, 1)
        for w in ("gate_up_proj", "down_proj")
        for e in range(12, 16)
    }
    for tensor in plan.tensors:
        assert (tensor.like is None) == (tensor.measured == 1)
        assert tensor.role == "expert" or tensor.measured == 1
        assert tensor.role != "expert" or tensor.rate_bits > 2
    assert plan.predicted.assumed_kl > 0
    assert plan.predicted.kl_low <= plan.predicted.kl - plan.predicted.assumed_kl
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert Plan.load(tmp_path / "plan.json") == plan
    (tmp_path / "s.json").write_text(seen.to_json())
    shown = " ".join(command("plan", experts, "--bits", "4", "--sensitivity", tmp_path / "s.json").out.split())
    assert "not measured the probe hardly reached" in shown
    assert f"{len(unreached)} of them not at all" in shown


def test_dense_models_are_planned_as_before(dense: Architecture) -> None:
    """With the tokens counted, or not."""
    plain = sensitivity_of(dense)
    counted = replace(plain, tensors={name: replace(c, tokens=32) for name, c in plain.tensors.items()})
    for options in ({"bits": 3.0}, {"max_kl": 0.02}):
        plan = planned(dense, counted, **options)
        assert plan == planned(dense, plain, **options)
        assert plan.predicted.assumed_kl == 0
        assert all((tensor.measured, tensor.like) == (1, None) for tensor in plan.tensors)
