"""Perplexity: exp of the mean negative log-likelihood of a text's tokens, in one of the conventions people quote.

token ids -> Convention.cut -> windows -> scoring.score_windows: one negative log-likelihood per target -> their mean
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from waterfill.base.progress import Step
from waterfill.base.records import Record
from waterfill.evaluation import conventions
from waterfill.evaluation.conventions import Convention, Window
from waterfill.evaluation.journal import Journal
from waterfill.evaluation.scoring import (
    check_finite,
    prepare,
    rows_in_scratch,
    score_windows,
    standard_error,
    token_error,
    window_logits,
)
from waterfill.files.context import context_length

COLUMNS = 1  # of the scores of a window


@dataclass(frozen=True)
class Perplexity(Record):
    """How well a model predicts a text."""

    ppl: float
    nll: float  # mean negative log-likelihood, nats per token; ppl = exp(nll)
    nll_stderr: float  # windows are the independent units from 8 windows on, below that tokens
    tokens: int  # targets scored
    windows: int
    context: int  # tokens per window
    convention: str = "gptq"
    stride: int | None = None  # of the conventions `strided` and `exl3`
    bos: int | None = None  # token that replaced the first of each window, in the convention `llama.cpp`
    nll_token_stderr: float = float("nan")  # tokens as units, as llama.cpp has it; ppl times this is its "+/-"


def perplexity(
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
) -> Perplexity:
    """Perplexity of a causal language model on token ids [tokens], `batch` windows at a time.

    Args:
        context: tokens per window; the convention's own, or the model's positions, if that is less, when None.
        progress: called with (windows done, windows in all).
        convention: "gptq", "strided", "llama.cpp", "decode" or "exl3"; see `conventions`.
        stride: tokens between windows, in the conventions "strided" and "exl3".
        bos: token that texts begin with, if the tokenizer adds one; only "llama.cpp" asks.
        journal: where scores are kept, so that an interrupted run continues.

    The loss is taken in float32 whatever the model's dtype.

    Raises:
        WaterfillError: the text is shorter than one window, the context longer than the model's, or logits are not
            finite.
    """
    how = conventions.convention(convention, context_length(model.config), context=context, stride=stride, bos=bos)
    return measure_perplexity(model, ids, how, batch=batch, progress=progress, journal=journal)


def measure_perplexity(
    model: Any,
    ids: Tensor,
    how: Convention,
    *,
    batch: int = 1,
    progress: Step | None = None,
    journal: Journal | None = None,
    see: Callable[[Window, Tensor], None] | None = None,
) -> Perplexity:
    """`perplexity` by a convention; `see` is told of the logits `[targets, vocab]` of each window that is computed."""
    cut = how.cut(ids)
    prepare(model, cut)

    def score(some: Sequence[Window]) -> list[Tensor]:
        logits = window_logits(model, some, how)
        if see is not None:
            for window, rows in zip(some, logits, strict=True):
                see(window, rows)
        return [negative_log_likelihood(rows, window.targets) for rows, window in zip(logits, some, strict=True)]

    scores = [each[0] for each in score_windows(cut, score, batch=batch, progress=progress, journal=journal)]
    nll = torch.cat(scores)
    return Perplexity(
        ppl=float(nll.mean().exp()),
        nll=float(nll.mean()),
        nll_stderr=standard_error(scores),
        tokens=nll.numel(),
        windows=len(cut),
        context=how.context,
        convention=how.name,
        stride=how.stride,
        bos=how.bos,
        nll_token_stderr=token_error(nll),
    )


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) in nats, float64 [1, targets], of logits [targets, vocab] and token ids [targets]."""
    rows = rows_in_scratch(logits.shape[-1], 2 * 4)  # the widened logits and their log-softmax
    pieces = zip(logits.split(rows), targets.to(logits.device).split(rows), strict=True)
    nll = torch.cat([F.cross_entropy(some.float(), wanted, reduction="none") for some, wanted in pieces])
    check_finite(nll, "the model")
    return nll.cpu().double()[None]
