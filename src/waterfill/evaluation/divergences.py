"""How far a packed model's predictions are from the original's: KL divergence, top-1 agreement, perplexity of both.

windows -> the reference's predictions (a model's, or known before) and the model's -> `Scores` of each target -> means,
and the statistics of `llama-perplexity --kl-divergence`. Nothing is kept but seven numbers per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from waterfill.base.errors import WaterfillError
from waterfill.base.progress import Step
from waterfill.base.records import Record
from waterfill.evaluation import conventions
from waterfill.evaluation.conventions import Convention, Window
from waterfill.evaluation.expected import Exact, Expected, Scores, score
from waterfill.evaluation.journal import Journal
from waterfill.evaluation.scoring import prepare, score_windows, standard_error, window_logits
from waterfill.evaluation.statistics import (
    KlStatistics,
    PerplexityStatistics,
    TokenStatistics,
    kl_statistics,
    perplexity_statistics,
    token_statistics,
)
from waterfill.files.context import context_length

COLUMNS = len(Scores._fields)


@runtime_checkable
class KnownReference(Protocol):
    """A reference whose predictions have been computed before: on disk (`store`), or in a file
    (`reference_file`, `kld_file`)."""

    form: str
    kept: int | None
    vocabulary: int

    def expected(self, window: Window) -> Expected:
        """Its predictions at the scored positions of a window."""


@dataclass(frozen=True)
class ReferenceForm(Record):
    """What was known of the reference's predictions, and what that does to `kl`."""

    form: str  # "live" and "exact": all logits; "top-k"; "llama.cpp": 16-bit log-probabilities
    kept: int | None  # tokens per position that "top-k" knows
    kl_low: float  # the exact mean KL lies between these two for certain; `kl` itself where all logits are known
    kl_high: float
    kl_sampling_stderr: float  # standard error of `kl` as an estimate of the exact mean on this text; 0 likewise


@dataclass(frozen=True)
class Divergence(Record):
    """A model against its reference on one text. KL is KL(reference || model) over the vocabulary, nats per token.

    Standard errors (`…_stderr`) take windows as the independent units from 8 windows on, below that tokens.
    """

    kl: float  # mean over all scored positions
    kl_stderr: float
    kl_median: float
    kl_p99: float
    kl_max: float
    top1_agreement: float  # fraction of positions where both models rank the same token first
    top1_stderr: float
    ppl: float
    ppl_reference: float
    log_ppl_ratio: float  # ln(ppl / ppl_reference): the rise of the loss, nats per token
    log_ppl_ratio_stderr: float  # of the paired differences, so the two models' covariance is accounted for
    tokens: int  # positions scored
    windows: int
    context: int  # tokens per window
    convention: str
    stride: int | None  # of the conventions `strided` and `exl3`
    bos: int | None  # token that replaced the first of each window, in the convention `llama.cpp`
    perplexity_statistics: PerplexityStatistics  # these three are the blocks of llama-perplexity
    kl_statistics: KlStatistics
    token_statistics: TokenStatistics
    reference: ReferenceForm


@dataclass(frozen=True)
class Scored:
    """A model and its reference at every scored position of a text, window by window."""

    windows: Sequence[Scores]
    how: Convention
    form: str  # these two as in `ReferenceForm`
    kept: int | None

    @property
    def divergence(self) -> Divergence:
        """All of it in some figures."""
        return _summary(self)


def divergence(
    reference: Any,
    model: Any,
    ids: Tensor,
    *,
    context: int | None = None,
    batch: int = 1,
    progress: Step | None = None,
    convention: str = "gptq",
    stride: int | None = None,
    bos: int | None = None,
    journal: Journal | None = None,
) -> Divergence:
    """Compare a causal language model with its reference on token ids [tokens], `batch` windows at a time.

    `reference` is a model, which then stays in memory together with the other, or a `KnownReference`. A model against
    itself has a KL of exactly 0 and an agreement of 1. The other arguments are those of `perplexity`.

    Raises:
        WaterfillError: the text is shorter than one window, the context longer than a model's, vocabularies differ, or
            logits are not finite.
    """
    how = conventions.convention(convention, context_length(model.config), context=context, stride=stride, bos=bos)
    return scored(reference, model, ids, how, batch=batch, progress=progress, journal=journal).divergence


def scored(
    reference: Any,
    model: Any,
    ids: Tensor,
    how: Convention,
    *,
    batch: int = 1,
    progress: Step | None = None,
    journal: Journal | None = None,
) -> Scored:
    """What `divergence` sums up, by a convention."""
    cut = how.cut(ids)
    known = reference if isinstance(reference, KnownReference) else None
    for each in [model] if known is not None else [reference, model]:
        prepare(each, cut)

    def compare(some: Sequence[Window]) -> list[Tensor]:
        expected: Sequence[Expected]
        if known is not None:
            expected, vocabulary = [known.expected(window) for window in some], known.vocabulary
        else:
            rows = window_logits(reference, some, how)
            expected, vocabulary = [Exact(logits) for logits in rows], rows[0].shape[-1]
        predictions = window_logits(model, some, how)
        _check_same_vocabulary(vocabulary, predictions[0].shape[-1])
        trios = zip(expected, predictions, some, strict=True)
        return [score(predictions, logits, window.targets) for predictions, logits, window in trios]

    scores = score_windows(cut, compare, batch=batch, progress=progress, journal=journal)
    form, kept = (known.form, known.kept) if known is not None else ("live", None)
    return Scored([Scores(*each) for each in scores], how, form, kept)


def _check_same_vocabulary(reference: int, model: int) -> None:
    if reference != model:
        raise WaterfillError(
            f"the models predict over {reference} and {model} tokens; compare models with one vocabulary"
        )


def _summary(measured: Scored) -> Divergence:
    windows, how = measured.windows, measured.how
    every = Scores(*map(torch.cat, zip(*windows, strict=True)))
    rise = [each.nll - each.nll_reference for each in windows]
    kl = kl_statistics(every.kl)
    return Divergence(
        kl=kl.mean.value,
        kl_stderr=standard_error([each.kl for each in windows]),
        kl_median=kl.median,
        kl_p99=kl.percentile_99,
        kl_max=kl.maximum,
        top1_agreement=float(every.agrees.mean()),
        top1_stderr=standard_error([each.agrees for each in windows]),
        ppl=float(every.nll.mean().exp()),
        ppl_reference=float(every.nll_reference.mean().exp()),
        log_ppl_ratio=float(torch.cat(rise).mean()),
        log_ppl_ratio_stderr=standard_error(rise),
        tokens=len(every.kl),
        windows=len(windows),
        context=how.context,
        convention=how.name,
        stride=how.stride,
        bos=how.bos,
        perplexity_statistics=perplexity_statistics(every.nll, every.nll_reference),
        kl_statistics=kl,
        token_statistics=token_statistics(every.nll, every.nll_reference, every.agrees),
        reference=ReferenceForm(
            form=measured.form,
            kept=measured.kept,
            kl_low=float(every.kl_low.mean()),
            kl_high=float(every.kl_high.mean()),
            kl_sampling_stderr=math.sqrt(float(every.kl_variance.sum())) / len(every.kl),
        ),
    )
