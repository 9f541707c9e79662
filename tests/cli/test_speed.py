"""Plans by speed through the command line, on a stated machine: storage and speeds are given, nothing is timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import Command, Result
from tests.support.models import tiny_llama
from waterfill.running import timing


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("speed") / "model", tokenizer=True)


@pytest.fixture
def plan(command: Command, model: Path) -> Any:
    """Run `plan` without measuring: no weight counts more than another."""
    return lambda *options: command("plan", model, "--alpha", "uniform", *options)


def codecs(result: Result) -> set[str]:
    return {tensor["codec"].partition("-")[0] for tensor in result.record["tensors"]}


def test_storage_decides_what_is_streamed(plan: Any) -> None:
    options = ("--for", "stream", "--bits", "3", "--json")
    slow, fast = (plan(*options, "--disk", disk).record["speed"] for disk in ("0.01GB/s", "10GB/s"))
    assert (slow["storage_bytes_per_s"], fast["storage_bytes_per_s"]) == (1e7, 1e10)
    assert slow["tokens_per_second"] < fast["tokens_per_second"]
    assert slow["reading_s"] > slow["working_s"]
    assert fast["reading_s"] < fast["working_s"]
    assert all(slow[what] for what in ("machine", "isa", "threads"))
    quickest = plan("--for", "stream", "--disk", "10GB/s", "--speed", str(2 * fast["tokens_per_second"]), "--json")
    assert quickest.record["speed"]["tokens_per_second"] >= 2 * fast["tokens_per_second"]
    assert "higgs" in codecs(quickest), "what is entropy-coded is ten times as slow here"


def test_storage_is_measured_unless_it_is_said(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(timing, "storage_speed", lambda files, progress: asked.append(files) or 2e9)
    for disk in ((), ("--disk", "measured")):
        speed = plan("--for", "stream", "--bits", "3", "--json", *disk).record["speed"]
        assert speed["storage_bytes_per_s"] == 2e9
    assert len(asked) == 2
    assert all(file.suffix == ".safetensors" for file in asked[0])


def test_the_table_says_what_the_speed_holds_for(plan: Any) -> None:
    streamed = plan("--for", "stream", "--disk", "0.5GB/s", "--bits", "3")
    assert streamed.code == 0, streamed.err
    assert "tokens per second, by the weights alone, streamed at 500 MB/s and none kept in memory" in streamed.out
    memory = plan("--for", "memory", "--bits", "3")
    assert "by the weights' products alone" in memory.out
    for said in (streamed.out, memory.out):
        line = next(line for line in said.splitlines() if line.startswith("speed"))
        assert line.split("; on ")[1].rstrip().endswith(("threads", "thread"))
    assert "speed" not in plan("--bits", "3").out


def test_pack_keeps_what_was_promised(command: Command, model: Path, tmp_path: Path) -> None:
    options = ("--alpha", "uniform", "--for", "memory", "--speed", "20000", "--bits", "4")
    packed = command("pack", model, tmp_path / "out", *options, "--json")
    assert packed.code == 0, packed.out
    assert packed.record["budget"] == {"bits": 4.0, "speed": 20000.0}
    inspected = command("inspect", tmp_path / "out", "--json").record
    assert inspected["speed"] == packed.record["speed"]
    assert inspected["speed"]["tokens_per_second"] >= 20000
    assert json.loads((tmp_path / "out" / "waterfill-plan.json").read_text())["speed"] == packed.record["speed"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--bits", "4", "--disk", "5GB/s"], "--disk 5GB/s is for what is streamed; add --for stream"),
        (["--bits", "4", "--for", "memory", "--disk", "5GB/s"], "--disk 5GB/s is for what is streamed"),
        (["--bits", "4", "--speed", "5"], "--speed is for a plan that says how it is run; add --for memory or"),
        (["--speed", "5"], "--speed is for a plan that says how it is run"),
        (["--bits", "4", "--for", "stream", "--disk", "quick"], "'quick' is no speed of storage"),
        (["--max-kl", "1", "--for", "memory", "--speed", "5"], "--max-kl and --speed do not go together"),
        (["--for", "memory", "--speed", "1e12"], "tokens per second on"),
        (["--for", "stream", "--bits", "4", "--disk", "1GB/s", "--codec", "raw"], "raw has no speed to plan by"),
        (["--for", "stream"], "exactly one of --size, --bits, --max-kl and --lossless"),
    ],
)
def test_what_cannot_be_planned_by_speed_is_one_sentence(plan: Any, options: list[str], said: str) -> None:
    result = plan(*options)
    assert result.code == 2
    assert result.err.startswith("error: ")
    assert said in result.err
    assert result.err.count("\n") == 1
    assert not result.out


def test_comparing_is_for_storage_or_memory(command: Command, model: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("Once upon a time. " * 20)
    result = command("compare", model, "--text", tmp_path / "text", "--for", "stream")
    assert result.code == 2
    assert "'stream' is not one of 'storage', 'memory'" in result.err
