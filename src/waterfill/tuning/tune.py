"""The verb: an artifact is trained on a text, and what was trained becomes an artifact or an adapter of its own.

text ──► windows ──► the teacher's predictions, on disk ──┐
artifact ──load──► scales, norms or an adapter ──train────┴──► OUT, with `waterfill-tuning.json`
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from waterfill.base.ambient import own_torch_modes
from waterfill.base.arguments import PATH, checked, choice, number, optional, whole
from waterfill.base.errors import WaterfillError
from waterfill.base.progress import LOADING, OPENING, READING, Progress, stage, step_of
from waterfill.base.records import Record
from waterfill.base.version import __version__
from waterfill.base.writing import flush
from waterfill.evaluation.on_text import agreed_ids
from waterfill.evaluation.store import EvaluationCache, ReferenceStore, evaluation_key
from waterfill.evaluation.subjects import CHECKPOINT, PACKED, CheckpointSubject, Subject, open_subject
from waterfill.files.artifact import check_target, open_artifact
from waterfill.running.loading import load
from waterfill.tuning.apiq import start_by_apiq
from waterfill.tuning.loftq import start_by_loftq
from waterfill.tuning.losses import distance_from, surprise
from waterfill.tuning.parts import Adapter, Norms, Scales
from waterfill.tuning.rewriting import TUNING_FILE, rewrite
from waterfill.tuning.texts import Lessons, lessons
from waterfill.tuning.training import Outcome, train

SCALES, NORMS, LORA = WHAT = ("scales", "norms", "lora")
DEFAULT, LOFTQ, APIQ = INITS = ("default", "loftq", "apiq")
NO_TEACHER = "none"
RATES = {SCALES: 1e-2, NORMS: 3e-3, LORA: 1e-3}  # of AdamW, where none is given
CONTEXT = 256  # tokens per window
KEPT = 64  # likeliest tokens of every position that are known of the teacher
APIQ_TOKENS = 16384  # that activations are compared on, at most
RATE = number("a number from 1e-9 to 1", lambda value: 1e-9 <= value <= 1)
SHARE = number("a number between 0 and 1", lambda value: 0 < value < 1)


@dataclass(frozen=True)
class Tuned(Record):
    """What training did. Losses are of the held-out windows, in nats per token."""

    path: Path
    what: str
    loss: str  # "kl", from the teacher, or "nll", of the next token
    before: float  # of the artifact as it was, with the adapter's start where there is one
    after: float  # of what was written
    best_step: int
    steps: int  # that were made
    size_bytes: int  # of the weight files of the new artifact, or of the adapter's weights

    def to_dict(self) -> dict[str, Any]:
        """The fields by name; the path as text."""
        return {**super().to_dict(), "path": str(self.path)}


@own_torch_modes()
@checked(
    what=choice(*WHAT),
    teacher=PATH,
    text=PATH,
    steps=whole(0),
    lr=optional(RATE),
    context=whole(8),
    rank=whole(1),
    alpha=optional(whole(1)),
    init=choice(*INITS),
    hold_out=SHARE,
)
def tune(
    artifact: str | Path,
    out: str | Path,
    *,
    text: str | Path,
    what: str = SCALES,
    teacher: str | Path = NO_TEACHER,
    steps: int = 200,
    lr: float | None = None,
    batch: int = 4,
    context: int | None = None,
    hold_out: float = 0.1,
    rank: int = 16,
    alpha: int | None = None,
    init: str = DEFAULT,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Tuned:
    """Train what an artifact leaves to be trained, its codes staying to the bit, and write that to `out`.

    Args:
        text: to train on; a share of it, `hold_out`, at its end is only looked at.
        what: scales or norms, for a new artifact, or lora, for an adapter in PEFT's format.
        teacher: the original model, or another one, whose predictions are to be met; "none": those of the text itself.
        steps: of AdamW at most, at a rate `lr`, by `batch` windows of `context` tokens each; it ends early where the
            held-out text gains nothing more, and what was best there is written.
        rank, alpha: of an adapter; alpha is the rank where not given.
        init: of an adapter: nothing at first ("default"), the nearest to what quantisation took from each weight
            ("loftq"), or what brings activations nearest to the original's ("apiq"); the latter two need the original
            as the teacher.

    Raises:
        WaterfillError: there is nothing of that kind to train; options do not go together; the text is too short, or
            the model and its teacher have different tokenizers.
    """
    target = Path(out)
    _check(target, what, str(teacher), init, overwrite)
    with stage(progress, OPENING):
        subject = open_subject(artifact)
        if subject.kind != PACKED:
            raise WaterfillError(f"{artifact} is no packed model; give a directory that `waterfill pack` wrote")
        source = None if str(teacher) == NO_TEACHER else open_subject(teacher)
    if init != DEFAULT and not (source is not None and source.kind == CHECKPOINT):
        raise WaterfillError(f"--init {init} needs the original model, not packed; give it as --teacher")
    with stage(progress, READING):
        ids = agreed_ids(subject, source, Path(text))
        cut = _cut(subject, ids, context, batch=batch, steps=steps, hold_out=hold_out, seed=seed)
    store = None if source is None else _predictions(source, ids, cut, progress)
    with stage(progress, LOADING):
        model = load(artifact, dtype=torch.float32, verify=False)
    if model.streaming is not None and what == SCALES:
        raise WaterfillError(f"{artifact} does not fit in memory, where its scales would be trained; train an adapter")
    stored = open_artifact(Path(artifact), verify=False)
    part: Scales | Norms | Adapter
    if what == LORA:
        part = Adapter(model, rank=rank, alpha=alpha or rank, seed=seed)
        if init != DEFAULT:
            assert isinstance(source, CheckpointSubject)
            _start(part, init, model, source, cut, rank, progress)
    else:
        part = Scales(model) if what == SCALES else Norms(model, stored.tensors)
    loss = surprise if store is None else distance_from(store)
    outcome = train(model, part, cut, loss, rate=lr or RATES[what], progress=progress)
    record = {
        "waterfill": __version__,
        "artifact": subject.fingerprint,
        "what": what,
        "teacher": None if source is None else source.fingerprint,
        "text": evaluation_key(ids, cut.how),
        "batch": batch,
        "context": cut.how.context,
        "hold_out": hold_out,
        "lr": lr or RATES[what],
        "seed": seed,
        "steps": steps,
        **({"rank": rank, "alpha": alpha or rank, "init": init} if what == LORA else {}),
        "loss": "nll" if store is None else "kl",
        "steps_made": outcome.steps,
        "best_step": outcome.best_step,
        "before": outcome.before,
        "after": outcome.after,
        "looks": outcome.looks,
    }
    note = {TUNING_FILE: (json.dumps(record, indent=1) + "\n").encode()}
    if isinstance(part, Adapter):
        size_bytes = part.size_bytes
        _write_adapter(part, target, str(artifact), note)
    else:
        rewrite(stored, target, part.changed(stored.tensors), note, overwrite=overwrite, progress=progress)
        size_bytes = open_artifact(target, verify=False).size_bytes
    return _tuned(target, record, outcome, size_bytes)


def _check(out: Path, what: str, teacher: str, init: str, overwrite: bool) -> None:
    """Refuse what cannot be, before anything long."""
    if init != DEFAULT and what != LORA:
        raise WaterfillError(f"--init {init} is a start of adapters; leave it out, or give --what {LORA}")
    if init != DEFAULT and teacher == NO_TEACHER:
        raise WaterfillError(f"--init {init} needs the original model; give it as --teacher")
    if what == LORA:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise WaterfillError(f"{out} exists already, and adapters are not overwritten; give another output")
    else:
        check_target(out, overwrite)


def _cut(subject: Subject, ids: torch.Tensor, context: int | None, **how: Any) -> Lessons:
    limit = subject.positions
    if context is not None and limit is not None and context > limit:
        raise WaterfillError(f"a context of {context} tokens was asked for, but the model has {limit}; choose fewer")
    return lessons(ids, context=context or min(CONTEXT, limit or CONTEXT), **how)


def _predictions(source: Subject, ids: torch.Tensor, cut: Lessons, progress: Progress | None) -> ReferenceStore:
    """The teacher's, of every window that is read: on disk from an earlier time, or computed now."""
    dtype = source.dtype()
    key = evaluation_key(ids, cut.how, torch.__version__, source.fingerprint, str(dtype), f"the likeliest {KEPT}")
    store = EvaluationCache.default().reference(key, KEPT)
    if not store.complete(cut.windows):
        with stage(progress, LOADING):
            teacher = source.load(dtype)
        if not store.fill(teacher, cut.windows, cut.how, progress=step_of(progress, "reading the teacher")):
            raise WaterfillError(
                "the teacher's predictions have no place on disk; free some space, or train with fewer steps"
            )
        del teacher
        gc.collect()  # it goes before the model comes
    return store


def _start(
    adapter: Adapter,
    init: str,
    model: Any,
    source: CheckpointSubject,
    cut: Lessons,
    rank: int,
    progress: Progress | None,
) -> None:
    if init == LOFTQ:
        start_by_loftq(adapter, source.checkpoint, rank, progress)
        return
    with stage(progress, LOADING):
        original = source.load(torch.float32)
    texts = [window.ids for window in cut.seen[: max(1, APIQ_TOKENS // cut.how.context)]]
    start_by_apiq(adapter, model, original, texts, rank, progress)


def _write_adapter(adapter: Adapter, out: Path, base: str, files: Mapping[str, bytes]) -> None:
    """Beside its place, and renamed."""
    partial = out.with_name(f"{out.name}.partial")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.parent.mkdir(parents=True, exist_ok=True)
        adapter.save(partial, base)
        for name, content in files.items():
            (partial / name).write_bytes(content)
        for file in partial.iterdir():
            flush(file)
        if out.exists():
            out.rmdir()  # it is empty
        partial.rename(out)
    except OSError as error:
        raise WaterfillError(
            f"cannot write {out} ({error.strerror or error}); free some space, or name another"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _tuned(path: Path, record: Mapping[str, Any], outcome: Outcome, size_bytes: int) -> Tuned:
    return Tuned(
        path,
        record["what"],
        record["loss"],
        outcome.before,
        outcome.after,
        outcome.best_step,
        outcome.steps,
        size_bytes,
    )
