"""The commands as a user meets them: results, JSON as docs/cli.md promises it, and a quiet standard error.

Most run in this process, through `cli.main`; signals and the entry point are tried in one of their own.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

import waterfill
from tests.support import models
from tests.support.commands import SCALAR, Command
from tests.support.documented import documented, sections, shape
from waterfill import api, kernels
from waterfill.cli import console

COMMANDS = [
    "plan",
    "pack",
    "inspect",
    "seal",
    "eval",
    "prune",
    "compare",
    "report",
    "tune",
    "generate",
    "chat",
    "doctor",
]
PROBE = ["--sequences", "4", "--length", "64"]


# ------------------------------------------------------------------------------------------------------ documentation


def documented_plan() -> dict[str, Any]:
    return dict(documented("plan"))


def test_help_of_every_command_names_what_the_documentation_does(command: Command) -> None:
    overview = command()
    assert (overview.code, overview.err) == (0, "")
    assert command("--help").out == overview.out
    assert re.findall(r"^  (\w+)  +\S", overview.out, flags=re.MULTILINE)[-len(COMMANDS) :] == COMMANDS
    options = {}
    for name in COMMANDS:
        found = command(name, "--help")
        assert (found.code, found.err) == (0, "")
        assert max(map(len, found.out.splitlines())) <= 80
        options[name] = set(re.findall(r"--[a-z][a-z0-9-]+", found.out)) - {"--save", "--help", "--json"}
        if name in ("plan", "inspect", "seal", "eval", "prune", "compare", "report", "tune", "generate"):
            assert options[name] == set(re.findall(r"--[a-z][a-z0-9-]+", sections()[name])) - {"--save", "--json"}
    assert options["pack"] - options["plan"] == {"--plan", "--overwrite"}
    assert options["chat"] ^ options["generate"] == {"--system", "--prompt"}


def test_version(command: Command) -> None:
    assert command("--version") == (0, f"waterfill {waterfill.__version__}\n", "")


# ------------------------------------------------------------------------------------------------------------- results


def test_plan_writes_nothing_and_says_everything(
    command: Command, ref_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = command("plan", ref_llama, "--size", "2.5MB", *SCALAR, *PROBE, "--json")
    assert result.code == 0
    *measuring, planned = result.remarks
    assert re.fullmatch(r"planned in [\d.]+ s", planned)
    assert all(re.match(r"measuring 256 tokens in \w+: about \d+ s on this machine", remark) for remark in measuring)
    assert len(measuring) <= 1, "said only where a busy machine takes long"
    record = result.record
    assert shape(record) == shape(documented_plan())
    assert record["size_bytes"] <= 2_500_000
    assert record["budget"] == {"size_bytes": 2_500_000}
    assert record["probe"] == {
        "method": "fisher", "kind": "self", "sequences": 4, "length": 64, "seed": 0, "text": None
    }  # fmt: skip
    predicted = record["predicted"]
    assert 0 < predicted["kl_low"] < predicted["kl"] < predicted["kl_high"]
    assert sum(tensor["kl"] for tensor in record["tensors"]) == pytest.approx(predicted["kl"])
    assert len(record["tensors"]) == 43
    assert list(tmp_path.iterdir()) == []
    again = command("plan", ref_llama, "--size", "2.5MB", *SCALAR, *PROBE, "--json")
    assert again.out == result.out, "a seed makes a run repeatable to the byte"


def test_a_second_plan_measures_nothing_and_says_so(command: Command, ref_llama: Path) -> None:
    first = command("plan", ref_llama, "--bits", "4", *SCALAR, "--quick", "--json")
    assert (first.record["probe"]["sequences"], first.record["probe"]["length"]) == (4, 96)
    second = command("plan", ref_llama, "--bits", "5", *SCALAR, "--quick", "--json")
    assert "4 sequences of the probe were measured before, and are not again" in second.remarks
    stages = {event.get("stage") for event in second.events}
    assert "planning" in stages
    assert "trying the plan" in stages
    assert not {"sampling a probe", "measuring sensitivities"} & stages
    third = command("plan", ref_llama, "--bits", "5", *SCALAR, "--quick", "--json")
    assert third.record == second.record
    assert "loading the model" not in {event.get("stage") for event in third.events}
    alone = command("plan", ref_llama, "--bits", "5", *SCALAR, "--quick", "--no-cache", "--json")
    assert "measuring sensitivities" in {event.get("stage") for event in alone.events}
    assert alone.record == second.record


@pytest.mark.parametrize("columns", [80, 120, None])
def test_the_table_fits_and_cuts_nothing(
    columns: int | None, command: Command, ref_llama: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if columns:
        monkeypatch.setenv("COLUMNS", str(columns))
    text = command("plan", ref_llama, "--bits", "3.5", *SCALAR, "--sensitivity", work / "plan.sensitivity.json").out
    lines = text.splitlines()
    assert max(map(len, lines)) <= (columns or console.PIPED_WIDTH)
    titles = lines[0].split()
    assert titles[0] == "matrix"
    assert titles[-1] == "KL"
    assert 5 <= len(titles) < 8 if columns == 80 else len(titles) == 8
    assert "model.layers.5.mlp.down_proj " in text
    assert "…" not in text
    assert "\x1b" not in text
    for fact in ("ref-llama, 13.64 MB", "--bits 3.5", "43 at 3.49", "times smaller", "nats per token"):
        assert fact in " ".join(text.split())


def test_many_matrices_are_summed_up_by_kind(command: Command, tmp_path: Path) -> None:
    checkpoint = models.tiny_mixtral(tmp_path / "model", experts=8, layers=3)
    arguments = ["plan", checkpoint, "--bits", "4", *SCALAR, "--sequences", "2", "--length", "8"]
    short, full = command(*arguments), command(*arguments, "--all")
    assert re.search(r"model\.layers\.\*\.mlp\.experts\.gate_up_proj\.\*  +24  +\d\.\d{3}  ", short.out)
    assert len(short.out.splitlines()) < 23 < 60 < len(full.out.splitlines())
    assert "model.layers.2.mlp.experts.down_proj.7 " in full.out


def test_out_of_regime_there_is_no_promise(command: Command, ref_llama: Path, work: Path) -> None:
    arguments = ["plan", ref_llama, "--size", "1.2MB", "--sensitivity", work / "plan.sensitivity.json"]
    arguments += ["--codec", "higgs-p1-n2", "--codec", "higgs-p1-n3"]
    assert "beyond the range where predictions hold" in command(*arguments).out
    predicted = command(*arguments, "--json").record["predicted"]
    assert predicted["kl_high"] is None
    assert not predicted["in_regime"]


def test_plan_save_pack_inspect(command: Command, ref_llama: Path, work: Path, tmp_path: Path) -> None:
    reuse = ["--sensitivity", work / "plan.sensitivity.json"]
    saved = command("plan", ref_llama, "--size", "3MB", *SCALAR, *reuse, "--save", tmp_path / "p.json", "--json")
    assert json.loads((tmp_path / "p.json").read_text()) == saved.record
    assert f"saved as {tmp_path / 'p.json'}, the sensitivities as {tmp_path / 'p.sensitivity.json'}" in saved.remarks
    assert (tmp_path / "p.sensitivity.json").read_bytes() == (work / "plan.sensitivity.json").read_bytes()

    out = tmp_path / "out"
    packed = command("pack", ref_llama, out, "--plan", tmp_path / "p.json", "--json")
    assert packed.record == {"path": str(out), **saved.record}
    assert shape(packed.record) == shape(documented("pack") | documented_plan())
    assert len(packed.remarks) == 1
    assert re.fullmatch(rf"packed into {out} in [\d.]+ s", packed.remarks[0])
    assert (out / "model.safetensors").stat().st_size == packed.record["size_bytes"]
    assert (out / "model.safetensors").read_bytes() == (work / "packed" / "model.safetensors").read_bytes()

    inspected = command("inspect", out, "--json")
    expected = documented("pack") | documented_plan()
    expected["tensors"][0] |= documented("inspect")
    assert shape(inspected.record) == shape(expected)
    for before, after in zip(saved.record["tensors"], inspected.record["tensors"], strict=True):
        assert after == {**before, "t2_measured": after["t2_measured"]}
        assert after["t2_measured"] == pytest.approx(after["t2"], rel=0.3)
    assert {event["event"] for event in inspected.events} == {"progress"}
    table = command("inspect", out)
    assert "t² measured" in table.out
    assert "--size 3,000,000" in table.out


def test_pack_shows_the_plan_it_made(command: Command, ref_llama: Path, work: Path, tmp_path: Path) -> None:
    reuse = ["--sensitivity", work / "plan.sensitivity.json"]
    arguments = ["pack", ref_llama, tmp_path / "out", *reuse, "--codec", "higgs-p1-n16", "--bits", "5"]
    result = command(*arguments, "--keep", "model.embed_tokens")
    assert result.code == 0
    assert "42 at 4.0" in result.out
    assert "14 other tensors, 2.778 MB, of which model.embed_tokens.weight has 2.775 MB" in result.out
    assert command(*arguments).code == 2, "it is there already"
    assert command(*arguments, "--overwrite").code == 0
    assert command("inspect", tmp_path / "out", "--json").record["keep"] == []


def test_eval(command: Command, ref_llama: Path, work: Path) -> None:
    arguments = ["eval", work / "packed", "--against", ref_llama, "--text", work / "text.py"]
    arguments += ["--context", "64", "--windows", "8", "--batch", "4"]
    result = command(*arguments, "--json")
    record = result.record
    assert shape(record) == shape(documented("eval"))
    assert record["tokens"] == 8 * 63
    assert 0.2 * record["predicted_kl"] < record["kl"] < 5 * record["predicted_kl"]
    assert record["predicted_kl"] == json.loads((work / "plan.json").read_text())["predicted"]["kl"]
    assert record["size_bytes"] == (work / "packed" / "model.safetensors").stat().st_size
    table = command(*arguments)
    assert f"{record['kl']:.4g} ± {record['kl_stderr']:.2g}" in table.out
    assert "504 tokens in windows of 64 (GPTQ convention)" in table.out


def test_generate(command: Command, work: Path) -> None:
    arguments = ["generate", work / "packed", "-p", "def read_file(path):", "--max-new-tokens", "8", "--seed", "1"]
    record = command(*arguments, "--json").record
    assert shape(record) == shape(documented("generate"))
    assert record["tokens"] == 8
    streamed = command(*arguments)
    assert streamed.out == record["prompt"] + record["text"] + "\n"
    assert re.search(r"^8 tokens, first after [\d.]+ s, then [\d.]+ per second$", streamed.err, flags=re.MULTILINE)
    greedy = command(*arguments, "--temperature", "0", "--json").record["text"]
    assert command(*arguments, "--top-k", "1", "--seed", "2", "--json").record["text"] == greedy
    single = command(*arguments, "--max-new-tokens", "1", "--json").record
    assert single["tokens_per_second"] is None, "one token has no speed, and JSON no NaN"


def test_chat(command: Command, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["chat", work / "packed", "--system", "Be brief.", "--max-new-tokens", "6", "--seed", "1"]
    for ending in ("", "\nnever asked\n"):  # the end of the input, or an empty line
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nclass A:\n" + ending))
        record = command(*arguments, "--json").record
        assert shape(record) == shape(documented("chat"))
        messages = record["messages"]
        assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
        assert [message["content"] for message in messages[:4:3]] == ["Be brief.", "class A:"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nclass A:\n"))
    assert command(*arguments).out == "".join(messages[i]["content"] + "\n" for i in (2, 4))


def test_logs_and_warnings_of_others_stay_out_of_the_way(command: Command, work: Path) -> None:
    kernels.set_up()  # says which kernels run, once per process
    result = command("generate", work / "packed", "--prompt", "x " * 2000)
    assert result.code == 2
    assert result.out == ""
    assert re.fullmatch(r"error: the prompt has \d+ tokens, but the model has room for 1024; shorten it\n", result.err)


# --------------------------------------------------------------------------------------------------- as a real process


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `python -m waterfill …` in an empty directory."""
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: str | Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "waterfill", *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"},
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def test_a_pipe_gets_the_text_and_nothing_else(start: Callable[..., subprocess.Popen[str]], work: Path) -> None:
    process = start("inspect", work / "packed", "--json")
    out, err = process.communicate(timeout=300)
    assert (process.returncode, [json.loads(line)["done"] for line in err.splitlines()]) == (0, [0, 1])
    assert json.loads(out)["size_bytes"] == (work / "packed" / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (click.Abort(), 130, "interrupted"),
        (MemoryError(), 2, "there is not enough memory; free some, or ask for less at a time"),
        (click.UsageError("No such option '--x'."), 2, "No such option '--x'; try waterfill inspect --help"),
        (OSError(28, "No space left on device"), 2, "[Errno 28] No space left on device"),
        (ValueError("odd"), None, "a fault of waterfill: ValueError, odd; please report it"),
    ],
)
def test_whatever_ends_a_command_is_an_object(
    error: BaseException, code: int | None, sentence: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(api, "inspect", fail)
    if code is None:  # a traceback on standard error, which is what one reports
        printed = io.StringIO()
        monkeypatch.setattr(console, "print_json", lambda record: printed.write(json.dumps(record)))
        with pytest.raises(type(error)):
            command("inspect", "x", "--json")
        assert json.loads(printed.getvalue()) == {"error": sentence}
        return
    result = command("inspect", "x", "--json")
    assert (result.code, result.record) == (code, {"error": sentence})
    assert result.events[-1] == {"event": "error", "message": sentence}
    plain = command("inspect", "x")
    assert (plain.code, plain.out) == (code, "")
    assert plain.err.strip().removeprefix("error: ") == sentence


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full disk")
def test_standard_output_on_a_full_disk(work: Path) -> None:
    for arguments in (["inspect", str(work / "packed"), "--json"], ["inspect", "missing", "--json"]):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "waterfill", *arguments],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
        assert done.returncode == 2
        assert json.loads(done.stderr.splitlines()[-1])["event"] == "error"


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_ends_quietly(start: Callable[..., subprocess.Popen[str]], work: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits SIG_IGN
    process = start("generate", work / "packed", "-p", "def f(", "--max-new-tokens", "900", "--temperature", "1")
    signal.signal(signal.SIGINT, before)
    assert process.stdout is not None
    assert process.stdout.read(len("def f(")) == "def f("
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in err
