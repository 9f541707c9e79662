"""From sequences to scores of parts, and what a selection loses: passes of a model that is read block by block.

tokens ──► passes ──► terms ──► Scores
       └─► passes without what a selection leaves out ──► KL of each sequence
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from waterfill.base.progress import Progress, step_of
from waterfill.files.architecture import read_kept
from waterfill.files.checkpoint import Checkpoint
from waterfill.files.model_calls import read
from waterfill.files.skeleton import ModelTensor
from waterfill.planning.disturbance import divergence, exchanged
from waterfill.planning.estimators import gradient_pass
from waterfill.planning.measuring import PASS_TOKENS, TRIAL_TOKENS
from waterfill.planning.probe import lead_of
from waterfill.planning.sensitivity import trainable
from waterfill.tuning.pruning.selection import Scores, Selection, full, select
from waterfill.tuning.pruning.structure import Structure
from waterfill.tuning.pruning.terms import First, Fisher, Mix, Second, Terms, Vector, magnitudes, random_scores

Importance = Literal["fisher", "taylor-first", "taylor-second", "taylor-mix", "taylor-vector", "l1", "l2", "random"]
TERMS: Mapping[Importance, type[Terms]] = MappingProxyType(
    {"fisher": Fisher, "taylor-first": First, "taylor-second": Second, "taylor-mix": Mix, "taylor-vector": Vector}
)
IMPORTANCES: tuple[Importance, ...] = (*TERMS, "l1", "l2", "random")
SCORING, TRYING = "scoring what may go", "trying to do without"


def score(
    checkpoint: Checkpoint,
    structure: Structure,
    model: Any,
    tokens: Tensor,
    importance: Importance,
    seed: int,
    progress: Progress | None = None,
) -> Scores:
    """Scores of all parts.

    Args:
        model: from `load_blockwise`.
        tokens: int64 `[sequences, length]`; a quarter of each only gives context.
        seed: of labels that are drawn, or of random scores.
    """

    def weights(tensor: ModelTensor) -> Tensor:
        return read_kept(checkpoint, tensor)

    if importance == "random":
        return random_scores(structure, seed)
    if importance in ("l1", "l2"):
        return magnitudes(structure, weights, int(importance[1:]))
    terms = TERMS[importance](structure, weights)
    matrices = [member.matrix for member in terms.members]
    lead, step = lead_of(tokens.shape[1]), step_of(progress, SCORING)
    parts = tokens.split(max(1, PASS_TOKENS // tokens.shape[1]))
    with trainable(model, matrices, "fisher"):
        for number, part in enumerate(parts):
            if step:
                step(number, len(parts))
            generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**64) if terms.sampled else None
            terms.begin(len(part), len(part) * (tokens.shape[1] - 1 - lead))
            gradient_pass(model, matrices, terms, part, generator, lead=lead)
    if step:
        step(len(parts), len(parts))
    return terms.scores()


def score_layers(
    structure: Structure, scores: Scores, model: Any, tokens: Tensor, progress: Progress | None = None
) -> Tensor:
    """KL without each layer alone, nats per token, float64 `[layers]`."""
    whole, layers = select(scores, full(structure.sizes)), structure.sizes.layers
    without = [_left_out(whole, layer) for layer in range(layers)]
    return torch.tensor(losses(structure, model, tokens, without, progress), dtype=torch.float64).mean(1)


def _left_out(selection: Selection, layer: int) -> Selection:
    def others(values: Sequence[Any]) -> tuple[Any, ...]:
        return (*values[:layer], *values[layer + 1 :])

    return Selection(others(selection.layers), others(selection.heads), others(selection.channels))


@torch.no_grad()
def losses(
    structure: Structure,
    model: Any,
    tokens: Tensor,
    selections: Sequence[Selection],
    progress: Progress | None = None,
) -> list[tuple[float, ...]]:
    """KL(model || pruned model) of each sequence, nats per token, by selection.

    Args:
        model: from `load_blockwise`.
        tokens: int64 `[sequences, length]`; a quarter of each only gives context.

    Raises:
        WaterfillError: logits are not finite.
    """
    lead, step = lead_of(tokens.shape[1]), step_of(progress, TRYING)
    parts = tokens.split(max(1, TRIAL_TOKENS // tokens.shape[1]))
    lost: list[tuple[float, ...]] = [() for _ in selections]
    done, total = 0, len(parts) * len(selections)
    for part in parts:
        reference = read(model, part)[:, lead:-1]
        for number, selection in enumerate(selections):
            if step:
                step(done, total)
            with without(structure, model, selection):
                other = read(model, part)[:, lead:-1]
            lost[number] += tuple(divergence(a, b) for a, b in zip(reference, other, strict=True))
            done += 1
    if step:
        step(total, total)
    return lost


@contextmanager
def without(structure: Structure, model: Any, selection: Selection) -> Iterator[None]:
    """Have the model compute as if what a selection leaves out were not there: columns of o and down are zero, and of
    layers that go their biases, too."""
    places = {layer: place for place, layer in enumerate(selection.layers)}
    outputs = {member.tensor.name: member for member in structure.weights if member.last}
    biases = {bias.name: member for member in outputs.values() if (bias := structure.bias(member)) is not None}

    def change(name: str, weight: Tensor, rows: Tensor | None) -> Tensor:
        member = outputs.get(name) or biases.get(name)
        if member is None:
            return weight
        place = places.get(member.layer)
        if place is None:
            return torch.zeros_like(weight)
        if name in biases:
            return weight
        kept = torch.zeros(weight.shape[1], dtype=weight.dtype)
        kept[member.places(selection.parts(place, member.kind))] = 1
        return weight * kept

    with exchanged(model, outputs.keys() | biases.keys(), change):
        yield
