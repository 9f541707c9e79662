"""When what is said of long work: stages inside of others, paces, lines and events, by a clock that is told to run."""

from __future__ import annotations

from typing import Any

import pytest

from waterfill.cli.stages import EventLog, Lines, Stages


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


# --------------------------------------------------------------------------------------------------------------- lines


def test_lines_say_what_and_how_far_and_how_long(clock: Clock) -> None:
    stages = Stages("preparing", clock)
    clock.now_s += 30
    assert stages.line() == "preparing: 30.0 s so far"
    stages.step("comparing", 0, 4)
    clock.now_s += 10
    assert stages.line() == "comparing: 0 % (0 of 4) after 10.0 s"
    stages.step("measuring", 1_000, 10_000)  # what was there already says nothing of the pace
    clock.now_s += 20
    stages.step("measuring", 3_000, 10_000)
    clock.now_s += 5
    assert stages.line() == "comparing: 0 % (0 of 4) after 35.0 s; measuring: 30 % (3,000 of 10,000), 1 min 5 s left"
    clock.now_s += 100
    assert stages.line().endswith("30 % (3,000 of 10,000), 0.0 s left"), "late, and no time is negative"
    stages.step("measuring", 10_000, 10_000)
    assert "measuring" not in stages.line()
    stages.step("measuring", 1, 10)  # of the next method
    assert stages.line().endswith("measuring: 10 % (1 of 10) after 0.0 s")
    stages.step("measuring", 10, 10)
    clock.now_s += 10
    stages.step("planning", 0, 1)
    clock.now_s += 90
    assert stages.line().endswith("; planning: 1 min 30 s so far"), "one step has no percentage"
    stages.step("planning", 1, 1)
    stages.step("comparing", 4, 4)
    clock.now_s += 90
    assert stages.line() == "after comparing: 1 min 30 s so far"


def test_what_failed_inside_of_a_stage_is_left_when_that_goes_on(clock: Clock) -> None:
    stages = Stages("preparing", clock)
    for step in (("comparing", 0, 3), ("storing", 0, 9), ("packing", 20, 100), ("comparing", 0, 3)):
        stages.step(*step)
    assert [stage.name for stage in stages.under_way] == ["comparing", "storing", "packing"]
    stages.step("comparing", 1, 3)
    assert [stage.name for stage in stages.under_way] == ["comparing"]
    stages.step("packing", 0, 100)
    stages.step("storing", 0, 9)
    assert [stage.name for stage in stages.under_way] == ["comparing", "packing", "storing"], "as they began this time"


def test_a_stage_may_be_called_like_what_came_first(clock: Clock) -> None:
    stages = Stages("loading", clock)
    stages.step("loading", 1, 4)
    stages.step("measuring", 0, 2)
    assert [(stage.name, stage.done, stage.total) for stage in stages.under_way] == [
        ("loading", 1, 4),
        ("measuring", 0, 2),
    ]


def test_lines_come_soon_for_what_takes_long_and_then_now_and_then(clock: Clock) -> None:
    lines, said = Lines("preparing", 5.0, 30.0, clock), []

    def wait(seconds: int) -> list[str]:
        said.clear()
        for _ in range(seconds):
            clock.now_s += 1
            if (line := lines.due()) is not None:
                said.append(line)
        return said

    assert wait(4) == []
    lines.step("measuring", 0, 10)
    assert wait(1) == ["measuring: 0 % (0 of 10) after 1.0 s"]
    lines.step("measuring", 1, 10)
    assert wait(29) == []
    assert wait(1) == ["measuring: 10 % (1 of 10), 0.0 s left"]
    for _ in range(3):  # stages that are over in no time say nothing
        lines.step("opening", 0, 1)
        wait(1)
        lines.step("opening", 1, 1)
    lines.step("packing", 0, 4)
    assert wait(4) == []
    assert wait(1) == ["measuring: 10 % (1 of 10), 0.0 s left; packing: 0 % (0 of 4) after 5.0 s"]
    lines.step("packing", 4, 4)
    lines.step("packing", 0, 4)
    assert wait(29) == [], "it has been named"
    assert len(wait(31)) == 2


# -------------------------------------------------------------------------------------------------------------- events


def test_events_tell_of_beginnings_and_ends_and_now_and_then_between(clock: Clock) -> None:
    written: list[tuple[Any, ...]] = []

    def write(event: str, *, stage: str, done: int, total: int, elapsed_s: float, left_s: float | None) -> None:
        assert event == "progress"
        written.append((stage, done, total, elapsed_s, left_s))

    def now() -> list[tuple[Any, ...]]:
        new = written.copy()
        written.clear()
        return new

    log = EventLog("preparing", write, 3.0, clock)
    assert now() == [("preparing", 0, 1, 0.0, None)]
    clock.now_s += 2
    log.step("measuring", 8, 32)  # an interrupted run goes on
    assert now() == [("preparing", 1, 1, 2.0, 0.0), ("measuring", 8, 32, 0.0, None)]
    for done in range(9, 15):
        clock.now_s += 1
        log.step("measuring", done, 32)
    assert now() == [("measuring", 11, 32, 3.0, 21.0), ("measuring", 14, 32, 6.0, 18.0)]
    log.step("measuring", 32, 32)
    log.step("measuring", 32, 32)
    assert now() == [("measuring", 32, 32, 6.0, 0.0)], "its end is told once"
    log.step("comparing", 0, 2)
    log.step("packing", 0, 10)
    log.step("packing", 3, 10)  # and it fails
    assert now() == [("comparing", 0, 2, 0.0, None), ("packing", 0, 10, 0.0, None)]
    clock.now_s += 1
    log.step("comparing", 1, 2)
    assert now() == [("packing", 3, 10, 1.0, None)], "how far it came"
    log.step("packing", 0, 10)
    assert now() == [("packing", 0, 10, 0.0, None)]
    log.close()
    assert now() == [("comparing", 1, 2, 1.0, 1.0)]


def test_events_of_a_command_without_stages(clock: Clock) -> None:
    written: list[dict[str, Any]] = []
    log = EventLog("checking", lambda event, **fields: written.append(fields), clock=clock)
    clock.now_s += 7
    log.close()
    assert [(event["done"], event["elapsed_s"], event["left_s"]) for event in written] == [
        (0, 0.0, None),
        (1, 7.0, 0.0),
    ]
