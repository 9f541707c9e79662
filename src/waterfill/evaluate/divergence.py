"""How far a packed model's predictions are from the original's: KL divergence, top-1 agreement, perplexity of both.

The same windows flow through both models, a batch at a time; nothing is kept but four numbers per token. The figures
are those of `llama-perplexity --kl-divergence`, on the windows and targets of the GPTQ perplexity convention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from waterfill.evaluate.scoring import Progress, check_finite, rows_in_scratch, score_windows, standard_error
from waterfill.evaluate.text import windows


@dataclass(frozen=True)
class Divergence:
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
    tokens: int  # positions scored: windows * (context - 1)
    windows: int
    context: int  # tokens per window


def divergence(
    reference: Any, model: Any, ids: Tensor, *, context: int, batch: int = 1, progress: Progress | None = None
) -> Divergence:
    """Compare a causal language model with its reference on token ids [tokens], `batch` windows at a time.

    Both stay in memory together, their logits one batch at a time. A model against itself has a KL of exactly 0 and an
    agreement of 1. `progress(done, total)` counts windows. Raises WaterfillError for a text shorter than one window, a
    context longer than a model's, vocabularies that differ, or logits that are not finite.
    """
    parts = windows(ids, context)
    scored = score_windows([reference, model], parts, _compare, batch=batch, progress=progress)
    return _summary(_Scores(*map(torch.stack, zip(*scored, strict=True))), context)


class _Scores(NamedTuple):
    """What the scored positions leave behind: float64 [positions] of one window, [windows, positions] of all."""

    kl: Tensor
    agrees: Tensor  # 1 where both models rank the same token first, else 0
    nll: Tensor
    nll_reference: Tensor


def _compare(expected: Tensor, given: Tensor, targets: Tensor) -> _Scores:
    """Score the reference's and the model's logits [positions, vocab] at targets [positions], some rows at a time."""
    rows = rows_in_scratch(given.shape[-1], 4 * 8)  # two log-probabilities, their difference, one probability
    pieces = zip(expected.split(rows), given.split(rows), targets.split(rows), strict=True)
    scores = _Scores(*map(torch.cat, zip(*(_compare_rows(*piece) for piece in pieces), strict=True)))
    check_finite(scores.nll_reference, "the reference")
    check_finite(scores.nll, "the model")
    check_finite(scores.kl, "one of the two models")
    return scores


def _compare_rows(expected: Tensor, given: Tensor, targets: Tensor) -> _Scores:
    device = given.device
    expected, targets = expected.to(device), targets.to(device)
    # KL is second order in the difference of the log-probabilities, so float32 would drown small ones in rounding;
    # Apple's GPUs have nothing wider.
    dtype = torch.float32 if device.type == "mps" else torch.float64
    log_p = F.log_softmax(expected, dim=-1, dtype=dtype)
    log_q = F.log_softmax(given, dim=-1, dtype=dtype)
    scores = _Scores(
        kl=(log_p - log_q).mul_(log_p.exp()).sum(dim=-1).clamp_(min=0),  # rounding alone can make it negative
        agrees=expected.argmax(dim=-1) == given.argmax(dim=-1),
        nll=F.nll_loss(log_q, targets, reduction="none"),
        nll_reference=F.nll_loss(log_p, targets, reduction="none"),
    )
    return _Scores(*(score.cpu().double() for score in scores))


def _summary(scores: _Scores, context: int) -> Divergence:
    rise = scores.nll - scores.nll_reference
    median, p99 = np.quantile(scores.kl.numpy(), [0.5, 0.99])
    return Divergence(
        kl=float(scores.kl.mean()),
        kl_stderr=standard_error(scores.kl),
        kl_median=float(median),
        kl_p99=float(p99),
        kl_max=float(scores.kl.max()),
        top1_agreement=float(scores.agrees.mean()),
        top1_stderr=standard_error(scores.agrees),
        ppl=float(scores.nll.mean().exp()),
        ppl_reference=float(scores.nll_reference.mean().exp()),
        log_ppl_ratio=float(rise.mean()),
        log_ppl_ratio_stderr=standard_error(rise),
        tokens=rise.numel(),
        windows=len(rise),
        context=context,
    )
