"""A model without a fifth of its layers' weights, by every importance, and beside quantisation at equal bytes.

Every importance sees the same tokens, the model's own text, and every selection becomes a checkpoint on disk. Numbers of
heads and channels are those that `waterfill prune` chooses (`fisher`), and where it does as others, those of the same
share of both kinds, as LLM-Pruner has it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
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
from waterfill.tuning.pruning.scoring import IMPORTANCES, Importance, losses, open_model, score, score_layers
from waterfill.tuning.pruning.selection import Scores, Selection, Shape, limit_of, nearest, select, shapes
from waterfill.tuning.pruning.structure import Structure, structure_of
from waterfill.tuning.pruning.writing import write

KEEP_SHARE = 0.8
SEQUENCES, LENGTH, QUICK_SEQUENCES = 24, 160, 4
CONTEXT, WINDOWS, QUICK_WINDOWS = 512, 8, 2
TAYLOR: tuple[Importance, ...] = ("taylor-first", "taylor-second", "taylor-mix", "taylor-vector")
EQUAL_BITS, QUICK_EQUAL_BITS = (2.5, 3.5), (3.0,)  # of the whole model, for as many bytes
SHARES, QUICK_SHARES = (0.9, 0.8), (0.8,)  # that stay of the layers, before packing
PLAN: dict[str, Any] = {"feedback": "none"}


@dataclass(frozen=True)
class Subject:
    """A checkpoint under study, and the tokens that all importances see."""

    path: Path
    checkpoint: Checkpoint
    architecture: Architecture
    structure: Structure
    tokens: torch.Tensor
    text: Path
    windows: int

    @cached_property
    def model(self) -> Any:
        return open_model(self.checkpoint, torch.float32)

    def shapes(self, what: Any, share: float) -> list[Shape]:
        fits = limit_of(self.structure, share, None, lambda shape: 0)
        return shapes(self.structure, what, fits, MULTIPLE, None)

    def best(self, scores: Scores, share: float) -> Selection:
        """As `waterfill prune` chooses."""
        selections = [select(scores, shape) for shape in self.shapes("parts", share)]
        lost = losses(self.structure, self.model, self.tokens[:TRIED_SEQUENCES], selections)
        return selections[min(range(len(selections)), key=lambda place: sum(lost[place]))]

    @contextmanager
    def written(self, selection: Selection) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "pruned"
            write(self.checkpoint, self.structure, selection, out)
            yield out

    def loss(self, model: Path) -> Evaluation:
        return waterfill.evaluate(model, self.path, self.text, context=CONTEXT, max_windows=self.windows)


def measure_pruning(report: BenchmarkReport, path: Path, text: Path, quick: bool) -> None:
    """One model."""
    checkpoint = open_checkpoint(path)
    architecture = describe(checkpoint)
    options: Any = {"sequences": QUICK_SEQUENCES if quick else SEQUENCES, "length": LENGTH}
    with OwnText(checkpoint, architecture) as own:
        tokens = measured_tokens(checkpoint, architecture, None, options, write=own.sample)
    windows = QUICK_WINDOWS if quick else WINDOWS
    subject = Subject(path, checkpoint, architecture, structure_of(checkpoint), tokens, text, windows)
    report.note(f"{path.name}: scored on {len(tokens)} sequences of {LENGTH} tokens of its own text")
    fisher = score(checkpoint, subject.structure, subject.model, tokens, "fisher", 0)
    compare_importances(report, subject, fisher)
    compare_with_bits(
        report, subject, fisher, QUICK_EQUAL_BITS if quick else EQUAL_BITS, QUICK_SHARES if quick else SHARES
    )


def compare_importances(report: BenchmarkReport, subject: Subject, fisher: Scores) -> None:
    """All of them with the same numbers of parts; whole layers beside them."""
    name, structure = subject.path.name, subject.structure
    chosen = subject.best(fisher, KEEP_SHARE).shape
    proportional = nearest(structure.sizes, subject.shapes("parts", KEEP_SHARE))
    rows: list[list[Any]] = []
    kl: dict[Shape, dict[str, float]] = {}
    for importance in IMPORTANCES:
        if importance == "fisher":
            scores = fisher
        else:
            scores = score(subject.checkpoint, structure, subject.model, subject.tokens, importance, 0)
        for shape in dict.fromkeys((chosen, proportional)):
            row = _row(subject, importance, select(scores, shape))
            kl.setdefault(shape, {})[importance] = row[5]
            rows.append(row)
    by_loss = score_layers(structure, fisher, subject.model, subject.tokens[:TRIED_SEQUENCES])
    rows += [_row(subject, "layers", select(fisher, shape, by_loss)) for shape in subject.shapes("layers", KEEP_SHARE)]
    columns = [
        "importance",
        "layers",
        "KV heads",
        "channels",
        "share that stays",
        "KL",
        "±",
        "perplexity",
        "original's",
    ]
    report.table(f"{name}: {1 - KEEP_SHARE:.0%} left out", columns, rows, key=f"{name}_importances")
    _judge(report, name, kl[chosen])


def _judge(report: BenchmarkReport, name: str, kl: Mapping[str, float]) -> None:
    others = {importance: lost for importance, lost in kl.items() if importance != "random"}
    over = kl["random"] / max(others.values())
    report.criterion(f"{name}_random_over_worst_other", round(over, 3), ">= 1", over >= 1)
    over = kl["fisher"] / min(kl[importance] for importance in TAYLOR)
    report.criterion(f"{name}_fisher_over_best_taylor", round(over, 3), "<= 1", over <= 1)


def _row(subject: Subject, importance: str, selection: Selection) -> list[Any]:
    shape, sizes, weights = selection.shape, subject.structure.sizes, subject.structure.layer_weights
    whole = sizes.layers * weights(sizes.kv_heads, sizes.channels)
    share = shape.layers * weights(shape.kv_heads, shape.channels) / whole
    with subject.written(selection) as out:
        loss = subject.loss(out)
    figures = [loss.kl, loss.kl_stderr, loss.ppl, loss.ppl_reference]
    return [importance, shape.layers, shape.kv_heads, shape.channels, round(share, 4), *figures]


def compare_with_bits(
    report: BenchmarkReport, subject: Subject, fisher: Scores, rates: Sequence[float], shares: Sequence[float]
) -> None:
    """The original packed, and pruned checkpoints in the same bytes: as they are, and packed."""
    name, rows = subject.path.name, []
    selections = {share: subject.best(fisher, share) for share in shares}
    for share, selection in selections.items():
        with subject.written(selection) as out:
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
            with subject.written(selection) as out:
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
