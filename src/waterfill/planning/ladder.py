"""One plan of several rates: what a matrix gets at each, so that a lower one is part of every higher one.

    rates ──► a plan for each, of one menu ──► rates of every matrix, which only rise ──► nested codecs ──► Plan

Each matrix gets at every rate what it would get if the model were packed at that rate alone: as the budget grows, the
matrices' rates do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from waterfill.base.errors import WaterfillError
from waterfill.codecs import Nested, get_codec
from waterfill.codecs.feedback import Left
from waterfill.codecs.nested.codec import MOST_LEVELS, STATES, nested_name
from waterfill.codecs.trellis.codec import LEAST_RATE, RATE_DIGITS
from waterfill.codecs.trellis.encoding import MOST_RATE
from waterfill.files.artifact import lay_out
from waterfill.planning.loss import Coefficients, predicted_kl, relative_error
from waterfill.planning.plan import Level, Plan, Prediction, TensorPlan

MENU = (f"trellis-s{STATES}",)  # what matrices get at each rate taken by itself


def parse_rates(rates: str | Sequence[float]) -> tuple[float, ...]:
    """Bits per weight, from "2.2,3,4.5" or a list.

    Raises:
        WaterfillError: they are no such rates.
    """
    try:
        parts = rates.split(",") if isinstance(rates, str) else rates
        found = tuple(float(part) for part in parts)
    except (TypeError, ValueError):
        found = ()
    steps = [second - first for first, second in zip((0.0, *found), found, strict=False)]
    rising = all(step >= LEAST_RATE - 1e-9 for step in steps)
    if not (2 <= len(found) <= MOST_LEVELS and rising and found[-1] <= MOST_RATE):
        raise WaterfillError(
            f"rates are {rates!r}; give 2 to {MOST_LEVELS} bits per weight such as 2.2,3,4.5, each larger than the one "
            f"before by {LEAST_RATE} at least, up to {MOST_RATE:g}"
        )
    return found


def nested_codecs(rates: Sequence[float]) -> tuple[str, ...]:
    """Names of codecs like those of the plan, for whoever asks what such a plan needs."""
    return (nested_name(rates),)


def nested_plan(plan: Callable[[float], Plan], rates: Sequence[float], left: Mapping[str, Left]) -> Plan:
    """The plan of all rates, given what plans a model at one, from `MENU`."""
    plans = [plan(rate) for rate in rates]
    top = plans[-1]
    factors = [one.predicted.factor for one in plans]
    matrices = [
        _nested(same, factors, left.get(same[0].name)) for same in zip(*(one.tensors for one in plans), strict=True)
    ]
    by_level = [tuple(tensors[k] for tensors in matrices) for k in range(len(rates))]
    whole = replace(top, tensors=by_level[-1])
    other_bytes = lay_out(whole.specs(), shard_bytes=top.shard_bytes).size_bytes - _bytes(by_level[-1])
    weights = sum(tensor.weights for tensor in whole.tensors)
    levels = [
        Level(_bytes(tensors) + other_bytes, 8 * _bytes(tensors) / weights, _predicted(one, tensors))
        for one, tensors in zip(plans, by_level, strict=True)
    ]
    last = levels[-1]
    return replace(
        whole,
        size_bytes=last.size_bytes,
        bits=last.bits,
        predicted=last.predicted,
        levels=tuple(levels),
        optimal="of every rate by itself: " + top.optimal,
    )


def _bytes(tensors: Sequence[TensorPlan]) -> int:
    return sum(tensor.size_bytes for tensor in tensors)


def _nested(tensors: Sequence[TensorPlan], factors: Sequence[float], left: Left | None) -> list[TensorPlan]:
    """A matrix at every rate, given what it gets at each alone."""
    ladder: list[float] = []
    for tensor in tensors:
        below = ladder[-1] if ladder else 0.0
        rate = get_codec(tensor.codec).rate
        ladder.append(rate if round(rate - below, RATE_DIGITS) >= LEAST_RATE else below)
    codec = get_codec(nested_name(ladder))
    assert isinstance(codec, Nested)
    feedback = left or Left(1.0, 1.0)
    followed, last = feedback.early or (feedback.loss, feedback.noise), (feedback.loss, feedback.noise)
    levels = []
    for level, t2 in enumerate(codec.distortions(tensors[0].shape, (followed[1], last[1])), 1):
        loss, noise = last if level >= max(codec.stages) else followed
        costs = Coefficients(tensors[level - 1].alpha * loss / feedback.loss, tensors[level - 1].beta)
        levels.append(_at_level(codec.at(level), tensors[level - 1], costs, t2, noise, factors[level - 1]))
    return levels


def _at_level(
    codec: Nested, tensor: TensorPlan, costs: Coefficients, t2: float, noise: float, factor: float
) -> TensorPlan:
    size_bytes = codec.menu_point(tensor.shape).size_bytes
    return replace(
        tensor,
        codec=codec.name,
        size_bytes=size_bytes,
        rate_bits=8 * size_bytes / tensor.weights,
        t2=relative_error(t2, tensor.rho) * noise,
        kl=factor * predicted_kl(costs, t2, tensor.rho, codec.along(tensor.shape)),
    )


def _predicted(plan: Plan, tensors: Sequence[TensorPlan]) -> Prediction:
    """What a plan for the rate alone predicts, and as much more as the matrices lose more."""
    alone, nested = (math.fsum(tensor.kl for tensor in some) for some in (plan.tensors, tensors))
    ratio, predicted = nested / alone if alone else 1.0, plan.predicted
    return replace(
        predicted,
        kl=predicted.kl * ratio,
        kl_low=predicted.kl_low * ratio,
        kl_high=None if predicted.kl_high is None else predicted.kl_high * ratio,
        ppl=None if predicted.ppl_reference is None else predicted.ppl_reference * math.exp(predicted.kl * ratio),
        assumed_kl=predicted.assumed_kl * ratio,
        sampling_error=predicted.sampling_error * ratio,
    )
