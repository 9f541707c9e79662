"""From sequences to scores of parts, and what a selection loses: passes of a model that is read block by block.

tokens ──► passes ──► terms ──► Scores
       └─► passes without what a selection leaves out ──► KL of each sequence
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import torch
import transformers
from torch import Tensor

from waterfill.base.errors import WaterfillError
from waterfill.base.progress import Progress, step_of
from waterfill.files.architecture import read_kept
from waterfill.files.blockwise import Consume, load_blockwise
from waterfill.files.checkpoint import Checkpoint
from waterfill.files.model_calls import read
from waterfill.files.skeleton import ModelTensor
from waterfill.planning.disturbance import divergence
from waterfill.planning.estimators import KEPT_BYTES, sampled_score
from waterfill.planning.measuring import TRIAL_TOKENS
from waterfill.planning.probe import lead_of
from waterfill.tuning.pruning.effects import Effects
from waterfill.tuning.pruning.selection import Scores, Selection, full, select
from waterfill.tuning.pruning.structure import Structure
from waterfill.tuning.pruning.terms import First, Mix, Second, Terms, Vector, magnitudes, random_scores

Importance = Literal["fisher", "taylor-first", "taylor-second", "taylor-mix", "taylor-vector", "l1", "l2", "random"]
TERMS: Mapping[Importance, type[Terms]] = MappingProxyType(
    {"taylor-first": First, "taylor-second": Second, "taylor-mix": Mix, "taylor-vector": Vector}
)
IMPORTANCES: tuple[Importance, ...] = ("fisher", *TERMS, "l1", "l2", "random")
SCORING, TRYING = "scoring what may go", "trying to do without"


def open_model(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The model, read block by block.

    Raises:
        WaterfillError: its class, in the transformers that is installed, does not run so.
    """
    model = load_blockwise(checkpoint, dtype)
    if model.blockwise is None:
        raise WaterfillError(
            f"{type(model).__name__} of transformers {transformers.__version__} does not run block by block, which "
            "pruning asks for; use another version of transformers"
        )
    return model


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
        model: from `open_model`.
        tokens: int64 `[sequences, length]`; a quarter of each only gives context.
        seed: of labels that are drawn, or of random scores.
    """

    def weights(tensor: ModelTensor) -> Tensor:
        return read_kept(checkpoint, tensor)

    if importance == "random":
        return random_scores(structure, seed)
    if importance in ("l1", "l2"):
        return magnitudes(structure, weights, int(importance[1:]))
    if importance == "fisher":
        return _effects(structure, model, tokens, seed, progress)
    return score_by_terms(checkpoint, structure, model, tokens, [importance], progress)[importance]


def _effects(structure: Structure, model: Any, tokens: Tensor, seed: int, progress: Progress | None) -> Scores:
    effects, lead = Effects(structure), lead_of(tokens.shape[1])
    with effects.watched(model):
        for number, sequence in enumerate(_told(tokens, progress)):
            generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**64)
            _pass(model, sequence[None], lead, generator)
    return effects.scores(len(tokens) * (tokens.shape[1] - 1 - lead))


def score_by_terms(
    checkpoint: Checkpoint,
    structure: Structure,
    model: Any,
    tokens: Tensor,
    importances: Sequence[Importance],
    progress: Progress | None = None,
) -> dict[Importance, Scores]:
    """The same by some of `TERMS`, from the same passes."""
    terms = {each: TERMS[each](structure, lambda tensor: read_kept(checkpoint, tensor)) for each in importances}
    lead = lead_of(tokens.shape[1])

    def add(name: str, weight: Tensor, gradient: Tensor, sign: int) -> None:
        for each in terms.values():
            each.add(name, weight, gradient, sign)

    for sequence in _told(tokens, progress):
        for each in terms.values():
            each.begin(tokens.shape[1] - 1 - lead)
        _pass(model, sequence[None], lead, wanted=structure.members.keys(), consume=add)
    return {importance: each.scores() for importance, each in terms.items()}


def _told(tokens: Tensor, progress: Progress | None) -> Iterator[Tensor]:
    """Each sequence, and how far that is."""
    step = step_of(progress, SCORING)
    for number, sequence in enumerate(tokens):
        if step:
            step(number, len(tokens))
        yield sequence
    if step:
        step(len(tokens), len(tokens))


def _pass(
    model: Any,
    part: Tensor,
    lead: int,
    generator: torch.Generator | None = None,
    *,
    wanted: Set[str] = frozenset(),
    consume: Consume | None = None,
) -> None:
    """One pass and its way back, from the log-probability of labels: drawn ones, or the tokens without a generator."""
    with model.blockwise.gradients(wanted, consume or _unasked, kept_bytes=KEPT_BYTES):
        logits = read(model, part)
        slope, _ = sampled_score(logits.detach(), part, generator, lead)
        logits.backward(slope)


def _unasked(name: str, weight: Tensor, gradient: Tensor, sign: int) -> None:
    raise AssertionError(f"nobody asked for the gradient of {name}")


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
    """KL(model || model without what goes) of each sequence, nats per token, by selection.

    Args:
        model: from `open_model`.
        tokens: int64 `[sequences, length]`; a quarter of each only gives context.

    Raises:
        WaterfillError: logits are not finite.
    """
    others = [partial(_read_without, structure, model, selection) for selection in selections]
    return _losses(model, tokens, others, progress)


@torch.no_grad()
def loss_of(model: Any, pruned: Any, tokens: Tensor, progress: Progress | None = None) -> tuple[float, ...]:
    """KL(model || pruned model) of each sequence, nats per token; as `losses`, of a model that has been written."""
    return _losses(model, tokens, [partial(read, pruned)], progress)[0]


def _losses(
    model: Any, tokens: Tensor, others: Sequence[Callable[[Tensor], Tensor]], progress: Progress | None
) -> list[tuple[float, ...]]:
    lead, step = lead_of(tokens.shape[1]), step_of(progress, TRYING)
    parts = tokens.split(max(1, TRIAL_TOKENS // tokens.shape[1]))
    lost: list[tuple[float, ...]] = [() for _ in others]
    done, total = 0, len(parts) * len(others)
    for part in parts:
        reference = read(model, part)[:, lead:-1]
        for number, other in enumerate(others):
            if step:
                step(done, total)
            logits = other(part)[:, lead:-1]
            lost[number] += tuple(divergence(a, b) for a, b in zip(reference, logits, strict=True))
            done += 1
    if step:
        step(total, total)
    return lost


def _read_without(structure: Structure, model: Any, selection: Selection, part: Tensor) -> Tensor:
    with without(structure, model, selection):
        return read(model, part)


@contextmanager
def without(structure: Structure, model: Any, selection: Selection) -> Iterator[None]:
    """Have the model compute as if what a selection leaves out were not there: columns of o and down are zero, and of
    layers that go their biases, too."""
    places = {layer: place for place, layer in enumerate(selection.layers)}

    def change(name: str, weight: Tensor, rows: Tensor | None) -> Tensor:
        if name not in structure.outputs:
            return weight
        place, member = places.get(structure.outputs[name]), structure.members.get(name)
        if place is None:
            return torch.zeros_like(weight)
        if member is None:  # a bias of the hidden state
            return weight
        kept = torch.zeros(weight.shape[1], dtype=weight.dtype)
        kept[member.places(selection.parts(place, member.kind))] = 1
        return weight * kept

    with model.blockwise.changed(change):
        yield
