"""What was lost when a plan was tried, and how that corrects what sensitivities add up to."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.plans import planned, sensitivity_of
from waterfill.files.architecture import Architecture
from waterfill.planning.planner import MARGINS, REGIME_KL
from waterfill.planning.sensitivity import Sensitivity
from waterfill.planning.spread import half_width
from waterfill.planning.trials import BEYOND, Trial, error_of_trials, factor, tried, uncorrected, usable

LOSSES = st.floats(1e-6, 1e3)
STRONG, WEAK = Trial(0.8, (1.0, 1.4, 1.2)), Trial(0.1, (0.125, 0.175))


def test_a_trial_says_by_what_a_sum_is_to_be_multiplied() -> None:
    assert factor((), 0.5) == 1
    assert factor((STRONG,), 0) == 1
    for predicted in (1e-4, 0.8, 100.0):
        assert factor((STRONG,), predicted) == pytest.approx(1.2 / 0.8)


def test_a_trial_on_fewer_sequences_says_what_other_noise_makes_of_the_same() -> None:
    """It lost 1/8 of what they lost with eight times the noise: the factor is that of all sequences."""
    same = Trial(0.1, (0.125, 0.175))
    assert factor((STRONG, same), 0.1) == pytest.approx(1.5)
    half = replace(same, kl=(0.0625, 0.0875))
    assert factor((half, STRONG), 0.1) == factor((half, STRONG), 0.01) == pytest.approx(0.75)
    assert factor((half, STRONG), 0.8) == factor((half, STRONG), 5.0) == pytest.approx(1.5)
    assert factor((half, STRONG), math.sqrt(0.08)) == pytest.approx(math.sqrt(0.75 * 1.5))


@given(LOSSES, st.lists(st.tuples(LOSSES, LOSSES), max_size=3, unique_by=lambda pair: pair[0]))
def test_the_factor_lies_between_those_of_the_trials(loss: float, pairs: list[tuple[float, float]]) -> None:
    trials = [Trial(predicted, (kl, kl)) for predicted, kl in pairs]
    found = factor(trials, loss)
    each = [trial.mean / trial.predicted for trial in trials] or [1.0]
    assert min(each) * (1 - 1e-9) <= found <= max(each) * (1 + 1e-9)


@given(st.floats(1e-4, 10), st.floats(0.5, 2), st.floats(0.5, 2))
def test_what_adds_up_to_a_loss_is_corrected_to_it(loss: float, strong: float, weak: float) -> None:
    for trials in ((), (Trial(0.8, (0.8 * strong,)),), (Trial(0.8, (0.8 * strong,)), Trial(0.1, (0.1 * weak,)))):
        summed = uncorrected(trials, loss)
        assert summed * factor(trials, summed) == pytest.approx(loss, rel=1e-6)


def test_how_well_it_is_known_is_known_of_both() -> None:
    many = Trial(0.1, (0.1, 0.14, 0.12, 0.1, 0.14, 0.12))
    alone = half_width(many.kl) / many.mean
    assert error_of_trials((many,)) == pytest.approx(alone)
    assert error_of_trials((many, Trial(0.8, (0.8, 1.12, 0.96)))) == pytest.approx(alone), "eight times, on all"
    uneven = Trial(0.8, (0.8, 1.12, 1.4))
    ratio = uneven.mean / 0.12
    rest = half_width([one - ratio * other for one, other in zip(uneven.kl, many.kl, strict=False)])
    assert error_of_trials((many, uneven)) == pytest.approx(math.hypot(alone, rest / uneven.mean))


def test_a_trial_speaks_for_what_loses_no_more() -> None:
    assert tried((STRONG,), 0.8 * BEYOND)
    assert not tried((STRONG,), 0.81 * BEYOND)
    assert tried((WEAK, STRONG), 0.5)
    assert not tried((), 0.0)


@pytest.mark.parametrize("nothing", [Trial(0.0, (1.0,)), Trial(1.0, (0.0, 0.0)), Trial(1.0, (-1e-9,))])
def test_a_trial_of_nothing_says_nothing(nothing: Trial) -> None:
    assert usable(()) == usable((nothing,)) == ()
    assert usable((STRONG, nothing)) == (STRONG,)
    long = replace(nothing, kl=nothing.kl * 9)
    assert usable((long, STRONG)) == ()


# -- of a plan --------------------------------------------------------------------------------------------------------


def tried_with(architecture: Architecture, times: float, bits: float = 3.0) -> Sensitivity:
    """Sensitivities whose plan lost so many times what they say, when it was tried."""
    measured = sensitivity_of(architecture)
    plain = planned(architecture, measured, bits=bits).predicted.kl
    return replace(measured, trials=(Trial(plain, tuple(times * plain * share for share in (0.9, 1.0, 1.0, 1.1))),))


@pytest.mark.parametrize("times", [0.5, 1.0, 2.0])
def test_a_plan_promises_what_was_lost(times: float, dense: Architecture) -> None:
    measured = tried_with(dense, times)
    plain, plan = (planned(dense, found, bits=3.0) for found in (sensitivity_of(dense), measured))
    predicted, (low, high) = plan.predicted, MARGINS["self"]
    assert [tensor.codec for tensor in plan.tensors] == [tensor.codec for tensor in plain.tensors]
    assert predicted.factor == pytest.approx(times)
    assert predicted.kl == pytest.approx(fmean(measured.trials[0].kl))
    assert math.fsum(tensor.kl for tensor in plan.tensors) == pytest.approx(predicted.kl)
    assert predicted.tried == 4
    assert predicted.sampling_error == pytest.approx(half_width(measured.trials[0].kl))
    assert predicted.kl_low == pytest.approx(low * predicted.kl - predicted.sampling_error)
    assert predicted.kl_high == pytest.approx(high * predicted.kl + predicted.sampling_error)
    assert f"{predicted.kl:.6g}" in plan.optimal


def test_its_interval_is_that_of_what_was_tried(dense: Architecture) -> None:
    """However uncertain the sensitivities are that it was made by."""
    measured = tried_with(dense, 1.0)
    vague = {n: replace(c, alpha_stderr=c.alpha, beta_stderr=c.beta) for n, c in measured.tensors.items()}
    known = planned(dense, measured, bits=3.0).predicted
    assert planned(dense, replace(measured, tensors=vague), bits=3.0).predicted == known
    assert known.sampling_error / known.kl == pytest.approx(error_of_trials(measured.trials))


def test_what_was_tried_is_promised_however_much_is_lost(dense: Architecture) -> None:
    measured = tried_with(dense, 20 * REGIME_KL / planned(dense, bits=3.0).predicted.kl)
    at, beyond = (planned(dense, measured, bits=bits).predicted for bits in (3.0, 2.0))
    assert at.kl > REGIME_KL
    assert at.in_regime
    assert at.kl_high is not None
    assert not beyond.in_regime
    assert beyond.kl_high is None


@pytest.mark.parametrize("times", [0.5, 1.0, 2.0])
def test_the_loss_that_is_asked_for_is_the_corrected_one(times: float, dense: Architecture) -> None:
    plan = planned(dense, tried_with(dense, times), max_kl=0.05)
    assert 0.04 < plan.predicted.kl <= 0.05 * (1 + 1e-9)
    assert plan.size_bytes == planned(dense, sensitivity_of(dense), max_kl=0.05 / times).size_bytes
