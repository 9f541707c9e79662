"""The verb `evaluate`: a model on disk, measured on a text, on tasks, and for what it takes to run it.

open_subject ──► text: tokens ──► reference's predictions (stored, or live) ──► divergence   beside the prediction
                             └──► perplexity, where there is no reference
             ──► tasks (lm-evaluation-harness)     ──► efficiency (processes of their own)
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from waterfill.base import native, process
from waterfill.base.ambient import own_torch_modes
from waterfill.base.arguments import checked, choice
from waterfill.base.errors import MemoryLimitError, WaterfillError
from waterfill.base.native import FLOAT_ACTIVATIONS
from waterfill.base.progress import Progress, Step, step_of
from waterfill.base.version import __version__
from waterfill.evaluation import (
    Cache,
    Convention,
    Divergence,
    KldFile,
    Perplexity,
    Record,
    ReferenceStore,
    begin_token,
    convention,
    divergence,
    evaluation_key,
    perplexity,
    token_ids,
)
from waterfill.evaluation.conventions import CONVENTIONS
from waterfill.evaluation.divergence import COLUMNS as DIVERGENCE_COLUMNS
from waterfill.evaluation.efficiency import Efficiency
from waterfill.evaluation.efficiency import efficiency as run_efficiency
from waterfill.evaluation.journal import Journal
from waterfill.evaluation.local_tasks import SUFFIX as TASK_SUFFIX
from waterfill.evaluation.perplexity import COLUMNS as PERPLEXITY_COLUMNS
from waterfill.evaluation.subjects import CHECKPOINT, GGUF, PACKED, Subject, open_subject
from waterfill.evaluation.tasks import EFFICIENCY, TaskResults, names_of, run_tasks, task_specs
from waterfill.planning.plan import PLAN_FILE, read_plan
from waterfill.running.streaming.fit import memory_bytes

_convention = convention  # `evaluate` has a parameter of that name

TOKENISING_BYTES = 200  # of memory for a byte of text; 160 to 171 are measured
KLD_SUFFIX = ".kld"


@dataclass(frozen=True)
class Evaluation(Record):
    """What was measured of a model; None for what was not asked for."""

    size_bytes: int  # of the weight files
    ppl: float | None = None
    ppl_reference: float | None = None
    kl: float | None = None  # KL(reference || model), nats per token
    kl_stderr: float | None = None
    top1_agreement: float | None = None
    predicted_kl: float | None = None  # by the plan of a packed model
    predicted_low: float | None = None
    predicted_high: float | None = None
    context: int | None = None  # tokens per window
    tokens: int | None = None  # scored
    divergence: Divergence | None = None
    perplexity: Perplexity | None = None  # without a reference
    tasks: TaskResults | None = None
    tasks_reference: TaskResults | None = None
    efficiency: Efficiency | None = None


@own_torch_modes()
@checked(convention=choice(*CONVENTIONS))
def evaluate(
    model: str | Path,
    against: str | Path | None = None,
    text: str | Path | None = None,
    *,
    context: int | None = None,
    convention: str = "gptq",
    stride: int | None = None,
    max_windows: int | None = None,
    batch: int = 1,
    memory: str | float | None = None,
    cache: bool = True,
    tasks: str | Sequence[str] = (),
    shots: int | None = None,
    limit: int | None = None,
    chat_template: bool = False,
    efficiency: bool = False,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure an artifact, a checkpoint (directory or hub id) or a GGUF file.

    Args:
        against: the model that it was packed from: KL divergence, top-1 agreement and both perplexities, beside the
            prediction, and its own scores in the tasks. Also a file of `llama-perplexity --kl-divergence-base`, which
            has its text in it.
        text: file to measure on.
        context: tokens per window; the convention's own, or the model's positions, if that is less, when None.
        convention: "gptq", "strided", "llama.cpp" or "decode".
        stride: tokens between windows, in the convention "strided".
        max_windows: measure on the first windows only.
        batch: windows, or questions, at a time.
        memory: what the process may take in all, as for `load`. A reference that is no artifact cannot be streamed: it
            has to fit for as long as its predictions are computed, which is before the model is loaded.
        cache: keep the reference's predictions on disk for the next time, and continue an interrupted run.
        tasks: names of lm-eval, presets ("knowledge", "alignment", "efficiency"), files of JSON lines.
        shots: examples before each question; the task's own number when None.
        limit: ask only the first questions of each task.
        chat_template: put questions into the model's chat template.
        efficiency: measure memory and speed, with `prompt_tokens` read and `new_tokens` written.
        revision: branch, tag or commit of a hub model.

    Raises:
        WaterfillError: a bad model, text or option, or two models that do not go together.
    """
    names = names_of(tasks)
    if not names and tasks not in ((), []):
        raise WaterfillError(f"tasks is {tasks!r}, which names none; give names, presets or files of JSON lines")
    efficiency = efficiency or EFFICIENCY in names
    specs = task_specs(names)
    if text is None and not specs and not efficiency and not _is_kld(against):
        raise WaterfillError(
            "there is nothing to measure; give a text, tasks or efficiency (--text, --tasks, --efficiency)"
        )
    subject = open_subject(model, revision=revision, memory=memory)
    run = _Run(Cache.default() if cache else None, batch, progress)
    reference = None if against is None or _is_kld(against) else open_subject(against, revision=revision, memory=memory)
    if revision is not None and reference is None and subject.kind != CHECKPOINT:
        raise WaterfillError(f"{model} has no revision {revision!r}, only a hub model has; leave the revision out")
    measured = Evaluation(size_bytes=subject.size_bytes)
    if _is_kld(against):
        if text is not None:
            raise WaterfillError(f"{against} has its text in it; leave out the other one")
        file = KldFile(Path(str(against)))
        measured = _compared(subject, _against_file(subject, file, max_windows, run))
    elif text is not None:
        _check_room(Path(text), memory)
        ids = _ids(subject, reference, Path(text))  # before minutes of loading
        how = _how(reference or subject, convention, context, stride)
        if max_windows is not None:
            ids = how.first_windows(ids, max_windows)
        for each in (subject, reference or subject):
            each.logits = batch * how.context
        measured = _on_text(subject, reference, ids, how, run)
    if specs:
        options = {"shots": shots, "limit": limit, "chat_template": chat_template}
        dtype = _dtype(subject, reference)
        asked, original = (
            None if each is None else _tasks(each, dtype, names, specs, run, **options) for each in (subject, reference)
        )
        measured = replace(measured, tasks=asked, tasks_reference=original)
    if efficiency:
        measured = replace(
            measured,
            efficiency=run_efficiency(
                model,
                prompt_tokens=prompt_tokens,
                new_tokens=new_tokens,
                revision=revision,
                progress=run.step("running"),
            ),
        )
    return measured


def _on_text(subject: Subject, reference: Subject | None, ids: torch.Tensor, how: Convention, run: _Run) -> Evaluation:
    if reference is not None:
        return _compared(subject, _divergence(reference, subject, ids, how, run))
    alone = _perplexity(subject, ids, how, run)
    return Evaluation(subject.size_bytes, alone.ppl, context=alone.context, tokens=alone.tokens, perplexity=alone)


def _is_kld(against: str | Path | None) -> bool:
    return against is not None and Path(against).suffix == KLD_SUFFIX


def _compared(subject: Subject, measured: Divergence) -> Evaluation:
    known = subject.kind == PACKED and (subject.path / PLAN_FILE).exists()
    predicted = read_plan(subject.path).predicted if known else None
    return Evaluation(
        size_bytes=subject.size_bytes,
        ppl=measured.ppl,
        ppl_reference=measured.ppl_reference,
        kl=measured.kl,
        kl_stderr=measured.kl_stderr,
        top1_agreement=measured.top1_agreement,
        predicted_kl=predicted.kl if predicted else None,
        predicted_low=predicted.kl_low if predicted else None,
        predicted_high=predicted.kl_high if predicted else None,
        context=measured.context,
        tokens=measured.tokens,
        divergence=measured,
    )


# ---------------------------------------------------------------------------------------------------------- on a text


@dataclass(frozen=True)
class _Run:
    """How to measure, whatever it is."""

    cache: Cache | None
    batch: int
    progress: Progress | None

    def step(self, what: str) -> Step | None:
        return step_of(self.progress, what)

    @contextmanager
    def journal(self, ids: torch.Tensor, how: Convention, columns: int, *whose: str) -> Iterator[Journal | None]:
        """Where scores go until a run is complete; it goes then, and stays after an interruption. What else decides
        scores is part of its name."""
        if self.cache is None:
            yield None
            return
        settings = [f"{name}={os.environ.get(name)}" for name in _SETTINGS]
        key = evaluation_key(ids, how, __version__, torch.__version__, *settings, *whose)
        journal = Journal(self.cache.journal_path(key), columns)
        yield journal
        journal.remove()


_SETTINGS = (native.ISA_VARIABLE, FLOAT_ACTIVATIONS)


def _dtype(subject: Subject, reference: Subject | None) -> torch.dtype | None:
    """What both are measured in: the subject's, so that it has one perplexity, alone and beside its reference."""
    return reference.dtype() if subject.kind == GGUF and reference is not None else subject.dtype()


def _perplexity(subject: Subject, ids: torch.Tensor, how: Convention, run: _Run) -> Perplexity:
    dtype = _dtype(subject, None)
    with run.journal(ids, how, PERPLEXITY_COLUMNS, subject.fingerprint, str(dtype)) as journal:
        return perplexity(
            subject.load(dtype),
            ids,
            **_arguments(how),
            batch=run.batch,
            progress=run.step("measuring"),
            journal=journal,
        )


def _divergence(reference: Subject, subject: Subject, ids: torch.Tensor, how: Convention, run: _Run) -> Divergence:
    dtype = _dtype(subject, reference)
    known = _stored(reference, ids, how, run, dtype)
    if known is None and reference.limited:
        raise WaterfillError(
            f"{reference.path} and {subject.path} are not held below a limit of memory side by side: the predictions "
            "of the first have to be kept on disk; leave out --no-cache, give the cache more room, or leave out memory"
        )
    form, kept = ("live", None) if known is None else (known.form, known.kept)
    whose = (reference.fingerprint, form, str(kept), subject.fingerprint, str(dtype))
    with run.journal(ids, how, DIVERGENCE_COLUMNS, *whose) as journal:
        return divergence(
            reference.load(dtype) if known is None else known,
            subject.load(dtype),
            ids,
            **_arguments(how),
            batch=run.batch,
            progress=run.step("measuring"),
            journal=journal,
        )


def _stored(
    reference: Subject, ids: torch.Tensor, how: Convention, run: _Run, dtype: torch.dtype | None
) -> ReferenceStore | None:
    """The reference's predictions on disk, computed now as far as they are missing; None where they have no place."""
    if run.cache is None:
        return None
    store = run.cache.reference(evaluation_key(ids, how, torch.__version__, reference.fingerprint, str(dtype)))
    cut = how.cut(ids)
    if store.complete(cut):
        return store
    filled = store.fill(reference.load(dtype), cut, how, batch=run.batch, progress=run.step("reading the original"))
    gc.collect()  # the original goes before the model comes
    return store if filled else None


def _against_file(subject: Subject, file: KldFile, max_windows: int | None, run: _Run) -> Divergence:
    how = file.convention(begin_token(subject.tokenizer()))
    ids = file.ids if max_windows is None else how.first_windows(file.ids, max_windows)
    progress = run.step("measuring")
    return divergence(
        file, subject.load(_dtype(subject, None)), ids, **_arguments(how), batch=run.batch, progress=progress
    )


def _how(subject: Subject, name: str, context: int | None, stride: int | None) -> Convention:
    bos = begin_token(subject.tokenizer()) if name == "llama.cpp" else None
    return _convention(name, subject.positions, context=context, stride=stride, bos=bos)


def _arguments(how: Convention) -> dict[str, Any]:
    """A convention as the arguments of `perplexity` and `divergence`."""
    return {"convention": how.name, "context": how.context, "stride": how.stride, "bos": how.bos}


def _check_room(text: Path, memory: str | float | None) -> None:
    """Raises MemoryLimitError where a text, which is tokenised as a whole, takes more than the process may have."""
    limit, size_bytes = memory_bytes(memory), text.stat().st_size if text.is_file() else 0
    smallest = math.ceil((process.resident_bytes() + TOKENISING_BYTES * size_bytes) / 1e6)
    if limit is not None and 1e6 * smallest > limit:
        raise MemoryLimitError(
            f"{limit / 1e6:.0f} MB are too little for {text}: tokenising it takes {smallest} MB at least; "
            "give more, or a shorter text",
            smallest_bytes=1_000_000 * smallest,
        )


def _ids(subject: Subject, reference: Subject | None, text: Path) -> torch.Tensor:
    """Token ids of a text, on which the tokenizers of a model and of its reference have to agree."""
    if reference is None:
        return token_ids(subject.tokenizer(), text)
    ids = token_ids(reference.tokenizer(), text)
    try:
        tokenizer = subject.tokenizer()
    except WaterfillError:
        return ids  # the model may have got its tokenizer after it was packed
    if not torch.equal(ids, token_ids(tokenizer, text)):
        raise WaterfillError(
            f"{subject.path} and {reference.path} have tokenizers that cut {text} into different tokens; "
            "give the model that the artifact was packed from"
        )
    return ids


# --------------------------------------------------------------------------------------------------------------- tasks


def _tasks(
    subject: Subject, dtype: torch.dtype | None, names: Sequence[str], specs: Sequence[Any], run: _Run, **options: Any
) -> TaskResults:
    """Answers are kept under a name that says who was asked what, until all are there."""
    journal = None
    if run.cache is not None:
        files = [_digest(Path(name).read_bytes()) for name in names if name.endswith(TASK_SUFFIX)]
        key = _digest(repr((subject.fingerprint, str(dtype), names, files, options, __version__)).encode())
        journal = run.cache.journal_path(f"tasks-{key}")
    return run_tasks(
        subject.load(dtype),
        subject.tokenizer(),
        specs,
        batch=run.batch,
        journal=journal,
        progress=run.progress,
        **options,
    )


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest()
