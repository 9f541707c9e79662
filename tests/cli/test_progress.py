"""How far a long command is, through the commands: lines and events whatever they wait for, and bars on a terminal."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest

import waterfill
from tests.support.commands import Command
from tests.support.documented import documented_events, sections, shape
from waterfill import api
from waterfill.cli import events, progress, stages
from waterfill.cli.stages import Lines

PROBE = ["--sequences", "2", "--length", "8"]


@pytest.fixture
def written(command: Command, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when a line is written; lines come at once."""
    event = threading.Event()
    monkeypatch.setattr(progress, "TICK_S", 0.01)
    monkeypatch.setattr(stages, "FIRST_S", 0.0)
    monkeypatch.setattr(stages, "LINE_S", 0.0)
    due = Lines.due

    def said(self: Lines) -> str | None:
        event.set()
        return due(self)

    monkeypatch.setattr(Lines, "due", said)
    return event


def test_a_command_that_waits_says_so(
    written: threading.Event, command: Command, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another thread: the one of the command may be in a long call of native code."""
    plan = waterfill.plan(llama, lossless=True)

    def slow(*_: object, progress: Any, **__: object) -> Any:
        progress("measuring sensitivities", 3, 32)
        for _ in range(2):
            written.clear()
            assert written.wait(60), "the first is on standard error by the second"
        return plan

    monkeypatch.setattr(api, "plan", slow)
    result = command("plan", "model")
    assert result.code == 0
    assert re.search(r"(?m)^measuring sensitivities: 9 % \(3 of 32\) after \d+\.\d s$", result.err)
    assert "measuring" not in result.out
    assert not [thread for thread in threading.enumerate() if thread.name == "waterfill-progress"]


def test_a_quick_command_is_quiet(command: Command, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "TICK_S", 0.001)
    assert re.fullmatch(r"planned in [\d.]+ s\n", command("plan", llama, "--lossless").err)


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_every_command_that_may_take_long_shows_it(
    more: list[str], written: threading.Event, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*_: object, **__: object) -> Any:
        assert more or written.wait(60)
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
        result = command(*arguments, *more)
        if more:
            assert [event["event"] for event in result.events] == ["progress", "error"], arguments
            assert (result.code, result.record) == (2, {"error": "enough"})
        else:
            assert result.err.endswith("error: enough\n"), arguments


# -------------------------------------------------------------------------------------------------------------- events


SAMPLED = ["packing it to sample from", "sampling a probe"]


def begun_and_over(told: list[dict[str, Any]]) -> list[str]:
    """Names of the stages as they begin; all of them have ended, and their counts have not gone back."""
    open_stages: dict[str, int] = {}
    names = []
    for event in told:
        name, done, total = event["stage"], event["done"], event["total"]
        if name not in open_stages:
            assert (done, event["left_s"] is None) == (0, True) or done == total
            names.append(name)
        assert done >= open_stages.get(name, 0)
        assert event["elapsed_s"] >= 0
        open_stages[name] = done
        if done == total:
            assert event["left_s"] == 0
            del open_stages[name]
    assert not open_stages
    return names


def test_the_events_of_pack_are_the_documented_ones(command: Command, llama: Path, tmp_path: Path) -> None:
    shapes = [shape(event) for event in documented_events()]
    result = command("pack", llama, tmp_path / "out", "--bits", "4", "--codec", "higgs-p1-*", *PROBE, "--json")
    assert result.code == 0
    assert all(shape(event) in shapes for event in result.events)
    told = [event for event in result.events if event["event"] == "progress"]
    assert begun_and_over(told) == [
        "preparing", "opening the model", "describing the model", *SAMPLED, "loading the model",
        "measuring sensitivities", "planning", "coding what is kept", "trying the plan", "planning", "packing",
    ]  # fmt: skip
    failed = command("pack", llama, tmp_path / "out", "--bits", "4", "--json")
    assert shape(failed.events[-1]) in shapes
    assert {event["event"] for event in documented_events()} == {"progress", "log", "error"}
    described = set(re.findall(r"(?m)^\| `(\w+)`(?:, `(\w+)`)?", sections()["Events"]))
    assert {name for pair in described for name in pair if name} == {
        name for event in documented_events() for name in event if name != "event"
    }


def test_compare_tells_of_everything_that_it_does(command: Command, ref_llama: Path, work: Path) -> None:
    arguments = ["compare", ref_llama, "--text", work / "text.py", "--context", "16", "--windows", "1", *PROBE]
    arguments += ["--codec", "higgs-p1-n16", "--codec", "higgs-p1-n4", "--methods", "waterfill,rtn-4", "--bits", "3"]
    told = [event for event in command(*arguments, "--json").events if event["event"] == "progress"]
    matched = ["planning", "storing the weights", "packing", "measuring"]
    assert begun_and_over(told) == [
        "preparing", "opening the model", "describing the model", "reading the text", *SAMPLED, "loading the model",
        "measuring sensitivities", "trying the plan", "loading the model", "planning", "comparing", *matched[1:],
        *matched[1::2], *matched, "planning other sizes",
    ]  # fmt: skip


def test_the_events_of_a_report(command: Command, work: Path, ref_llama: Path, tmp_path: Path) -> None:
    arguments = ["report", work / "packed", "--output", tmp_path / "page.html", "--original", ref_llama]
    arguments += ["--text", work / "text.py", "--context", "16", "--windows", "1", "--max-new-tokens", "1"]
    told = [event for event in command(*arguments, "--json").events if event["event"] == "progress"]
    assert begun_and_over(told) == [
        "preparing", "checking the artifact", "opening the model", "reading the text", "loading both models",
        "measuring", "sampling", "planning other sizes",
    ]  # fmt: skip


def test_a_text_that_ends_early_tells_how_far_it_came(command: Command, work: Path) -> None:
    result = command("generate", work / "packed", "-p", "x =", "--max-new-tokens", "3", "--json")
    last = {event["stage"]: event["done"] for event in result.events if event["event"] == "progress"}
    assert last == {"loading the model": 1, "reading the prompt": 1, "generating": result.record["tokens"]}


def test_what_is_logged_and_warned_of_is_an_event(
    command: Command, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = waterfill.plan(llama, lossless=True)

    def talking(*_: object, **__: object) -> Any:
        logging.getLogger("waterfill.files").warning("an adapter is left out")
        logging.getLogger("waterfill.kernels").info("two\nlines")
        warnings.warn("it is old", stacklevel=1)
        return plan

    monkeypatch.setattr(api, "plan", talking)
    result = command("plan", "model", "--json")
    assert result.record["size_bytes"] == plan.size_bytes
    said = [(event["level"], event["message"]) for event in result.events if event["event"] == "log"]
    assert said[:3] == [
        ("warning", "an adapter is left out"), ("info", "two\nlines"), ("warning", "UserWarning: it is old")
    ]  # fmt: skip
    assert said[3][1].startswith("planned in ")
    assert warnings.showwarning.__module__ != events.__name__, "only while the command runs"
    with pytest.warns(UserWarning, match="it is old"):
        plain = command("plan", "model")
    assert plain.err.startswith("an adapter is left out\ntwo\nlines\n")


def test_standard_error_may_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            tried.append(text)
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stderr", Closed())
    events.log("info", "unheard")
    assert any("unheard" in str(text) for text in tried)


# ---------------------------------------------------------------------------------------------------------- a terminal


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch, *more: str) -> Terminal:
    """Standard error of a command; no fixture, as pytest puts its own in place before the test."""
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(sys, "argv", ["waterfill", "plan", "model", *more])
    monkeypatch.setenv("TERM", "xterm")
    return shown


def test_on_a_terminal_there_are_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    with progress.shown() as step:
        step("sampling a probe", 1, 4)
        step("measuring sensitivities", 3, 4)
        step("sampling a probe", 0, 4)
    assert "sampling a probe" in terminal.getvalue()
    assert "75%" in terminal.getvalue()


def test_downloads_have_bars_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    with progress.shown() as step:
        step("opening the model", 0, 1)
        assert terminal.getvalue() == ""
        step("opening the model", 1, 1)
        step("loading the model", 0, 1)
        step("loading the model", 1, 1)
    assert "opening" not in terminal.getvalue()
    assert "loading the model" in terminal.getvalue()


def test_with_json_there_are_events_on_a_terminal_too(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch, "--json")
    with progress.shown("reading"):
        pass
    assert [json.loads(line)["stage"] for line in terminal.getvalue().splitlines()] == ["reading"] * 2
