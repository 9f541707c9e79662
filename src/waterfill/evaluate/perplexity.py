"""Perplexity in the GPTQ convention: exp of the mean cross-entropy over non-overlapping windows.

Token ids flow in windows through the model (`scoring.score_windows`); each window leaves one negative log-likelihood
per target, and the mean over all targets of all windows is the figure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from waterfill.evaluate.scoring import Progress, check_finite, rows_in_scratch, score_windows, standard_error
from waterfill.evaluate.text import windows


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text."""

    ppl: float
    nll: float  # mean negative log-likelihood, nats per token; ppl = exp(nll)
    nll_stderr: float  # windows are the independent units from 8 windows on, below that tokens
    tokens: int  # targets scored: windows * (context - 1)
    windows: int
    context: int  # tokens per window
    convention: str = "gptq"


def perplexity(
    model: Any, ids: Tensor, *, context: int, batch: int = 1, progress: Progress | None = None
) -> Perplexity:
    """Perplexity of a causal language model on token ids [tokens], `batch` windows of `context` tokens at a time.

    The loss is taken in float32 whatever the model's dtype. `progress(done, total)` counts windows. Raises
    WaterfillError for a text shorter than one window, a context longer than the model's, or logits that are not finite.
    """
    parts = windows(ids, context)
    scores = score_windows([model], parts, _negative_log_likelihood, batch=batch, progress=progress)
    nll = torch.stack(scores)
    mean = nll.mean()
    return Perplexity(
        ppl=float(mean.exp()),
        nll=float(mean),
        nll_stderr=standard_error(nll),
        tokens=nll.numel(),
        windows=len(parts),
        context=context,
    )


def _negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) in nats, float64 [positions], of logits [positions, vocab] and targets [positions]."""
    rows = rows_in_scratch(logits.shape[-1], 2 * 4)  # the widened logits and their log-softmax
    pieces = zip(logits.split(rows), targets.to(logits.device).split(rows), strict=True)
    nll = torch.cat([F.cross_entropy(some.float(), wanted, reduction="none") for some, wanted in pieces])
    check_finite(nll, "the model")
    return nll.cpu().double()
