"""A model on disk and a text: perplexity, or divergence from a reference whose predictions are kept on disk.

    text ──agreed_ids──► token ids ──convention──► windows ──► the reference's predictions: stored, or live ──┐
                                                         └──► the model's ───────────────────────────────────┴──► scores

An `EvaluationRun` says how anything is measured: where what can be used again is kept, how much at a time, who is told.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from waterfill.base import native, process
from waterfill.base.errors import MemoryLimitError, WaterfillError
from waterfill.base.native import FLOAT_ACTIVATIONS
from waterfill.base.progress import LOADING, Progress, Step, stage, step_of
from waterfill.base.version import __version__
from waterfill.base.writing import prepare_file
from waterfill.evaluation import divergences, perplexities
from waterfill.evaluation.conventions import Convention, convention
from waterfill.evaluation.divergences import Scored, scored
from waterfill.evaluation.journal import Journal
from waterfill.evaluation.kld_file import KldFile
from waterfill.evaluation.perplexities import Perplexity, measure_perplexity
from waterfill.evaluation.reference_file import ReferenceFile, ReferenceRecorder
from waterfill.evaluation.store import EvaluationCache, ReferenceStore, evaluation_key
from waterfill.evaluation.subjects import GGUF, Subject
from waterfill.evaluation.text import begin_token, token_ids
from waterfill.running.streaming.fit import memory_bytes

TOKENISING_BYTES = 200  # of memory for a byte of text; 160 to 171 are measured
SETTINGS = (native.ISA_VARIABLE, FLOAT_ACTIVATIONS)  # of the environment, that decide scores


@dataclass(frozen=True)
class EvaluationRun:
    """How to measure, whatever it is."""

    cache: EvaluationCache | None
    batch: int
    progress: Progress | None

    def step(self, what: str) -> Step | None:
        return step_of(self.progress, what)

    def load(self, subject: Subject, dtype: torch.dtype | None) -> Any:
        """The model, ready to be measured."""
        with stage(self.progress, LOADING):
            return subject.load(dtype)

    @contextmanager
    def journal(self, ids: torch.Tensor, how: Convention, columns: int, *whose: str) -> Iterator[Journal | None]:
        """Where scores go until a run is complete; it goes then, and stays after an interruption. What else decides
        scores is part of its name."""
        if self.cache is None:
            yield None
            return
        settings = [f"{name}={os.environ.get(name)}" for name in SETTINGS]
        key = evaluation_key(ids, how, __version__, torch.__version__, *settings, *whose)
        journal = Journal(self.cache.journal_path(key), columns)
        yield journal
        journal.remove()


def common_dtype(subject: Subject, reference: Subject | None) -> torch.dtype | None:
    """What both are measured in: the subject's, so that it has one perplexity, alone and beside its reference."""
    return reference.dtype() if subject.kind == GGUF and reference is not None else subject.dtype()


def convention_for(subject: Subject, name: str, context: int | None, stride: int | None) -> Convention:
    """The convention of a name, as a model has it: its positions, and what its tokenizer begins texts with."""
    bos = begin_token(subject.tokenizer()) if name == "llama.cpp" else None
    return convention(name, subject.positions, context=context, stride=stride, bos=bos)


def perplexity_of(subject: Subject, ids: torch.Tensor, how: Convention, run: EvaluationRun) -> Perplexity:
    """Of a model alone."""
    dtype, step = common_dtype(subject, None), run.step("measuring")
    with run.journal(ids, how, perplexities.COLUMNS, subject.fingerprint, str(dtype)) as journal:
        return measure_perplexity(run.load(subject, dtype), ids, how, batch=run.batch, progress=step, journal=journal)


def recorded(subject: Subject, ids: torch.Tensor, how: Convention, path: Path, run: EvaluationRun) -> Perplexity:
    """Perplexity of a model, whose predictions are written into a file on the way."""
    prepare_file(path)
    recorder, step = ReferenceRecorder(), run.step("measuring")
    model = run.load(subject, common_dtype(subject, None))
    measured = measure_perplexity(model, ids, how, batch=run.batch, progress=step, see=recorder.add)
    recorder.write(path, ids, how, subject.fingerprint)
    return measured


def scored_against(
    reference: Subject, subject: Subject, ids: torch.Tensor, how: Convention, run: EvaluationRun
) -> Scored:
    """A model against its reference.

    Raises:
        WaterfillError: the reference's predictions have no place on disk, and memory is limited.
    """
    dtype = common_dtype(subject, reference)
    known = _known_predictions(reference, ids, how, run, dtype)
    if known is None and reference.limited:
        raise WaterfillError(
            f"{reference.path} and {subject.path} are not held below a limit of memory side by side: the predictions "
            "of the first have to be kept on disk; leave out --no-cache, give the cache more room, or leave out memory"
        )
    form, kept = ("live", None) if known is None else (known.form, known.kept)
    whose = (reference.fingerprint, form, str(kept), subject.fingerprint, str(dtype))
    with run.journal(ids, how, divergences.COLUMNS, *whose) as journal:
        return scored(
            run.load(reference, dtype) if known is None else known,
            run.load(subject, dtype),
            ids,
            how,
            batch=run.batch,
            progress=run.step("measuring"),
            journal=journal,
        )


def scored_by_file(
    subject: Subject, file: KldFile | ReferenceFile, max_windows: int | None, run: EvaluationRun
) -> Scored:
    """A model against what is known of its reference's predictions, on the text in that file."""
    how = file.how if isinstance(file, ReferenceFile) else file.convention(begin_token(subject.tokenizer()))
    ids = file.ids if max_windows is None else how.first_windows(file.ids, max_windows)
    model, step = run.load(subject, common_dtype(subject, None)), run.step("measuring")
    return scored(file, model, ids, how, batch=run.batch, progress=step)


def check_tokenising(text: Path, memory: str | float | None) -> None:
    """Look whether there is memory for a text, which is tokenised as a whole.

    Raises:
        MemoryLimitError: it takes more than the process may have.
    """
    limit, size_bytes = memory_bytes(memory), text.stat().st_size if text.is_file() else 0
    smallest = math.ceil((process.resident_bytes() + TOKENISING_BYTES * size_bytes) / 1e6)
    if limit is not None and 1e6 * smallest > limit:
        raise MemoryLimitError(
            f"{limit / 1e6:.0f} MB are too little for {text}: tokenising it takes {smallest} MB at least; "
            "give more, or a shorter text",
            smallest_bytes=1_000_000 * smallest,
        )


def agreed_ids(subject: Subject, reference: Subject | None, text: Path) -> torch.Tensor:
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


def _known_predictions(
    reference: Subject, ids: torch.Tensor, how: Convention, run: EvaluationRun, dtype: torch.dtype | None
) -> ReferenceStore | None:
    """The reference's predictions on disk, computed now as far as they are missing; None where they have no place."""
    if run.cache is None:
        return None
    store = run.cache.reference(evaluation_key(ids, how, torch.__version__, reference.fingerprint, str(dtype)))
    cut = how.cut(ids)
    if store.complete(cut):
        return store
    filled = store.fill(
        run.load(reference, dtype), cut, how, batch=run.batch, progress=run.step("reading the original")
    )
    gc.collect()  # the original goes before the model comes
    return store if filled else None
