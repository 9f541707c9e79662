"""Formulas against plain automatic differentiation of transformers' own model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tuning.pruning.conftest import CHANNELS, HEAD_DIM, KV_HEADS, LAYERS, Family, loaded
from waterfill.files.checkpoint import open_checkpoint
from waterfill.planning.estimators import sampled_score
from waterfill.tuning.pruning import scoring
from waterfill.tuning.pruning.scoring import Importance, losses, open_model, score, score_layers
from waterfill.tuning.pruning.selection import Scores, full, select
from waterfill.tuning.pruning.structure import structure_of

TOKENS = torch.randint(250, (3, 16), generator=torch.Generator().manual_seed(8))
LEAD = 4
POSITIONS = 16 - 1 - LEAD
PARTS = {"heads": KV_HEADS, "channels": CHANNELS}


def scored(family: Family, importance: Importance, **options: Any) -> tuple[Any, Scores]:
    """transformers' model, and scores of it."""
    path = family("qwen2", **options)
    checkpoint = open_checkpoint(path)
    model = open_model(checkpoint, torch.float32)
    return loaded(path), score(checkpoint, structure_of(checkpoint), model, TOKENS, importance, seed=5)


def gradients(model: Any, sequence: Tensor) -> dict[str, Tensor]:
    """Of the mean negative log-probability of a sequence's own tokens behind its lead."""
    model.zero_grad()
    log_p = model(input_ids=sequence[None], use_cache=False).logits[0, LEAD:-1].log_softmax(-1)
    (-log_p.gather(1, sequence[LEAD + 1 :, None]).mean()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def lines(layer: int, kind: str, part: int) -> list[tuple[str, int, slice]]:
    """Names of all tensors that a part has rows (axis 0) or columns (1) of, and which."""
    prefix = f"model.layers.{layer}."
    if kind == "channels":
        one = slice(part, part + 1)
        return [(f"{prefix}mlp.{name}_proj.weight", axis, one) for name, axis in (("gate", 0), ("up", 0), ("down", 1))]
    q, kv = (slice(part * width, (part + 1) * width) for width in (2 * HEAD_DIM, HEAD_DIM))
    rows = [("q", q), ("k", kv), ("v", kv)]
    found = [(f"{prefix}self_attn.{name}_proj.{what}", 0, at) for name, at in rows for what in ("weight", "bias")]
    return [*found, (f"{prefix}self_attn.o_proj.weight", 1, q)]


def of_lines(terms: Tensor, axis: int, place: slice) -> Tensor:
    """The rows or columns of a part as rows `[lines, others]`."""
    if terms.ndim == 1:
        return terms[place, None]
    return terms[place] if axis == 0 else terms[:, place].T


@pytest.mark.parametrize("importance", ["taylor-first", "taylor-second", "taylor-mix", "taylor-vector"])
def test_taylor_terms(importance: Importance, family: Family) -> None:
    model, scores = scored(family, importance)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    each = [gradients(model, sequence) for sequence in TOKENS]
    mean = {name: torch.stack([g[name] for g in each]).mean(0) for name in each[0]}
    squares = {name: torch.stack([g[name].square() for g in each]).mean(0) for name in each[0]}

    def value(name: str, axis: int, place: slice) -> float:
        w, g, g2 = weights[name], mean[name], squares[name]
        terms = {
            "taylor-first": (w * g).abs(),
            "taylor-second": w.square() * g2,
            "taylor-mix": (w * g - 0.5 * w.square() * g2).abs(),
            "taylor-vector": w * g,
        }[importance]
        return float(of_lines(terms, axis, place).sum(1).abs().sum())

    for kind, found in (("heads", scores.heads), ("channels", scores.channels)):
        expected = [
            [sum(value(*line) for line in lines(layer, kind, part)) for part in range(PARTS[kind])]
            for layer in range(LAYERS)
        ]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize("power", [1, 2])
def test_magnitudes(power: int, family: Family) -> None:
    model, scores = scored(family, "l1" if power == 1 else "l2")
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for kind, found in (("heads", scores.heads), ("channels", scores.channels)):
        for layer in range(LAYERS):
            for part in range(PARTS[kind]):
                rows = [of_lines(weights[name], axis, place) for name, axis, place in lines(layer, kind, part)]
                expected = sum(float(row.double().abs().pow(power).sum()) for row in rows)
                assert float(found[layer, part]) == pytest.approx(expected, rel=1e-5)
    assert not scores.nats


def test_the_fisher_score_is_the_expected_loss_to_second_order(family: Family) -> None:
    """Sum over tokens of 1/2 d'Fd, with the exact Fisher matrix of all positions: by forward derivatives of the logits
    as what a part adds at one token vanishes, no labels drawn. Many drawn labels come near it."""
    path, ids, lead = family("llama"), TOKENS[:1, :8], 2
    checkpoint, model = open_checkpoint(path), loaded(path)
    model.set_attn_implementation("eager")  # which has forward derivatives

    def exact(module: Any, place: slice) -> float:
        seen: list[Tensor] = []

        def shifted(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            seen.append(inputs[0])
            return output + offset

        def logits(shift: Tensor) -> Tensor:
            nonlocal offset
            offset = shift
            return model(input_ids=ids, use_cache=False).logits[0, lead:-1]

        offset, total = torch.zeros(1, 8, 48), 0.0
        handle = module.register_forward_hook(shifted)
        with torch.no_grad():
            p = logits(offset).softmax(-1)
            added = seen[0][..., place] @ module.weight[:, place].T
            for token in range(8):
                direction = torch.zeros_like(added)
                direction[0, token] = -added[0, token]
                slope = torch.func.jvp(logits, (torch.zeros(1, 8, 48),), (direction,))[1]
                variance = (p * slope.square()).sum(-1) - (p * slope).sum(-1).square()
                total += float(variance.sum()) / 2
        handle.remove()
        return total / (8 - 1 - lead)

    runs, model_blockwise = 60, open_model(checkpoint, torch.float32)
    found = score(checkpoint, structure_of(checkpoint), model_blockwise, ids.repeat(runs, 1), "fisher", seed=1)
    assert found.nats
    layers = model.model.layers
    heads = [[exact(layer.self_attn.o_proj, slice(32 * h, 32 * h + 32)) for h in range(KV_HEADS)] for layer in layers]
    torch.testing.assert_close(found.heads, torch.tensor(heads, dtype=torch.float64), rtol=0.4, atol=0)
    assert float(found.heads.sum()) == pytest.approx(sum(map(sum, heads)), rel=0.15)
    channels = [exact(layers[1].mlp.down_proj, slice(c, c + 1)) for c in range(0, CHANNELS, 12)]
    torch.testing.assert_close(found.channels[1, ::12], torch.tensor(channels, dtype=torch.float64), rtol=0.5, atol=0)
    assert float(found.channels[1, ::12].sum()) == pytest.approx(sum(channels), rel=0.15)


@pytest.mark.parametrize("kept_bytes", [0, 1 << 30])
def test_effects_are_what_automatic_differentiation_says(
    kept_bytes: int, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same labels; whether blocks are computed again on the way back, or not."""
    monkeypatch.setattr(scoring, "KEPT_BYTES", kept_bytes)
    path = family("qwen2")
    checkpoint, model = open_checkpoint(path), loaded(path)
    found = score(checkpoint, structure_of(checkpoint), open_model(checkpoint, torch.float32), TOKENS, "fisher", seed=5)
    expected = torch.zeros(LAYERS, CHANNELS, dtype=torch.float64)
    for number, sequence in enumerate(TOKENS):
        inputs: list[Tensor] = []
        handles = [
            layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, to=inputs: to.append(args[0]))
            for layer in model.model.layers
        ]
        logits = model(input_ids=sequence[None], use_cache=False).logits
        for handle in handles:
            handle.remove()
        generator = torch.Generator().manual_seed(5 * 1_000_003 + number)
        slope, _ = sampled_score(logits.detach(), sequence[None], generator, LEAD)
        for layer, (x, g) in enumerate(zip(inputs, torch.autograd.grad(logits, inputs, slope), strict=True)):
            expected[layer] += (x.detach() * g)[0].double().square().sum(0)
    torch.testing.assert_close(found.channels, expected / 2 / (3 * POSITIONS), rtol=1e-3, atol=1e-12)


def test_chance_depends_on_the_seed_alone(family: Family) -> None:
    checkpoint = open_checkpoint(family("llama"))
    structure = structure_of(checkpoint)
    first, again, other = (score(checkpoint, structure, None, TOKENS, "random", seed) for seed in (1, 1, 2))
    assert torch.equal(first.channels, again.channels)
    assert not torch.equal(first.channels, other.channels)


def test_layers_are_scored_by_doing_without(family: Family) -> None:
    checkpoint = open_checkpoint(family("llama"))
    structure, model = structure_of(checkpoint), open_model(checkpoint, torch.float32)
    scores = score(checkpoint, structure, model, TOKENS, "random", 0)
    found = score_layers(structure, scores, model, TOKENS)
    whole = select(scores, full(structure.sizes))
    alone = select(scores, replace(full(structure.sizes), layers=2), torch.tensor([1.0, 0.0, 1.0]))
    assert alone.layers == (0, 2)
    ((*lost,), (*nothing,)) = losses(structure, model, TOKENS, [alone, whole])
    assert float(found[1]) == pytest.approx(sum(lost) / 3, rel=1e-6)
    assert max(map(abs, nothing)) < 1e-6
