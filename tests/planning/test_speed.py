"""How fast a plan is said to be, and plans that are made by it, on machines that are stated."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.models import tiny_gpt2, tiny_mixtral
from tests.support.plans import codecs_of, planned, sensitivity_of
from tests.support.speeds import KINDS, stated_speeds
from waterfill.base.errors import BudgetError, WaterfillError
from waterfill.codecs import GRIDS, get_codec
from waterfill.files.architecture import Architecture, describe
from waterfill.files.checkpoint import open_checkpoint
from waterfill.planning.budget import Budget, parse_rate
from waterfill.planning.menu import codec_names
from waterfill.planning.plan import Plan
from waterfill.planning.speed import CodecSpeed, Speeds, Timing, timed_codecs

SLOW, FAST = 5e7, 5e9  # bytes per second of storage


def timing_of(dense: Architecture, purpose: Any, storage: float | None = None, **machine: Any) -> Timing:
    names = codec_names(dense, purpose=purpose, timed=True)
    return Timing(stated_speeds(names, **machine), storage, dense.tied_head)


def families(plan: Plan) -> set[str]:
    return {codec.partition("-")[0] for codec in codecs_of(plan).values()}


# ------------------------------------------------------------------------------------------------------------- speeds


def test_rates_between_those_that_were_timed_are_interpolated_in_their_own_form() -> None:
    known = Speeds(
        "m",
        "scalar",
        1,
        {
            "trellis-s64-r2.0000": CodecSpeed(1.0, 10.0),
            "trellis-s64-r4.0000": CodecSpeed(2.0, 30.0),
            "trellis-s64-r5.0000": CodecSpeed(8.0, 90.0),  # levels of 16 bits
            "bitshift-2": CodecSpeed(0.5, 0.6),
        },
    )
    assert known.of("trellis-s64-r3.0000") == CodecSpeed(1.5, 20.0)
    assert known.of("trellis-s64-r4.4000") == CodecSpeed(2.0, 30.0), "not on the way to another form"
    assert known.of("trellis-s64-r4.6000") == CodecSpeed(8.0, 90.0)
    assert known.of("trellis-s64-r1.0000") == CodecSpeed(1.0, 10.0)
    assert known.of("bitshift-2") == CodecSpeed(0.5, 0.6)
    for name in ("trellis-s8-r3.0000", "higgs-p2-n16"):
        with pytest.raises(WaterfillError, match=f"the speed of {name} on m is not known"):
            known.of(name)


def test_continuous_rates_are_timed_at_a_few_and_others_one_by_one() -> None:
    names = timed_codecs(["raw", "lossless", "trellis-s8-r3.1000", "trellis-s8-r3.2000", "bitshift-2.5", *GRIDS])
    assert {"bitshift-2.5", *GRIDS} < set(names)
    trellises = [name for name in names if name.startswith("trellis")]
    assert len(names) == len(GRIDS) + 1 + len(trellises) == len(set(names))
    assert len(trellises) < 12
    rates = [get_codec(name).rate for name in trellises]
    assert (min(rates), max(rates)) == (0.3, 9.0)
    assert all(name.startswith("trellis-s8-") for name in trellises)


# ------------------------------------------------------------------------------------------------------------- claims


def products_s(plan: Plan, *, storage: float | None, uses: dict[str, float] | None = None) -> float:
    """What a token takes, by the stated machine."""
    total = 0.0
    for tensor in plan.tensors:
        kind = KINDS[tensor.codec.partition("-")[0]]
        work = tensor.weights * (kind.resident if storage is None else kind.streamed)
        read = 0.0
        if storage is not None:
            codec = get_codec(tensor.codec)
            layout = codec.layout(tensor.shape)
            read = math.prod(layout["streams" if "streams" in layout else "codes"].shape) / storage
        use = 1.0
        if tensor.role == "embedding":  # a row, or the part that it is read with: all of these small ones
            use = 1 / tensor.shape[0] if storage is None else 1.0
        total += (uses or {}).get(tensor.name, use) * max(work, read)
    return total


@pytest.mark.parametrize("storage", [None, SLOW, FAST])
def test_a_plan_says_how_fast_its_products_are_and_where(dense: Architecture, storage: float | None) -> None:
    purpose = "memory" if storage is None else "stream"
    plan = planned(dense, bits=3.0, purpose=purpose, timing=timing_of(dense, purpose, storage))
    speed = plan.speed
    assert speed is not None
    assert (speed.machine, speed.isa, speed.threads) == ("a stated machine", "scalar", 1)
    assert speed.storage_bytes_per_s == storage
    assert speed.tokens_per_second == pytest.approx(1 / products_s(plan, storage=storage))
    assert max(speed.reading_s, speed.working_s) <= 1 / speed.tokens_per_second <= speed.reading_s + speed.working_s
    assert (speed.reading_s > 0) == (storage is not None)


def test_a_plan_with_its_speed_is_read_again_and_the_machine_is_none_of_its_identity(
    dense: Architecture, tmp_path: Path
) -> None:
    plans = [
        planned(dense, bits=3.0, purpose="memory", timing=timing_of(dense, "memory", machine=machine))
        for machine in ("one", "another")
    ]
    (tmp_path / "plan.json").write_text(plans[0].to_json())
    assert Plan.load(tmp_path / "plan.json").speed == plans[0].speed
    assert plans[0].to_json() != plans[1].to_json()
    assert plans[0].identity == plans[1].identity


def test_of_what_is_looked_up_a_row_takes_time_and_a_tied_head_all_of_it(dense: Architecture, tmp_path: Path) -> None:
    assert not dense.tied_head
    plan = planned(dense, bits=3.0, purpose="memory", timing=timing_of(dense, "memory"))
    assert {tensor.role for tensor in plan.tensors} == {"embedding", "linear", "head"}
    tied = describe(open_checkpoint(tiny_gpt2(tmp_path / "gpt2")))
    assert tied.tied_head
    plan = planned(tied, bits=3.0, purpose="memory", timing=timing_of(tied, "memory"))
    tables = sorted((t for t in plan.tensors if t.role == "embedding"), key=lambda t: t.shape[0])
    assert len(tables) == 2, "tokens and positions, of which tokens are multiplied"
    assert plan.speed is not None
    expected = products_s(plan, storage=None, uses={tables[-1].name: 1 + 1 / tables[-1].shape[0]})
    assert plan.speed.tokens_per_second == pytest.approx(1 / expected)


def test_experts_take_as_much_time_as_tokens_reach_them(tmp_path: Path) -> None:
    mixtral = describe(open_checkpoint(tiny_mixtral(tmp_path / "mixtral")))
    measured = sensitivity_of(mixtral)
    experts = [matrix.name for matrix in mixtral.matrices if matrix.role == "expert"]
    counted = {name: replace(c, tokens=7 if name in experts else 28) for name, c in measured.tensors.items()}
    plan = planned(
        mixtral,
        replace(measured, tensors=counted),
        bits=3.0,
        purpose="stream",
        timing=timing_of(mixtral, "stream", SLOW),
    )
    assert plan.speed is not None
    expected = products_s(plan, storage=SLOW, uses=dict.fromkeys(experts, 0.25))
    assert plan.speed.tokens_per_second == pytest.approx(1 / expected)


def test_of_what_stays_as_it_is_no_speed_is_claimed(dense: Architecture) -> None:
    timing = timing_of(dense, "memory")
    assert planned(dense, bits=16.0, purpose="memory", timing=timing).speed is None
    assert planned(dense, bits=3.0).speed is None, "nor where nobody says how it is run"


# -------------------------------------------------------------------------------------------------------------- plans


def test_without_a_speed_plans_for_memory_are_the_same_on_every_machine(dense: Architecture) -> None:
    usual = timing_of(dense, "memory")
    other = Timing(replace_all(usual.speeds, lambda name: 1e-9 * len(name)))
    plans = [planned(dense, bits=3.3, purpose="memory", timing=timing) for timing in (None, usual, other)]
    assert plans[0].tensors == plans[1].tensors == plans[2].tensors


def replace_all(speeds: Speeds, seconds: Any) -> Speeds:
    codecs = {name: CodecSpeed(seconds(name), seconds(name)) for name in speeds.codecs}
    return Speeds("other", "scalar", 1, codecs)


def test_storage_decides_the_form(dense: Architecture) -> None:
    slow, fast = (
        planned(dense, max_kl=0.02, purpose="stream", timing=timing_of(dense, "stream", storage))
        for storage in (SLOW, FAST)
    )
    coded = [codec for codec in codecs_of(slow).values() if codec.startswith("trellis")]
    assert len(coded) > len(slow.tensors) / 2, "bytes are what counts; of the smallest, scales are many, and not read"
    assert "trellis" not in families(fast), "decoding would take longer than reading"
    assert slow.predicted.kl <= 0.02
    assert fast.predicted.kl <= 0.02
    again = planned(dense, max_kl=0.02, purpose="stream", codecs=("trellis",), timing=timing_of(dense, "stream", FAST))
    assert fast.speed is not None
    assert again.speed is not None
    assert fast.speed.tokens_per_second > 2 * again.speed.tokens_per_second


@pytest.mark.parametrize(("purpose", "storage"), [("memory", None), ("stream", SLOW), ("stream", FAST)])
def test_least_loss_within_the_speed(dense: Architecture, purpose: str, storage: float | None) -> None:
    timing = timing_of(dense, purpose, storage)
    reached = planned(dense, max_kl=0.001, purpose=purpose, timing=timing).speed
    assert reached is not None
    losses = []
    for times in (0.8, 0.9, 1.0):
        asked = times * reached.tokens_per_second * (1 - 1e-9)
        plan = planned(dense, speed=asked, purpose=purpose, timing=timing)
        assert plan.speed is not None
        assert plan.speed.tokens_per_second >= asked * (1 - 1e-9)
        assert plan.budget == {"speed": asked}
        losses.append(plan.predicted.kl)
    assert losses == sorted(losses)
    assert losses[-1] <= 0.001 * (1 + 1e-9), "no more than the plan that is as fast"


@pytest.mark.parametrize("budget", [{"bits": 3.5}, {"size_bytes": 40_000}])
def test_bytes_and_speed_at_once(dense: Architecture, budget: dict[str, Any]) -> None:
    timing = timing_of(dense, "memory")
    free = planned(dense, purpose="memory", timing=timing, **budget)
    assert free.speed is not None
    asked = 1.4 * free.speed.tokens_per_second
    plan = planned(dense, speed=asked, purpose="memory", timing=timing, **budget)
    assert plan.speed is not None
    assert plan.speed.tokens_per_second >= asked * (1 - 1e-9)
    assert plan.predicted.kl > free.predicted.kl
    assert plan.bits <= budget.get("bits", 99)
    assert plan.size_bytes <= budget.get("size_bytes", 10**9)
    assert "higgs" in families(plan)
    enough = planned(dense, speed=0.1 * asked, purpose="memory", timing=timing, **budget)
    assert enough.predicted.kl == pytest.approx(free.predicted.kl), "a speed that any plan has costs nothing"


def test_a_speed_that_no_plan_has_is_refused_with_the_most_that_there_is(dense: Architecture) -> None:
    timing = timing_of(dense, "memory")
    for budget in ({}, {"bits": 3.0}, {"size_bytes": 60_000}):
        with pytest.raises(BudgetError, match="on a stated machine with scalar; ask for less") as caught:
            planned(dense, speed=1e9, purpose="memory", timing=timing, **budget)
        assert ("within these bytes" in str(caught.value)) == bool(budget)
        most = float(str(caught.value).split("at most ")[1].split(" tokens")[0])
        planned(dense, speed=0.999 * most, purpose="memory", timing=timing, **budget)


def test_what_is_not_packed_cannot_be_planned_by_speed(dense: Architecture) -> None:
    with pytest.raises(WaterfillError, match="raw has no speed to plan by"):
        codec_names(dense, ("raw", "bitshift"), "stream", timed=True)
    assert "raw" not in codec_names(dense, (), "memory", timed=True)
    assert "raw" in codec_names(dense, (), "memory")


@pytest.mark.parametrize(("text", "rate"), [("0.5GB/s", 5e8), ("300 MB/s", 3e8), ("1 MiB / s", 1 << 20)])
def test_speeds_of_storage(text: str, rate: float) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["5", "5GB", "5GB/h", "0GB/s", "fast/s", "/s", "", "nanGB/s", "-1GB/s", "1e999GB/s"])
def test_what_is_no_speed_of_storage(text: str) -> None:
    with pytest.raises(BudgetError, match=r"no speed of storage; write it as in 0\.5GB/s"):
        parse_rate(text)


@pytest.mark.parametrize("given", [{"speed": 0.0}, {"speed": -1.0}, {"bits": 3.0, "speed": math.inf}])
def test_budgets_with_a_speed_that_is_none(given: dict[str, float]) -> None:
    with pytest.raises(BudgetError, match=r"--speed \S+ is not a budget"):
        Budget(**given)  # type: ignore[arg-type]


def test_a_loss_and_a_speed_do_not_go_together() -> None:
    with pytest.raises(BudgetError, match="--max-kl and --speed do not go together"):
        Budget(max_kl=0.1, speed=3.0)
