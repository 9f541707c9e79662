"""The three blocks of `llama-perplexity --kl-divergence`, from the scores of every token, with its formulas.

All standard errors here take tokens as independent, as llama.cpp does. Neighbouring tokens are not, so these errors
are smaller than those of `Divergence`'s own fields, which take windows as units where there are enough of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from waterfill.base.records import Estimate, Record


@dataclass(frozen=True)
class PerplexityStatistics(Record):
    """Perplexities of the model (Q) and its reference (base). Errors of what compares them hold their covariance."""

    ppl: Estimate  # "Mean PPL(Q)"
    ppl_reference: Estimate  # "Mean PPL(base)"
    correlation: float  # "Cor(ln(PPL(Q)), ln(PPL(base)))", 1 is 100 %; NaN where one of them does not vary
    log_ppl_ratio: Estimate  # "Mean ln(PPL(Q)/PPL(base))"
    ppl_ratio: Estimate  # "Mean PPL(Q)/PPL(base)"
    ppl_difference: Estimate  # "Mean PPL(Q)-PPL(base)"


@dataclass(frozen=True)
class KlStatistics(Record):
    """KL(reference || model), nats per token, over the scored tokens."""

    mean: Estimate
    maximum: float
    percentile_99_9: float
    percentile_99: float
    percentile_95: float
    percentile_90: float
    median: float
    percentile_10: float
    percentile_5: float
    percentile_1: float
    percentile_0_1: float
    minimum: float


@dataclass(frozen=True)
class TokenStatistics(Record):
    """Δp: how much likelier the model holds the text's own next token than the reference does; 1 is 100 %."""

    mean: Estimate
    maximum: float
    percentile_99_9: float
    percentile_99: float
    percentile_95: float
    percentile_90: float
    percentile_75: float
    median: float
    percentile_25: float
    percentile_10: float
    percentile_5: float
    percentile_1: float
    percentile_0_1: float
    minimum: float
    rms: Estimate
    same_top: Estimate  # "Same top p": share of tokens where both hold the same one likeliest


def perplexity_statistics(nll: Tensor, nll_reference: Tensor) -> PerplexityStatistics:
    """Of negative log-likelihoods, float64 [tokens], of the model and of its reference."""
    model, reference = _mean(nll), _mean(nll_reference)
    centred = (nll - nll.mean()) * (nll_reference - nll_reference.mean())
    covariance = float(centred.mean()) / max(1, len(nll) - 1)
    spread = model.error * reference.error
    ratio = Estimate(model.value - reference.value, _root(model.error**2 + reference.error**2 - 2 * covariance))
    ppl, base = _exponential(model), _exponential(reference)
    return PerplexityStatistics(
        ppl=ppl,
        ppl_reference=base,
        correlation=min(1.0, covariance / spread) if spread > 0 else math.nan,
        log_ppl_ratio=ratio,
        ppl_ratio=_exponential(ratio),
        ppl_difference=Estimate(
            ppl.value - base.value, _root(ppl.error**2 + base.error**2 - 2 * ppl.value * base.value * covariance)
        ),
    )


def kl_statistics(kl: Tensor) -> KlStatistics:
    """Of KL divergences, float64 [tokens]."""
    return KlStatistics(mean=_mean(kl), **_quantiles(kl, KlStatistics.__dataclass_fields__))


def token_statistics(nll: Tensor, nll_reference: Tensor, agrees: Tensor) -> TokenStatistics:
    """Of negative log-likelihoods and of agreement (1 or 0), float64 [tokens]."""
    delta = (-nll).exp() - (-nll_reference).exp()
    squares = _mean(delta.square())
    rms, top = math.sqrt(squares.value), float(agrees.mean())
    return TokenStatistics(
        mean=_mean(delta),
        rms=Estimate(rms, 0.5 / rms * squares.error if rms > 0 else 0.0),
        same_top=Estimate(top, _root(top * (1 - top) / max(1, len(agrees) - 1))),
        **_quantiles(delta, TokenStatistics.__dataclass_fields__),
    )


def _mean(scores: Tensor) -> Estimate:
    variance = float((scores - scores.mean()).square().mean())
    return Estimate(float(scores.mean()), _root(variance / max(1, len(scores) - 1)))


def _exponential(estimate: Estimate) -> Estimate:
    value = math.exp(estimate.value)
    return Estimate(value, value * estimate.error)


def _root(square: float) -> float:
    return math.sqrt(max(0.0, square))  # rounding can make a variance of equal numbers negative


def _quantiles(scores: Tensor, fields: Mapping[str, Any]) -> dict[str, float]:
    """The maximum, minimum, median and percentiles that `fields` names, interpolated linearly."""
    fractions = {"maximum": 1.0, "median": 0.5, "minimum": 0.0}
    for name in fields:
        if name.startswith("percentile_"):
            fractions[name] = float(name.removeprefix("percentile_").replace("_", ".")) / 100
    values = np.quantile(scores.numpy(), list(fractions.values()))
    return dict(zip(fractions, map(float, values), strict=True))
