"""What a plan promises of the loss, and the file that keeps the promise."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.plans import assert_sound, codecs_of, planned, sensitivity_of
from waterfill.base.errors import WaterfillError
from waterfill.files.architecture import Architecture
from waterfill.planning.loss import GAINS, Coefficients
from waterfill.planning.menu import planned_kl
from waterfill.planning.plan import Plan
from waterfill.planning.planner import MARGINS, REGIME_KL, predict

# -- predictions -------------------------------------------------------------------------------------------------------


def test_interval_joins_the_probes_margin_and_the_sampling_errors(dense: Architecture) -> None:
    exact = sensitivity_of(dense)
    exact = replace(exact, tensors={n: replace(c, alpha_stderr=0.0, beta_stderr=0.0) for n, c in exact.tensors.items()})
    plan = planned(dense, exact, bits=4.0)
    for kind, (low, high) in MARGINS.items():
        predicted = predict(plan.tensors, replace(exact, probe={"kind": kind}))
        assert (predicted.kl_low, predicted.kl_high) == (predicted.kl * low, predicted.kl * high)
    for probe in ({}, {"kind": "of a later version"}):
        assert predict(plan.tensors, replace(exact, probe=probe)).kl_low == predicted.kl * MARGINS["random"][0]
    one = plan.tensors[2]
    noisy = replace(
        exact, tensors={**exact.tensors, one.name: replace(exact.tensors[one.name], alpha_stderr=one.alpha)}
    )
    widened = predict(plan.tensors, noisy)
    plain = predict(plan.tensors, exact)
    alphas_share = one.kl - planned_kl(one, Coefficients(0.0, one.beta), one.rho)
    assert plain.kl_high is not None
    assert widened.kl_high == pytest.approx(plain.kl_high + 2 * alphas_share)
    assert widened.kl_low == pytest.approx(plain.kl_low - 2 * alphas_share)


def test_an_uncertain_alpha_of_nothing_widens_the_interval_a_little(dense: Architecture) -> None:
    """An estimate close to zero, however uncertain by comparison, is uncertain by what it could be."""
    sensitivity = sensitivity_of(dense)
    name = dense.matrices[0].name
    c = Coefficients(1e-15, 1.0, 1e-4, 0.0)
    plan = planned(dense, replace(sensitivity, tensors={**sensitivity.tensors, name: c}), bits=4.0, gain="mse")
    assert plan.predicted.kl_high is not None
    assert plan.predicted.kl_high < 3 * plan.predicted.kl


def test_past_its_regime_a_plan_does_not_promise(dense: Architecture) -> None:
    sensitivity = sensitivity_of(dense)
    louder = {name: replace(c, alpha=40 * c.alpha, beta=40 * c.beta) for name, c in sensitivity.tensors.items()}
    plan = planned(dense, replace(sensitivity, tensors=louder), bits=2.0)
    assert plan.predicted.kl > REGIME_KL
    assert not plan.predicted.in_regime
    assert plan.predicted.kl_high is None
    assert plan.predicted.kl_low > 0
    within = planned(dense, replace(sensitivity, tensors=louder), max_kl=REGIME_KL)
    assert within.predicted.in_regime
    assert within.predicted.kl_high is not None
    assert within.predicted.kl_low < within.predicted.kl < within.predicted.kl_high


def test_absurd_losses_are_still_numbers(dense: Architecture) -> None:
    tensors = {matrix.name: Coefficients(1e6, 1e7) for matrix in dense.matrices}
    plan = planned(dense, sensitivity_of(dense, tensors=tensors), bits=1.5)
    assert math.isfinite(plan.predicted.ppl)
    assert not plan.predicted.in_regime


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.0), (-1e-3, 0.5), (-1e-3, -0.5), (1e-3, -0.5)])
@pytest.mark.parametrize("gain", GAINS)
def test_estimates_at_or_below_zero(alpha: float, beta: float, gain: str, dense: Architecture) -> None:
    """Noise about zero: such a tensor takes part in every budget, and is predicted to lose no less than nothing."""
    sensitivity = sensitivity_of(dense)
    names = [matrix.name for matrix in dense.matrices[:3]]
    sensitivity = replace(
        sensitivity, tensors={**sensitivity.tensors, **dict.fromkeys(names, Coefficients(alpha, beta, 1e-4, 0.1))}
    )
    for budget in ({"bits": 3.0}, {"size_bytes": 60_000}, {"max_kl": 0.02}):
        plan = planned(dense, sensitivity, gain=gain, **budget)
        assert_sound(plan, dense, sensitivity)
        assert all(tensor.kl >= 0 for tensor in plan.tensors)
        assert 0 <= plan.predicted.kl_low <= plan.predicted.kl
    if alpha <= 0 and beta <= 0:
        plan = planned(dense, sensitivity, gain=gain, max_kl=0.02)
        assert {codecs_of(plan)[name] for name in names} == {
            "trellis-s64-r0.3125"
        }  # the smallest, as they lose nothing


def test_nothing_is_sensitive(dense: Architecture) -> None:
    tensors = {matrix.name: Coefficients(0.0, 0.0) for matrix in dense.matrices}
    sensitivity = sensitivity_of(dense, tensors=tensors)
    assert set(codecs_of(planned(dense, sensitivity, max_kl=0.0)).values()) == {"trellis-s64-r0.3125"}
    assert planned(dense, sensitivity, bits=5.0).predicted.kl == 0


# -- the file ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"bits": 3.0}, {"size_bytes": 10**9}, {"max_kl": 0.02, "uniform": True}])
def test_json_round_trip(options: dict[str, Any], dense: Architecture, tmp_path: Path) -> None:
    plan = planned(dense, keep=("nothing",), **options)
    file = tmp_path / "plan.json"
    file.write_text(plan.to_json(), "utf-8")
    read = Plan.load(file)
    assert read == plan
    assert read.to_json() == plan.to_json()
    assert read.specs() == plan.specs()
    assert read.identity == plan.identity


def test_equal_inputs_give_equal_bytes(dense: Architecture) -> None:
    one, other = (planned(dense, size_bytes=61_803, ties=("*.q_proj,*.k_proj",)).to_json() for _ in range(2))
    assert one == other
    record = json.loads(one)
    assert record["version"] == 1
    assert set(record["tensors"][0]) >= {"name", "shape", "codec", "rate_bits", "size_bytes", "alpha", "t2"}
    assert set(record["predicted"]) >= {"kl", "kl_low", "kl_high", "ppl"}


def test_identity_is_that_of_the_bytes_to_be_written(dense: Architecture) -> None:
    plan = planned(dense, bits=3.0)
    assert replace(plan, model="another name").identity == plan.identity
    tensor = replace(plan.tensors[0], rho=plan.tensors[0].rho / 2)
    for changed in (
        replace(plan, fingerprint="beef"),
        replace(plan, shard_bytes=10_000),
        replace(plan, tensors=(tensor, *plan.tensors[1:])),
    ):
        assert changed.identity != plan.identity


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda record: record | {"version": 2}, "unknown version"),
        (lambda record: record | {"more": 1}, "more"),
        (lambda record: {key: value for key, value in record.items() if key != "version"}, "version"),
        (lambda record: {key: value for key, value in record.items() if key != "tensors"}, "tensors"),
        (lambda record: record | {"tensors": [{}]}, "name"),
        (lambda record: record | {"tensors": 3}, ""),
        (lambda record: record | {"kept": [3]}, ""),
        (lambda record: record | {"predicted": None}, ""),
        (lambda record: [record], ""),
        (lambda record: None, ""),
    ],
)
def test_bad_plans_are_refused(change: Any, reason: str, dense: Architecture, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(change(json.loads(planned(dense, bits=3.0).to_json()))))
    with pytest.raises(WaterfillError, match=f"plan.json is not a plan of this version.*{reason}"):
        Plan.load(file)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_json_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_bytes(content)
    with pytest.raises(WaterfillError, match="is not a plan of this version"):
        Plan.load(file)
    with pytest.raises(WaterfillError, match=r"absent\.json is not a plan"):
        Plan.load(tmp_path / "absent.json")
