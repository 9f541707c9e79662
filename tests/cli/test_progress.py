"""How far a long command is: a line now and then where there is no terminal, whatever the command waits for."""

from __future__ import annotations

import io
import json
import re
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import waterfill
from tests.support.commands import Command
from waterfill import api
from waterfill.cli import progress
from waterfill.cli.progress import Stages


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_lines_say_what_and_how_far_and_how_long() -> None:
    clock = Clock()
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
    stages.step("comparing", 4, 4)
    clock.now_s += 90
    assert stages.line() == "after measuring: 1 min 30 s so far"


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when a line has been written; lines come at once."""
    event = threading.Event()
    monkeypatch.setattr(progress, "LINE_S", 0.01)
    line = Stages.line

    def said(self: Stages) -> str:
        event.set()
        return line(self)

    monkeypatch.setattr(Stages, "line", said)
    return event


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_command_that_waits_says_so(
    more: list[str], written: threading.Event, command: Command, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another thread: the one of the command may be in a long call of native code."""
    plan = waterfill.plan(llama, lossless=True)

    def slow(*_: object, progress: Any, **__: object) -> Any:
        progress("measuring sensitivities", 3, 32)
        assert written.wait(60)
        written.clear()
        assert written.wait(60), "the first is on standard error by now"
        return plan

    monkeypatch.setattr(api, "plan", slow)
    result = command("plan", "model", *more)
    assert result.code == 0
    assert re.search(r"(?m)^measuring sensitivities: 9 % \(3 of 32\) after \d+\.\d s$", result.err)
    assert "measuring" not in result.out
    assert not more or json.loads(result.out)["size_bytes"] == plan.size_bytes
    assert not [thread for thread in threading.enumerate() if thread.name == "waterfill-progress"]


def test_every_command_that_may_take_long_shows_it(
    written: threading.Event, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*_: object, **__: object) -> Any:
        assert written.wait(60)
        raise waterfill.WaterfillError("enough")

    for verb in ("plan", "pack", "inspect", "evaluate", "seal"):
        monkeypatch.setattr(api, verb, slow)
    monkeypatch.setattr("waterfill.studies.comparison.study.compare", slow)
    monkeypatch.setattr("waterfill.studies.report.write.report", slow)
    monkeypatch.setattr("waterfill.running.runner.open_runner", slow)
    (tmp_path / "text").write_text("x")
    text = ["--text", tmp_path / "text"]
    for arguments in (
        ["plan", "m"], ["pack", "m", "o"], ["inspect", "o"], ["eval", "m", *text], ["compare", "m", *text],
        ["report", "o"], ["seal", "o"], ["generate", "o", "-p", "x"], ["chat", "o"],
    ):  # fmt: skip
        written.clear()
        assert command(*arguments).err.endswith("error: enough\n"), arguments


def test_on_a_terminal_there_are_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("TERM", "xterm")
    with progress.shown() as step:
        step("sampling a probe", 1, 4)
        step("measuring sensitivities", 3, 4)
    assert "sampling a probe" in shown.getvalue()
    assert "75%" in shown.getvalue()
