"""Formulas against plain automatic differentiation of transformers' own model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tuning.pruning.conftest import CHANNELS, HEAD_DIM, KV_HEADS, LAYERS, Family, loaded
from waterfill.files.checkpoint import open_checkpoint
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
    """1/2 d'Fd, with the exact Fisher matrix of all positions: by a derivative of the logits along the direction in
    which a part's columns vanish, no labels drawn. Many sequences' drawn labels come near it."""
    path = family("llama")
    checkpoint, model = open_checkpoint(path), loaded(path)
    model.set_attn_implementation("eager")  # which has forward derivatives
    ids = TOKENS[:1]

    def logits(name: str, weight: Tensor) -> Tensor:
        return torch.func.functional_call(model, {name: weight}, (ids,), {"use_cache": False}).logits[0, LEAD:-1]

    def expected(name: str, place: slice) -> float:
        weight = model.get_parameter(name).detach()
        direction = torch.zeros_like(weight)
        direction[:, place] = -weight[:, place]
        values, slope = torch.func.jvp(lambda w: logits(name, w), (weight,), (direction,))
        p = values.softmax(-1)
        variance = (p * slope.square()).sum(-1) - (p * slope).sum(-1).square()
        return float(variance.mean()) / 2

    runs = 400
    found = score(
        checkpoint,
        structure_of(checkpoint),
        open_model(checkpoint, torch.float32),
        ids.repeat(runs, 1),
        "fisher",
        seed=1,
    )
    assert found.nats
    for layer in range(LAYERS):
        for part in range(KV_HEADS):
            exact = expected(f"model.layers.{layer}.self_attn.o_proj.weight", slice(part * 32, (part + 1) * 32))
            assert float(found.heads[layer, part]) == pytest.approx(exact, rel=4 * (2 / runs) ** 0.5)
    exact = [expected("model.layers.1.mlp.down_proj.weight", slice(c, c + 1)) for c in range(0, CHANNELS, 8)]
    torch.testing.assert_close(found.channels[1, ::8].float(), torch.tensor(exact), rtol=6 * (2 / runs) ** 0.5, atol=0)


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
