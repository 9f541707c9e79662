"""Plans of several rates: each as a plan for it alone, in one ladder for every matrix."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support import models
from tests.support.plans import planned
from waterfill.base.errors import WaterfillError
from waterfill.codecs import get_codec
from waterfill.codecs.feedback import Left
from waterfill.files.architecture import Architecture, describe
from waterfill.files.artifact import lay_out
from waterfill.files.checkpoint import open_checkpoint
from waterfill.planning.ladder import MENU, nested_plan, parse_rates
from waterfill.planning.plan import Plan

RATES = (2.2, 3.0, 4.5)


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    path = models.tiny_llama(tmp_path_factory.mktemp("ladder") / "model", hidden=256, intermediate=512)
    return describe(open_checkpoint(path))


def alone(architecture: Architecture, rate: float) -> Plan:
    return planned(architecture, bits=rate, codecs=MENU)


@pytest.fixture(scope="module")
def plan(architecture: Architecture) -> Plan:
    return nested_plan(lambda rate: alone(architecture, rate), RATES, {})


def test_every_matrix_gets_what_it_would_get_at_each_rate_alone(plan: Plan, architecture: Architecture) -> None:
    for number, rate in enumerate(RATES):
        for nested, single in zip(plan.tensors, alone(architecture, rate).tensors, strict=True):
            have = get_codec(nested.codec).ladder[number]  # type: ignore[attr-defined]
            want = get_codec(single.codec).rate
            assert have == want or want - 0.3 < have < want, "a stage of less than .3 bits is none"


def test_levels_are_what_is_read_at_each_rate(plan: Plan) -> None:
    assert len(plan.levels) == 3
    assert (
        lay_out(plan.specs(), shard_bytes=plan.shard_bytes).size_bytes == plan.size_bytes == plan.levels[-1].size_bytes
    )
    weights = sum(tensor.weights for tensor in plan.tensors)
    for number, (level, rate) in enumerate(zip(plan.levels, RATES, strict=True), 1):
        sizes = [get_codec(t.codec).at(number).menu_point(t.shape).size_bytes for t in plan.tensors]
        assert level.bits == pytest.approx(8 * sum(sizes) / weights)
        assert rate - 0.3 < level.bits <= rate
    assert plan.at(2) == plan.levels[1]


def test_predictions_are_those_of_each_rate_alone_and_some_more(plan: Plan, architecture: Architecture) -> None:
    for level, rate, most in zip(plan.levels, RATES, (1.05, 1.25, 1.4), strict=True):
        single = alone(architecture, rate).predicted
        assert 0.9 * single.kl < level.predicted.kl < most * single.kl
        assert level.predicted.kl_low / level.predicted.kl == pytest.approx(single.kl_low / single.kl)
        assert level.predicted.ppl == pytest.approx(level.predicted.ppl_reference * math.exp(level.predicted.kl))  # type: ignore[operator]
    assert math.fsum(tensor.kl for tensor in plan.tensors) == pytest.approx(plan.predicted.kl)


def test_feedback_is_worth_less_where_others_follow(architecture: Architecture, plan: Plan) -> None:
    left = {m.name: Left(0.4, 1.4, None, (0.45, 1.2)) for m in architecture.matrices}
    fed_back = nested_plan(lambda rate: alone(architecture, rate), RATES, left)
    ratios = [
        one.predicted.kl / other.predicted.kl for one, other in zip(fed_back.levels, plan.levels, strict=True)
    ]  # the sensitivities are the same, as if they were of what feedback leaves
    assert ratios[0] == pytest.approx(0.45 / 0.4, rel=0.02)
    assert ratios[1] > ratios[0] * 1.15
    assert ratios[2] > 1.2**2 * 0.98


def test_a_plan_reads_back_and_agrees_with_itself(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert Plan.load(tmp_path / "plan.json") == plan
    for wrong in (plan.levels[:2], (*plan.levels[:2], replace(plan.levels[2], bits=9.0))):
        (tmp_path / "wrong.json").write_text(replace(plan, levels=wrong).to_json())
        with pytest.raises(WaterfillError, match=r"last level is another|matrices have"):
            Plan.load(tmp_path / "wrong.json")


@pytest.mark.parametrize("given", ["2.2,3,4.5", [2.2, 3, 4.5], " 2.2, 3 ,4.5"])
def test_rates_are_read(given: Any) -> None:
    assert parse_rates(given) == RATES


@pytest.mark.parametrize("given", ["", "3", "3,2", "2,2.1", "2,x", "2,3,99", "1,2,3,4,5,6,7,8,9", [2], "nan,3"])
def test_other_rates_are_refused(given: Any) -> None:
    with pytest.raises(WaterfillError, match=r"give 2 to 8 bits per weight such as 2\.2,3,4\.5"):
        parse_rates(given)
