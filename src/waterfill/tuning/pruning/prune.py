"""`waterfill prune`: a checkpoint becomes a smaller checkpoint of the same class.

checkpoint ──► structure ──► scores of parts ──► shapes within the target ──► the best, tried ──► written
                  own text, or another ──┴───────────────────────────────────────┘
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import fsum
from pathlib import Path
from typing import Any, TypedDict, cast

import torch

from waterfill.base.arguments import FLAG, Check, choice, is_real, optional, whole
from waterfill.base.errors import BudgetError, WaterfillError
from waterfill.base.progress import LOADING, Progress, stage
from waterfill.files.architecture import Architecture
from waterfill.files.checkpoint import Checkpoint, open_checkpoint
from waterfill.planning.ancestral import Writer
from waterfill.planning.budget import parse_size
from waterfill.planning.measuring import measured_tokens
from waterfill.planning.options import ProbeOptions
from waterfill.planning.pace import fast_dtype
from waterfill.tuning.pruning.refitting import Refitted
from waterfill.tuning.pruning.scoring import IMPORTANCES, Importance, loss_of, losses, open_model, score, score_layers
from waterfill.tuning.pruning.selection import (
    WHATS,
    Scores,
    Selection,
    Shape,
    What,
    check_target,
    full,
    limit_of,
    lost,
    nearest,
    select,
    shapes,
)
from waterfill.tuning.pruning.structure import Structure, structure_of
from waterfill.tuning.pruning.writing import Weights, check_out, lay_out, unchanged, write

MULTIPLE = 32  # of the number of channels: what kernels take at a time
SEQUENCES = 48  # of own text, as many as a plan would have at most
TRIED_SEQUENCES = 8  # that nothing is scored or fitted on
LEAST_SEQUENCES = 4
TRIED_SHAPES = 3  # of those that are predicted to lose least


class PruneOptions(TypedDict, total=False):
    """What pruning is asked for: exactly one of keep_share and size; the rest has defaults."""

    keep_share: float | None  # of the weights of the decoder layers
    size: str | float | None  # bytes of all weight files, or "2.5GB"
    what: What
    importance: Importance
    multiple: int  # of the number of channels
    kv_heads: int | None  # in every layer, where it is not to be chosen
    refit: bool  # whether what stays is fitted to do what went did
    text: str | Path | None  # to measure on, instead of the model's own
    sequences: int
    length: int
    seed: int
    cache: bool  # whether own text is kept on disk, and used again
    revision: str | None


PRUNE_CHECKS = {
    "keep_share": optional(Check("a share above 0 and below 1", is_real)),
    "what": choice(*WHATS),
    "importance": choice(*IMPORTANCES),
    "multiple": whole(1),
    "kv_heads": optional(whole(1)),
    "refit": FLAG,
    "sequences": whole(LEAST_SEQUENCES),
}


@dataclass(frozen=True)
class Dropped:
    """What one layer of the original loses."""

    layer: int
    whole: bool  # all of it
    kv_heads: tuple[int, ...]  # numbers of them, and with each its query heads
    heads: tuple[int, ...]
    channels: int  # how many


@dataclass(frozen=True)
class Pruned:
    """What was left out, and what that is predicted to cost."""

    path: Path
    model: str
    what: What
    importance: Importance
    refit: bool
    kl: float  # nats per token, of what was written, on sequences that nothing was scored or fitted on
    kl_stderr: float
    estimated: float | None  # the sum of what single parts lose, where scores are losses
    before: Shape
    after: Shape
    layer_weights_before: int  # of all decoder layers
    layer_weights_after: int
    size_bytes_before: int  # of all weight files
    size_bytes_after: int
    dropped: tuple[Dropped, ...]  # by layer

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


def check(out: Path, options: PruneOptions) -> int | None:
    """Refuse what cannot be meant, before a model is opened; bytes that are asked for.

    Raises:
        WaterfillError: not one target, or one that is none; `out` exists already.
    """
    share, size = options.get("keep_share"), options.get("size")
    check_target(share, size)
    if options.get("kv_heads") is not None and options.get("what", "parts") in ("channels", "layers"):
        raise BudgetError(f"--kv-heads and --what {options['what']} do not go together; leave one of them out")
    size_bytes = None if size is None else parse_size(size)
    check_out(out)
    return size_bytes


def prune_checkpoint(
    checkpoint: Checkpoint,
    architecture: Architecture,
    out: Path,
    progress: Progress | None = None,
    options: PruneOptions | None = None,
    *,
    write_text: Writer | None = None,
) -> Pruned:
    """Write a smaller checkpoint into `out`.

    Args:
        write_text: own text; transformers samples it when None.

    Raises:
        WaterfillError: a family, target, text or output that will not do.
    """
    given = options or {}
    size_bytes = check(out, given)
    structure = structure_of(checkpoint)
    found = _shapes(structure, given, size_bytes)
    tokens = _tokens(checkpoint, architecture, progress, given, write_text)
    tried, tokens = _divided(tokens)
    dtype = fast_dtype(architecture.matrices)
    with stage(progress, LOADING):
        model = open_model(checkpoint, dtype)
    importance = given.get("importance", IMPORTANCES[0])
    scores = score(checkpoint, structure, model, tokens, importance, given.get("seed", 0), progress)
    selections = _selections(structure, scores, found, given, model, tried, progress)
    selection = selections[0]
    if len(selections) > 1:
        of_selections = losses(structure, model, tried, selections, progress)
        selection = selections[min(range(len(selections)), key=lambda place: fsum(of_selections[place]))]
    weights: Weights = unchanged
    if given.get("refit", False):
        weights = Refitted(checkpoint, architecture, structure, selection, tokens, dtype, progress)
    size_after = write(checkpoint, structure, selection, out, progress, weights=weights)
    del weights  # and the moments that it holds
    of_sequences = loss_of(model, open_model(open_checkpoint(out), dtype), tried, progress)
    estimated = lost(scores, selection) if scores.nats and given.get("what") != "layers" else None
    return _record(checkpoint, structure, selection, out, given, of_sequences, estimated, size_after)


def _shapes(structure: Structure, options: PruneOptions, size_bytes: int | None) -> list[Shape]:
    fits = limit_of(
        structure,
        options.get("keep_share"),
        size_bytes,
        lambda shape: lay_out(structure, tuple(range(shape.layers)), shape).size_bytes,
    )
    what, multiple = options.get("what", "parts"), options.get("multiple", MULTIPLE)
    return shapes(structure, what, fits, multiple, options.get("kv_heads"))


def _tokens(
    checkpoint: Checkpoint,
    architecture: Architecture,
    progress: Progress | None,
    options: PruneOptions,
    write_text: Writer | None,
) -> torch.Tensor:
    """int64 `[sequences, length]`."""
    names = ("text", "sequences", "length", "seed", "cache")
    probing = {key: value for key, value in options.items() if key in names and value is not None}
    if "text" not in probing:
        probing.setdefault("sequences", SEQUENCES)
    tokens = measured_tokens(checkpoint, architecture, progress, cast(ProbeOptions, probing), write=write_text)
    if len(tokens) < LEAST_SEQUENCES:
        raise WaterfillError(
            f"{options.get('text')} holds {len(tokens)} sequences of {tokens.shape[1]} tokens, of which pruning needs "
            f"{LEAST_SEQUENCES}; give a longer text, or shorter sequences (--length)"
        )
    return tokens


def _selections(
    structure: Structure,
    scores: Scores,
    found: Sequence[Shape],
    options: PruneOptions,
    model: Any,
    tried: torch.Tensor,
    progress: Progress | None,
) -> list[Selection]:
    """Those that are worth trying: of several shapes where scores are losses, else of the one that takes the same share
    of both kinds."""
    if options.get("what") == "layers":
        by_loss = score_layers(structure, scores, model, tried, progress) if scores.nats else None
        return [select(scores, shape, by_loss) for shape in found]
    if not scores.nats:
        return [select(scores, nearest(structure.sizes, found))]
    selections = [select(scores, shape) for shape in found]
    return sorted(selections, key=lambda selection: lost(scores, selection))[:TRIED_SHAPES]


def _divided(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences that what is made is tried on, and others that it is made by."""
    tried = min(TRIED_SEQUENCES, len(tokens) // 2)
    return tokens[-tried:], tokens[:-tried]


def _record(
    checkpoint: Checkpoint,
    structure: Structure,
    selection: Selection,
    out: Path,
    options: PruneOptions,
    of_sequences: tuple[float, ...],
    estimated: float | None,
    size_after: int,
) -> Pruned:
    before, after = full(structure.sizes), selection.shape
    lost_kl = torch.tensor(of_sequences, dtype=torch.float64)
    return Pruned(
        path=out,
        model=checkpoint.path.name,
        what=options.get("what", "parts"),
        importance=options.get("importance", IMPORTANCES[0]),
        refit=options.get("refit", False),
        kl=float(lost_kl.mean()),
        kl_stderr=float(lost_kl.std() / len(lost_kl) ** 0.5),
        estimated=estimated,
        before=before,
        after=after,
        layer_weights_before=before.layers * structure.layer_weights(before.kv_heads, before.channels),
        layer_weights_after=after.layers * structure.layer_weights(after.kv_heads, after.channels),
        size_bytes_before=lay_out(structure, tuple(range(before.layers)), before).size_bytes,
        size_bytes_after=size_after,
        dropped=tuple(_dropped(structure, selection)),
    )


def _dropped(structure: Structure, selection: Selection) -> list[Dropped]:
    sizes, places = structure.sizes, {layer: place for place, layer in enumerate(selection.layers)}
    found = []
    for layer in range(sizes.layers):
        place = places.get(layer)
        kept = set() if place is None else set(selection.heads[place])
        groups = tuple(group for group in range(sizes.kv_heads) if group not in kept)
        heads = tuple(group * sizes.repeats + number for group in groups for number in range(sizes.repeats))
        channels = sizes.channels - (0 if place is None else len(selection.channels[place]))
        found.append(Dropped(layer, place is None, groups, heads, channels))
    return found
