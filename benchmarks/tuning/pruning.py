"""A model without a fifth of its layers' weights, by every importance, and beside quantisation at equal bytes.

Every importance sees the same tokens, the model's own text, and every selection becomes a checkpoint on disk. Numbers
of heads and channels are those that `waterfill prune` chooses. Some importances have further rows: with the same share
of both kinds, as LLM-Pruner has it, and with what stays fitted anew.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import waterfill
from benchmarks.shared.report import BenchmarkReport
from waterfill.evaluation.evaluate import Evaluation
from waterfill.files.architecture import Architecture, describe
from waterfill.files.checkpoint import Checkpoint, open_checkpoint
from waterfill.planning.measuring import measured_tokens
from waterfill.studies.own_text import OwnText
from waterfill.tuning.pruning.prune import MULTIPLE, TRIED_SEQUENCES
from waterfill.tuning.pruning.refitting import Refitted
from waterfill.tuning.pruning.scoring import (
    IMPORTANCES,
    Importance,
    losses,
    open_model,
    score,
    score_by_terms,
    score_layers,
)
from waterfill.tuning.pruning.selection import Scores, Selection, Shape, limit_of, nearest, select, shapes
from waterfill.tuning.pruning.structure import Structure, structure_of
from waterfill.tuning.pruning.writing import write

KEEP_SHARE = 0.8
SEQUENCES, LENGTH, QUICK_SEQUENCES = 24, 160, 4
CONTEXT, WINDOWS, QUICK_WINDOWS = 512, 8, 2
TAYLOR: tuple[Importance, ...] = ("taylor-first", "taylor-second", "taylor-mix", "taylor-vector")
LAYER_SEQUENCES = 2  # that layers are scored on, by doing without each
SHOWN = ("fisher", "taylor-first", "random")  # refitted as well, and with other numbers of parts
EQUAL_BITS, QUICK_EQUAL_BITS = (2.0, 3.0), (3.0,)  # of the whole model, for as many bytes
SHARES, QUICK_SHARES = (0.9, 0.8), (0.8,)  # that stay of the layers, before packing
PLAN: dict[str, Any] = {"feedback": "none"}


@dataclass(frozen=True)
class Subject:
    """A checkpoint under study, and the tokens that all importances see."""

    path: Path
    checkpoint: Checkpoint
    architecture: Architecture
    structure: Structure
    tokens: torch.Tensor  # to score and fit on
    tried: torch.Tensor  # to choose between shapes on
    text: Path
    windows: int
    quick: bool

    @cached_property
    def model(self) -> Any:
        return open_model(self.checkpoint, torch.float32)

    def scores(self, importance: Importance) -> Scores:
        return score(self.checkpoint, self.structure, self.model, self.tokens, importance, 0)

    @cached_property
    def fisher(self) -> Scores:
        return self.scores("fisher")

    def shapes(self, what: Any, share: float) -> list[Shape]:
        fits = limit_of(self.structure, share, None, lambda shape: 0)
        return shapes(self.structure, what, fits, MULTIPLE, None)

    def best(self, share: float) -> Selection:
        """As `waterfill prune` chooses."""
        selections = [select(self.fisher, shape) for shape in self.shapes("parts", share)]
        lost = losses(self.structure, self.model, self.tried, selections)
        return selections[min(range(len(selections)), key=lambda place: sum(lost[place]))]

    @contextmanager
    def written(self, selection: Selection, *, refit: bool) -> Iterator[Path]:
        options: dict[str, Any] = {}
        if refit:
            given = self.checkpoint, self.architecture, self.structure, selection, self.tokens, torch.float32
            options["weights"] = Refitted(*given)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "pruned"
            write(self.checkpoint, self.structure, selection, out, **options)
            yield out

    def loss(self, model: Path) -> Evaluation:
        return waterfill.evaluate(model, self.path, self.text, context=CONTEXT, max_windows=self.windows)


def opened(report: BenchmarkReport, path: Path, text: Path, sequences: int, windows: int, *, quick: bool) -> Subject:
    """A model, and its own text."""
    checkpoint = open_checkpoint(path)
    architecture = describe(checkpoint)
    options: Any = {"sequences": QUICK_SEQUENCES if quick else sequences, "length": LENGTH}
    with OwnText(checkpoint, architecture) as own:
        tokens = measured_tokens(checkpoint, architecture, None, options, write=own.sample)
    tried = min(TRIED_SEQUENCES, len(tokens) // 2)
    windows = QUICK_WINDOWS if quick else windows
    report.note(
        f"{path.name}: scored and fitted on {len(tokens) - tried} sequences of {LENGTH} tokens of its own text, "
        f"measured on {windows} windows of {CONTEXT}"
    )
    structure = structure_of(checkpoint)
    return Subject(path, checkpoint, architecture, structure, tokens[:-tried], tokens[-tried:], text, windows, quick)


def compare_importances(report: BenchmarkReport, subject: Subject) -> None:
    """All of them with the same numbers of parts; whole layers beside them."""
    name, structure = subject.path.name, subject.structure
    chosen = subject.best(KEEP_SHARE).shape
    proportional = nearest(structure.sizes, subject.shapes("parts", KEEP_SHARE))
    rows: list[list[Any]] = []
    kl: dict[str, float] = {}
    by_terms = score_by_terms(subject.checkpoint, structure, subject.model, subject.tokens, TAYLOR)
    for importance in IMPORTANCES:
        scores = by_terms.get(importance) or (subject.fisher if importance == "fisher" else subject.scores(importance))
        rows.append(_row(subject, importance, select(scores, chosen)))
        kl[importance] = rows[-1][6]
        if importance in SHOWN and proportional != chosen:
            rows.append(_row(subject, importance, select(scores, proportional)))
        if importance in SHOWN:
            rows.append(_row(subject, importance, select(scores, chosen), refit=True))
            kl[f"{importance}, refitted"] = rows[-1][6]
    by_loss = score_layers(structure, subject.fisher, subject.model, subject.tried[:LAYER_SEQUENCES])
    rows += [
        _row(subject, "layers", select(subject.fisher, shape, by_loss))
        for shape in subject.shapes("layers", KEEP_SHARE)
    ]
    columns = ["importance", "refitted", "layers", "KV heads", "channels", "share that stays", "KL", "±", "perplexity"]
    report.table(f"{name}: {1 - KEEP_SHARE:.0%} left out", [*columns, "original's"], rows, key=f"{name}_importances")
    _judge(report, name, kl)


def _judge(report: BenchmarkReport, name: str, kl: Mapping[str, float]) -> None:
    best = min(TAYLOR, key=lambda importance: kl[importance])
    ratios = {
        "random_over_worst_other": (kl["random"] / max(kl[each] for each in IMPORTANCES if each != "random"), ">= 1"),
        "fisher_over_best_taylor": (kl["fisher"] / kl[best], "<= 1"),
        "fisher_refitted_over_best_taylor": (kl["fisher, refitted"] / kl[best], "<= 1"),
    }
    for what, (ratio, goal) in ratios.items():
        report.criterion(f"{name}_{what}", round(ratio, 3), goal, ratio >= 1 if goal == ">= 1" else ratio <= 1)


def _row(subject: Subject, importance: str, selection: Selection, *, refit: bool = False) -> list[Any]:
    shape, sizes, weights = selection.shape, subject.structure.sizes, subject.structure.layer_weights
    whole = sizes.layers * weights(sizes.kv_heads, sizes.channels)
    share = shape.layers * weights(shape.kv_heads, shape.channels) / whole
    with subject.written(selection, refit=refit) as out:
        loss = subject.loss(out)
    figures = [loss.kl, loss.kl_stderr, loss.ppl, loss.ppl_reference]
    return [importance, "yes" if refit else "", *vars(shape).values(), round(share, 4), *figures]


def compare_with_bits(report: BenchmarkReport, subject: Subject) -> None:
    """The original packed, and pruned checkpoints, refitted, in the same bytes: as they are, and packed."""
    rates, shares = (QUICK_EQUAL_BITS, QUICK_SHARES) if subject.quick else (EQUAL_BITS, SHARES)
    name, rows = subject.path.name, []
    selections = {share: subject.best(share) for share in shares}
    for share, selection in selections.items():
        with subject.written(selection, refit=True) as out:
            size_bytes = (out / "model.safetensors").stat().st_size
            pruned = subject.loss(out).kl
        rows.append([size_bytes, "pruning alone", share, None, pruned])
        rows.append([size_bytes, "bits alone", 1.0, *_packed(subject, subject.path, size_bytes)])
    for bits in rates:
        size_bytes = waterfill.plan(subject.path, bits=bits, **PLAN).size_bytes
        alone = _packed(subject, subject.path, size_bytes)
        rows.append([size_bytes, "bits alone", 1.0, *alone])
        both = []
        for share, selection in selections.items():
            with subject.written(selection, refit=True) as out:
                both.append(_packed(subject, out, size_bytes))
            rows.append([size_bytes, "pruning and bits", share, *both[-1]])
        over = min(lost for _, lost in both) / alone[1]
        report.criterion(f"{name}_{bits:g}_pruned_over_bits_alone", round(over, 3), "<= 1", over <= 1)
    columns = ["bytes", "what", "share that stays", "bits per weight", "KL"]
    report.table(f"{name}: equal bytes", columns, rows, key=f"{name}_equal_bytes")


def _packed(subject: Subject, model: Path, size_bytes: int) -> tuple[float, float]:
    """Bits per weight within so many bytes, and KL to the original."""
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder) / "packed"
        plan = waterfill.pack(model, packed, size=size_bytes, **PLAN)
        loss = subject.loss(packed).kl
    assert loss is not None
    return plan.bits, loss
