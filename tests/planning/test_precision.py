"""How well a predicted loss is known: against published quantiles, simulations and slow sums."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import pytest

from tests.support.plans import planned, sensitivity_of
from waterfill.files.architecture import Architecture
from waterfill.planning.loss import Coefficients, predicted_kl
from waterfill.planning.menu import planned_kl
from waterfill.planning.plan import Plan
from waterfill.planning.precision import relative_error, sampling_error
from waterfill.planning.sensitivity import Samples, Sensitivity
from waterfill.planning.spread import half_width, t_quantile

# Two-sided 95 % points, as every table of Student's t has them.
PUBLISHED = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 7: 2.365, 10: 2.228, 15: 2.131, 20: 2.086, 30: 2.042}
PUBLISHED |= {31: 2.040, 60: 2.000, 120: 1.980, 10**9: 1.960}


def sampled(architecture: Architecture, passes: int = 5, seed: int = 0) -> Sensitivity:
    """Sensitivities whose sequences differ, together and each by itself."""
    draw = random.Random(seed)
    made, samples, tensors = sensitivity_of(architecture), {}, {}
    common = [math.exp(draw.gauss(0, 0.3)) for _ in range(passes)]
    for name, c in made.tensors.items():
        alpha = tuple(c.alpha * each * math.exp(draw.gauss(0, 0.2)) for each in common)
        beta = tuple(c.beta * each * math.exp(draw.gauss(0, 0.5)) for each in common)
        samples[name] = Samples(alpha, beta)
        a, b = (stdev(values) / math.sqrt(passes) for values in (alpha, beta))
        tensors[name] = Coefficients(fmean(alpha), fmean(beta), a, b)
    return replace(made, tensors=tensors, samples=samples)


# -- intervals of means -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("freedom", "quantile"), PUBLISHED.items())
def test_quantiles_are_the_published_ones(freedom: int, quantile: float) -> None:
    assert t_quantile(freedom) == pytest.approx(quantile, rel=0.0015 if freedom == 3 else 0.0005)


def test_quantiles_fall_towards_the_normal_one() -> None:
    found = [t_quantile(freedom) for freedom in range(1, 200)]
    assert found == sorted(found, reverse=True)
    assert found[-1] > 1.959964


@pytest.mark.parametrize("count", [2, 3, 4, 8, 32])
def test_intervals_hold_the_mean_as_often_as_they_say(count: int) -> None:
    draw, trials = random.Random(count), 20_000
    held = 0
    for _ in range(trials):
        values = [draw.gauss(3, 2) for _ in range(count)]
        held += abs(fmean(values) - 3) <= half_width(values)
    assert held / trials == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / trials) + 0.0005)


def test_the_interval_of_a_few_values() -> None:
    assert half_width([]) == half_width([3.0]) == math.inf
    assert half_width([3.0] * 5) == 0
    assert half_width([1.0, 3.0]) == pytest.approx(12.7062)  # ± t / sqrt(2) of a standard deviation of sqrt(2)
    assert half_width([10.0, 30.0]) == pytest.approx(127.062)


# -- of a plan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [{"bits": 3.0}, {"bits": 5.0}, {"max_kl": 0.05}])
def test_the_error_of_a_plan_is_that_of_what_every_sequence_predicts(
    budget: dict[str, float], dense: Architecture
) -> None:
    measured = sampled(dense)
    plan = planned(dense, measured, **budget)
    assert measured.samples is not None
    losses = []
    for number in range(5):
        loss = 0.0
        for tensor in plan.tensors:
            sample = measured.samples[tensor.name]
            loss += planned_kl(tensor, Coefficients(sample.alpha[number], sample.beta[number]), tensor.rho)
        losses.append(loss)
    expected = 2.7764 * stdev(losses) / math.sqrt(5)
    assert plan.predicted.sampling_error == sampling_error(plan.tensors, measured) == pytest.approx(expected, rel=1e-3)
    assert fmean(losses) == pytest.approx(plan.predicted.kl)
    assert plan.predicted.kl_low <= plan.predicted.kl - expected * 0.99


def test_errors_that_are_common_do_not_average_out_and_others_do(dense: Architecture) -> None:
    """What single tensors' standard errors cannot tell apart."""
    plan = planned(dense, bits=4.0)
    names = list(sensitivity_of(dense).tensors)
    alphas = {t.name: t.kl / planned_kl(t, Coefficients(1, 0), t.rho) for t in plan.tensors}  # each loses as much
    factors = {
        "together": [[2.0, 0.0]] * len(names),
        "against each other": [[2.0, 0.0] if number % 2 else [0.0, 2.0] for number in range(len(names))],
    }
    errors = {}
    for what, rows in factors.items():
        samples = {
            name: Samples(tuple(alphas[name] * f for f in row), (0.0, 0.0))
            for name, row in zip(names, rows, strict=True)
        }
        errors[what] = sampling_error(plan.tensors, replace(sensitivity_of(dense), samples=samples))
    kl = sum(tensor.kl for tensor in plan.tensors)
    assert errors["together"] == pytest.approx(t_quantile(1) * kl)
    balance = sum(t.kl if names.index(t.name) % 2 else -t.kl for t in plan.tensors)
    assert errors["against each other"] == pytest.approx(t_quantile(1) * abs(balance))
    assert errors["against each other"] < 0.8 * errors["together"]


def test_without_single_sequences_the_errors_of_tensors_add_up(dense: Architecture) -> None:
    """As they did in files of before."""
    measured = sensitivity_of(dense)
    plan = planned(dense, measured, bits=3.0)
    slow = 0.0
    for tensor in plan.tensors:
        c = measured.tensors[tensor.name]
        slow += 2 * planned_kl(tensor, Coefficients(c.alpha_stderr, c.beta_stderr), tensor.rho)
    assert sampling_error(plan.tensors, measured) == pytest.approx(slow)
    assert plan.predicted.sampling_error == pytest.approx(slow)


def test_old_sensitivity_files_predict_what_they_did(dense: Architecture, tmp_path: Path) -> None:
    measured = sensitivity_of(dense)
    record = json.loads(measured.to_json())
    assert record.pop("samples") is None
    file = tmp_path / "old.json"
    file.write_text(json.dumps(record))
    old = Sensitivity.load(file)
    assert old.samples is None
    assert old == measured
    assert planned(dense, old, bits=3.0) == planned(dense, measured, bits=3.0)


def test_old_plans_are_read(dense: Architecture, tmp_path: Path) -> None:
    plan = planned(dense, bits=3.0)
    record = json.loads(plan.to_json())
    assert record["predicted"].pop("sampling_error") > 0
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(record))
    assert Plan.load(file) == replace(plan, predicted=replace(plan.predicted, sampling_error=0.0))


def test_samples_are_read_as_they_were_written(dense: Architecture, tmp_path: Path) -> None:
    measured = sampled(dense)
    file = tmp_path / "sensitivity.json"
    file.write_text(measured.to_json())
    assert Sensitivity.load(file) == measured


# -- of an allocation that is not made yet ----------------------------------------------------------------------------


def test_in_an_optimal_allocation_every_weight_loses_the_same(dense: Architecture) -> None:
    """So that relative errors count by sizes; here with rates of any fraction, t2 = 4^-rate, and no beta."""
    measured = sampled(dense)
    assert measured.samples is not None
    sizes = {matrix.name: math.prod(matrix.shape) for matrix in dense.matrices}
    each = 1e-9  # nats per token and weight
    t2 = {name: each * size / measured.tensors[name].alpha for name, size in sizes.items()}
    losses = [
        sum(predicted_kl(Coefficients(measured.samples[name].alpha[number], 0), t2[name], 0) for name in sizes)
        for number in range(5)
    ]
    expected = half_width(losses) / fmean(losses)
    assert relative_error(measured, dense.matrices) == pytest.approx(expected, rel=1e-3)


def test_it_is_near_that_of_a_plan(dense: Architecture) -> None:
    measured = sampled(dense, passes=12)
    plan = planned(dense, measured, bits=4.0)
    found = relative_error(measured, dense.matrices)
    assert plan.predicted.sampling_error / plan.predicted.kl == pytest.approx(found, rel=0.3)


def test_tensors_that_nothing_is_known_of_have_no_part(dense: Architecture) -> None:
    measured = sampled(dense)
    assert measured.samples is not None
    first, *others = dense.matrices
    unreached = replace(
        measured,
        tensors={**measured.tensors, first.name: Coefficients(0.0, 0.0)},
        samples={**measured.samples, first.name: Samples((0.0,) * 5, (0.0,) * 5)},
    )
    assert relative_error(unreached, dense.matrices) == relative_error(measured, others)
    nothing = {matrix.name: Coefficients(0.0, 0.0) for matrix in dense.matrices}
    assert relative_error(replace(measured, tensors=nothing), dense.matrices) == 0
    assert relative_error(sensitivity_of(dense), dense.matrices) == 0
