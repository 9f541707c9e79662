"""The facts that the report draws: bytes accounted for, the curve, the bound, and how numbers are drawn."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from waterfill import api
from waterfill.planning import loss
from waterfill.planning.plan import TensorPlan
from waterfill.studies.report import Continuation, Report, facts
from waterfill.studies.report.bound import ideal_bits, least_loss, mse_distortion
from waterfill.studies.report.charts import gap_bits, rows_of, water_level
from waterfill.studies.report.places import units
from waterfill.studies.report.svg import Scale, number, tag

# ----------------------------------------------------------------------------------------------------------- the facts


def test_all_bytes_are_accounted_for(report: Report, work: Path) -> None:
    on_disk = sum(file.stat().st_size for file in (work / "packed").glob("*.safetensors*"))
    assert report.size_bytes == on_disk == report.plan.size_bytes
    marks = units(report.plan.tensors, dict(report.measured_t2))
    matrices = sum(unit.size_bytes for row in rows_of(marks).values() for unit in row)
    kept = sum(tensor.size_bytes for tensor in report.plan.kept)
    assert 0 < on_disk - matrices - kept < 30_000, "headers"


def test_the_curve_passes_through_the_plan_when_codecs_are_the_same(report: Report, work: Path) -> None:
    made = facts.sensitivity_of(work / "packed", report.plan)
    saved = api.Sensitivity.load(work / "plan.sensitivity.json")
    again = api.make_plan("m", report.plan, made, api.Budget(3_000_000), api.Request(codecs=("higgs-p1-*",)))
    assert abs(again.size_bytes - 3_000_000) < 15_000
    assert again.predicted.kl <= report.plan.predicted.kl * 1.0001, "its codecs are among these"
    # An artifact packed from a saved plan has no sensitivities of its own; the plan's interval tells their errors.
    kl_share = [made.tensors[t.name].alpha_stderr / max(t.alpha, 1e-12) for t in report.plan.tensors if t.alpha > 0]
    assert max(kl_share) == pytest.approx(min(kl_share))
    for tensor in report.plan.tensors:
        corrected = report.plan.predicted.factor * saved.tensors[tensor.name].alpha
        assert made.tensors[tensor.name].alpha == pytest.approx(corrected)
    sizes = [point.size_bytes for point in report.curve]
    losses = [point.kl for point in report.curve]
    assert sizes == sorted(sizes)
    assert losses == sorted(losses, reverse=True)


def test_nothing_is_below_shannons_bound(report: Report) -> None:
    for unit in units(report.plan.tensors, dict(report.measured_t2)):
        assert 0.05 < gap_bits(unit) < 1.0, unit.name
    payload = sum(tensor.size_bytes for tensor in report.plan.tensors)
    assert 0.7 * payload < report.ideal_bytes < payload
    for point, floor in zip(report.curve, report.bound, strict=True):
        assert 0 < floor.kl < point.kl


@given(st.floats(1e-6, 0.5), st.floats(0, 1))
def test_the_bound_asks_for_the_noise_of_the_codes(t2: float, rho: float) -> None:
    assert mse_distortion(loss.relative_error(t2, rho), rho) == pytest.approx(t2, rel=1e-6)


@given(st.floats(0.1, 12))
def test_ideal_bits_invert_the_rate_distortion_function(bits: float) -> None:
    assert ideal_bits(4.0**-bits) == pytest.approx(bits)


def test_least_loss_is_the_least(report: Report) -> None:
    few = [replace(report.plan.tensors[i], alpha=a) for i, a in ((1, 0.02), (2, 0.3), (5, 0.004), (6, -1.0))]
    budget = 0.25 * sum(tensor.weights for tensor in few[:3])  # bytes: 2 bits per weight
    best = least_loss(few, budget)

    def cost(rates: tuple[float, ...]) -> float:
        return sum(tensor.alpha * 4.0**-rate for tensor, rate in zip(few, rates, strict=False))

    weights = [tensor.weights for tensor in few[:3]]
    steps = [i / 20 for i in range(161)]
    found = math.inf
    for a in steps:
        for b in steps:
            c = (8 * budget - a * weights[0] - b * weights[1]) / weights[2]
            if c >= 0:
                found = min(found, cost((a, b, c)))
    assert best <= found * 1.0001
    assert best == pytest.approx(found, rel=0.01)
    assert least_loss(few, 1e9) < 1e-12
    assert least_loss(few, 0) == pytest.approx(0.324)


def test_samples_know_where_they_part() -> None:
    assert Continuation("p", "abcd", "abxd").agree == 2
    assert Continuation("p", "ab", "ab").agree == 2
    assert Continuation("p", "", "x").agree == 0


@pytest.mark.parametrize("codec", ["raw", "lossless"])
def test_matrices_that_keep_every_bit_are_no_marks_of_the_water_level(codec: str) -> None:
    """Coded or not: they have no noise that would stand at a level."""
    name = "model.layers.0.mlp.up_proj"
    packed = TensorPlan(
        name=name, shape=(64, 64), codec="higgs-p1-n16", rate_bits=4.25, size_bytes=2176, alpha=1.0, beta=1.0, rho=0.5,
        t2=0.01, kl=0.01, role="linear", dtype="BF16", parameter=f"{name}.weight", stored_shape=(64, 64),
    )  # fmt: skip
    kept = replace(packed, name=name.replace("up", "down"), codec=codec, t2=0.0, kl=0.0)
    found = units([packed, kept], {name: 0.01})
    shown = str(water_level(found))
    assert packed.name in shown
    assert kept.name not in shown
    assert water_level(found[1:]) == ""


# ----------------------------------------------------------------------------------------------------------- drawing


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.011887, "0.0119"), (-0.5, "−0.5"), (1234.5, "1234"), (4.36e-5, "4.36·10⁻⁵"), (2e-7, "2·10⁻⁷"),
     (math.nan, "–"), (100.0, "100"), (0.00123, "0.00123"), (3e9, "3·10⁹")],
)  # fmt: skip
def test_numbers_are_written_for_people(value: float, text: str) -> None:
    assert number(value) == text


@given(st.floats(1e-9, 1e9), st.floats(1.01, 1e6), st.booleans())
def test_ticks_lie_within_their_scale(low: float, factor: float, logarithmic: bool) -> None:
    scale = Scale(low, low * factor, logarithmic)
    ticks = scale.ticks(5, 0.1)
    assert 1 <= len(ticks) <= 11
    assert all(-0.001 <= scale(tick) <= 1.001 for tick in ticks)
    assert ticks == sorted(ticks)


def test_tags_escape() -> None:
    assert str(tag("text", "<b>&", data_tip='"x"', gone=None, class_="a")) == (
        '<text data-tip="&#34;x&#34;" class="a">&lt;b&gt;&amp;</text>'
    )
