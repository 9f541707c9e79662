"""What was lost with noise in all matrices at once, beside what sensitivities add up to.

The sum of sensitivity times noise is the loss where noise is small (the linearity theorem, arXiv 2411.17525), and is
known as well as its sensitivities are: a gradient by drawn labels says less of a text than its loss itself does. So a
plan's loss is measured, with noise of the plan's own size, and the sum is corrected by

    factor  =  mean loss of some sequences with that noise / what the sum says of it

Texts lose very differently, but what a plan's noise costs beside other noise is much the same on all of them. So many
sequences are tried with even noise, whatever the plan, and some of them with the plan's (a ratio estimator). Noise is
drawn anew for every few sequences, so that the spread of their losses has that of the noise in it, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Annotated

from waterfill.base.typed import Magnitude, Range
from waterfill.planning.spread import half_width

BEYOND = 1.25  # times the loss that was tried, that the largest trial still speaks for
STEPS = 60  # of a bisection, which end at a rounding
LEAST = 1e-30  # nats per token that are something

Loss = Annotated[float, Range(-1, 1e12)]
"""Of a sequence, nats per token; rounding may take nothing below zero."""


@dataclass(frozen=True)
class Trial:
    """Noise of one size on the first sequences of a probe."""

    predicted: Magnitude  # what sensitivities add up to, nats per token
    kl: tuple[Loss, ...]  # what each sequence lost, nats per token

    @property
    def mean(self) -> float:
        """Nats per token."""
        return fmean(self.kl)


def factor(trials: Sequence[Trial], predicted: float) -> float:
    """By which what sensitivities add up to is to be multiplied: that of the trials on either side, interpolated over
    the logarithm of the loss, or of the last one; 1 without trials.

    The trial of the most sequences says what is lost; others, on some of them, what that becomes with other noise.
    """
    if not trials or predicted <= 0:
        return 1.0
    most = _longest(trials)
    known = sorted((trial.predicted, _factor(trial, most)) for trial in trials)
    for (left, low), (right, high) in pairwise(known):
        if left < predicted < right:
            share = math.log(predicted / left) / math.log(right / left)
            return math.exp((1 - share) * math.log(low) + share * math.log(high))
    return known[0][1] if predicted <= known[0][0] else known[-1][1]


def error_of_trials(trials: Sequence[Trial]) -> float:
    """Half of the 95 % interval of the loss that was tried, as a share of it: that of the mean over all sequences, and
    the largest of those of what other noise makes of it."""
    most = _longest(trials)
    ratios = [_error_of_ratio(trial, most) for trial in trials if trial is not most]
    return math.hypot(half_width(most.kl) / most.mean, max(ratios, default=0.0))


def _error_of_ratio(trial: Trial, most: Trial) -> float:
    """By what is left of each sequence's loss beside the ratio of the means (Cochran, Sampling Techniques, §6)."""
    ratio = trial.mean / _same(trial, most)
    return half_width([one - ratio * other for one, other in zip(trial.kl, most.kl, strict=False)]) / trial.mean


def _longest(trials: Sequence[Trial]) -> Trial:
    """That of the most sequences; the first of those."""
    return max(trials, key=lambda trial: len(trial.kl))


def _factor(trial: Trial, most: Trial) -> float:
    return most.mean / trial.predicted * trial.mean / _same(trial, most)


def _same(trial: Trial, most: Trial) -> float:
    """What the sequences of one trial lost in the other, nats per token."""
    return fmean(most.kl[: len(trial.kl)])


def uncorrected(trials: Sequence[Trial], loss: float) -> float:
    """What sensitivities add up to where so much is lost."""
    if not trials:
        return loss
    low = high = loss / factor(trials, loss)
    while low * factor(trials, low) > loss:
        low /= 2
    while high * factor(trials, high) < loss:
        high *= 2
    for _ in range(STEPS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if middle * factor(trials, middle) <= loss else (low, middle)
    return low


def tried(trials: Sequence[Trial], predicted: float) -> bool:
    """Whether a trial was of so much loss, or of more."""
    return any(predicted <= BEYOND * trial.predicted for trial in trials)


def usable(trials: Iterable[Trial]) -> tuple[Trial, ...]:
    """Those that say anything, and how well they know it; none where the one of the most sequences does not. Where
    nothing was lost, or nothing was to be, there is nothing to correct."""
    every = tuple(trials)
    if not every:
        return ()
    most = _longest(every)
    some = tuple(
        each for each in every if len(each.kl) > 1 and min(each.predicted, each.mean, _same(each, most)) > LEAST
    )
    return some if most in some else ()
