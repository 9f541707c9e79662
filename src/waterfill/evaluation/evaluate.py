"""The verb `evaluate`: a model on disk, measured on a text, on tasks, and for what it takes to run it.

open_subject ──► text: tokens ──► reference's predictions (stored, or live) ──► divergence   beside the prediction
                             └──► perplexity, where there is no reference
             ──► tasks (lm-evaluation-harness)     ──► efficiency (processes of their own)
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from waterfill.base.ambient import own_torch_modes
from waterfill.base.arguments import checked, choice
from waterfill.base.errors import WaterfillError
from waterfill.base.progress import OPENING, READING, Progress, stage
from waterfill.base.records import Record
from waterfill.base.version import __version__
from waterfill.evaluation.conventions import CONVENTIONS, Convention
from waterfill.evaluation.divergences import Divergence, Scored
from waterfill.evaluation.efficiency import Efficiency, measure_efficiency
from waterfill.evaluation.kld_file import KldFile
from waterfill.evaluation.local_tasks import SUFFIX as TASK_SUFFIX
from waterfill.evaluation.on_text import (
    EvaluationRun,
    agreed_ids,
    check_tokenising,
    common_dtype,
    convention_for,
    perplexity_of,
    recorded,
    scored_against,
    scored_by_file,
)
from waterfill.evaluation.paired import Paired, paired
from waterfill.evaluation.perplexities import Perplexity
from waterfill.evaluation.reference_file import ReferenceFile
from waterfill.evaluation.store import EvaluationCache
from waterfill.evaluation.subjects import CHECKPOINT, PACKED, Subject, open_subject
from waterfill.evaluation.tasks import EFFICIENCY, TaskResults, names_of, run_tasks, task_specs
from waterfill.planning.plan import PLAN_FILE, read_plan
from waterfill.running.streaming.fit import Form

_log = logging.getLogger(__name__)

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
    beside: Paired | None = None  # another model on the same windows
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
    reference: str | Path | None = None,
    save_reference: str | Path | None = None,
    beside: str | Path | None = None,
    context: int | None = None,
    convention: str = "gptq",
    stride: int | None = None,
    max_windows: int | None = None,
    batch: int = 1,
    memory: str | float | None = None,
    memory_form: Form = "auto",
    rate: float | None = None,
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
        reference: a file that `save_reference` wrote of the original, in its place; it has its text in it.
        save_reference: file for what the model itself predicts on the text, to measure others by.
        beside: another model that is measured on the same windows, and how much less or more it loses.
        context: tokens per window; the convention's own, or the model's positions, if that is less, when None.
        convention: "gptq", "strided", "llama.cpp", "decode" or "exl3".
        stride: tokens between windows, in the conventions "strided" and "exl3".
        max_windows: measure on the first windows only.
        batch: windows, or questions, at a time.
        memory: what the process may take in all, as for `load`. A reference that is no artifact cannot be streamed: it
            has to fit for as long as its predictions are computed, which is before the model is loaded.
        memory_form: of the artifacts that are measured, as for `load`.
        rate: of `model`, as for `load`.
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
    names = _names(tasks)
    specs = task_specs(names)
    efficiency = efficiency or EFFICIENCY in names
    known = _known(against, reference, text, context, stride)
    if text is None and not specs and not efficiency and known is None:
        raise WaterfillError(
            "there is nothing to measure; give a text, tasks or efficiency (--text, --tasks, --efficiency)"
        )
    if save_reference is not None and (text is None or against is not None):
        raise WaterfillError(
            "a model's predictions are saved alone, on a text; give that (--text), and leave out what to measure "
            "against (--against)"
        )
    if beside is not None and against is None and known is None:
        raise WaterfillError(
            f"{beside} is measured beside {model} against an original; give that as well (--against, or --reference)"
        )
    with stage(progress, OPENING):
        subject = open_subject(model, revision=revision, memory=memory, form=memory_form, rate=rate)
        other = None if beside is None else open_subject(beside, memory=memory, form=memory_form)
    run = EvaluationRun(EvaluationCache.default() if cache else None, batch, progress)
    original = None
    if against is not None and known is None:
        with stage(progress, OPENING):
            original = open_subject(against, revision=revision, memory=memory)
    if revision is not None and original is None and subject.kind != CHECKPOINT:
        raise WaterfillError(f"{model} has no revision {revision!r}, only a hub model has; leave the revision out")
    measured = Evaluation(size_bytes=subject.size_bytes)
    if known is not None:
        score = partial(scored_by_file, file=known, max_windows=max_windows, run=run)
        measured = _compared(subject, other, score, known)
    elif text is not None:
        check_tokenising(Path(text), memory)
        with stage(progress, READING):
            ids = agreed_ids(subject, original, Path(text))  # before minutes of loading
            if other is not None:
                agreed_ids(other, original, Path(text))
        how = convention_for(original or subject, convention, context, stride)
        ids = ids if max_windows is None else how.first_windows(ids, max_windows)
        measured = _on_text(subject, original, other, ids, how, run, save_reference)
    if specs:
        options = {"shots": shots, "limit": limit, "chat_template": chat_template}
        measured = _on_tasks(measured, subject, original, names, specs, run, options)
    if efficiency:
        step = run.step("running")
        figures = measure_efficiency(
            model,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            memory_form=memory_form,
            rate=rate,
            revision=revision,
            progress=step,
        )
        measured = replace(measured, efficiency=figures)
    return measured


def _names(tasks: str | Sequence[str]) -> tuple[str, ...]:
    names = names_of(tasks)
    if not names and tasks not in ((), []):
        raise WaterfillError(f"tasks is {tasks!r}, which names none; give names, presets or files of JSON lines")
    return names


def _known(
    against: str | Path | None,
    reference: str | Path | None,
    text: str | Path | None,
    context: int | None,
    stride: int | None,
) -> KldFile | ReferenceFile | None:
    """A file that an original's predictions are in, with their text; None where there is none."""
    if reference is not None and against is not None:
        raise WaterfillError(f"both {reference} and {against} are given to measure against; leave out one of them")
    file = against if reference is None else reference
    if file is None or (reference is None and Path(file).suffix != KLD_SUFFIX):
        return None
    if text is not None:
        raise WaterfillError(f"{file} has its text in it; leave out the other one")
    if reference is None:
        return KldFile(Path(file))
    if context is not None or stride is not None:
        raise WaterfillError(f"{file} says how its text is cut; leave out context and stride")
    return ReferenceFile(Path(file))


# ---------------------------------------------------------------------------------------------------------- on a text


def _on_text(
    subject: Subject,
    original: Subject | None,
    other: Subject | None,
    ids: torch.Tensor,
    how: Convention,
    run: EvaluationRun,
    save_reference: str | Path | None,
) -> Evaluation:
    for each in (subject, original or subject, other or subject):
        each.logits = run.batch * how.context
    if original is not None:
        return _compared(subject, other, partial(scored_against, original, ids=ids, how=how, run=run))
    if save_reference is not None:
        alone = recorded(subject, ids, how, Path(save_reference), run)
    else:
        alone = perplexity_of(subject, ids, how, run)
    return Evaluation(subject.size_bytes, alone.ppl, context=alone.context, tokens=alone.tokens, perplexity=alone)


def _compared(
    subject: Subject,
    other: Subject | None,
    score: Callable[[Subject], Scored],
    file: KldFile | ReferenceFile | None = None,
) -> Evaluation:
    """With the prediction beside the measurement, where there is one, and with what another model loses."""
    scores = score(subject)
    measured = scores.divergence
    gc.collect()  # one model goes before the next one comes
    beside = None if other is None else paired(scores, score(other), other.size_bytes)
    planned = subject.kind == PACKED and (subject.path / PLAN_FILE).exists()
    plan = read_plan(subject.path) if planned else None
    if plan is not None and isinstance(file, ReferenceFile) and file.fingerprint != plan.fingerprint:
        _log.warning("%s was packed from other weights than those whose predictions are in %s", subject.path, file.path)
    predicted = plan.at(subject.level).predicted if plan is not None and plan.promises else None
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
        beside=beside,
    )


# --------------------------------------------------------------------------------------------------------------- tasks


def _on_tasks(
    measured: Evaluation,
    subject: Subject,
    reference: Subject | None,
    names: Sequence[str],
    specs: Sequence[Any],
    run: EvaluationRun,
    options: dict[str, Any],
) -> Evaluation:
    """What was measured so far, and the scores of both."""
    dtype = common_dtype(subject, reference)
    scores, original = (
        None if each is None else _tasks(each, dtype, names, specs, run, **options) for each in (subject, reference)
    )
    return replace(measured, tasks=scores, tasks_reference=original)


def _tasks(
    subject: Subject,
    dtype: torch.dtype | None,
    names: Sequence[str],
    specs: Sequence[Any],
    run: EvaluationRun,
    **options: Any,
) -> TaskResults:
    """Answers are kept under a name that says who was asked what, until all are there."""
    journal = None
    if run.cache is not None:
        files = [_digest(Path(name).read_bytes()) for name in names if name.endswith(TASK_SUFFIX)]
        key = _digest(repr((subject.fingerprint, str(dtype), names, files, options, __version__)).encode())
        journal = run.cache.journal_path(f"tasks-{key}")
    return run_tasks(
        run.load(subject, dtype),
        subject.tokenizer(),
        specs,
        batch=run.batch,
        journal=journal,
        progress=run.progress,
        **options,
    )


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest()
