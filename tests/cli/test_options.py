"""Hostile values for every option and argument of every command: one sentence, exit code 2, and nothing left behind.

The options are those that click knows of, so that a new one is tried as well.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

import waterfill
from tests.support import models
from tests.support.commands import Command
from waterfill import kernels
from waterfill.cli import main as cli

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pipes and signals")

HUGE = "9" * 23
NUMBERS = ["0", "-1", HUGE, "nan", "inf", "1e-320", "", "many"]
PATHS = ["", "missing", "folder", "circle", "pipe", "noise", "x" * 300, "a\nb"]
TEXTS = ["", "-1", "nan", HUGE, "pipe", "x" * 300, "a\nb"]
NEW = {"missing", "noise", "a\nb"}
# What is a value all the same.
SENSIBLE: dict[str, set[str]] = {
    **{key: {"0"} for key in ("seed", "temperature", "top_k", "shots", "steps")},
    **{key: {HUGE} for key in ("size", "memory", "bits", "sizes", "bits_per_weight")},
    **dict.fromkeys(("save", "save_reference", "output"), NEW),
    **{key: set(TEXTS) for key in ("system", "prompt", "prompts")},
    "max_kl": {"0", HUGE, "1e-320"},
    **{key: {"1e-320"} for key in ("top_p", "hold_out")},
    "out": {*NEW, "folder"},
}

TEXT = ["--text", "WORK/text", "--context", "8", "--windows", "1"]
MEASURED = ["--sensitivity", "WORK/plan.sensitivity.json"]
USUAL: dict[str, list[str]] = {
    "plan": ["WORK/model", "--bits", "4.5", *MEASURED],
    "pack": ["WORK/model", "out", "--bits", "4.5", *MEASURED],
    "inspect": ["WORK/packed"],
    "seal": ["WORK/packed"],
    "eval": ["WORK/packed", *TEXT, "--no-cache"],
    "prune": ["WORK/model", "out", "--keep-share", "0.8", "--sequences", "4", "--length", "8"],
    "compare": ["WORK/model", *TEXT, "--no-match", *MEASURED],
    "report": ["WORK/packed", "--original", "WORK/model"],
    "tune": ["WORK/packed", "out", "--text", "WORK/text", "--steps", "1", "--context", "8"],
    "generate": ["WORK/packed", "-p", "Once", "--max-new-tokens", "2"],
    "chat": ["WORK/packed", "--max-new-tokens", "2"],
}
SAME_AS = {"pack": "plan", "chat": "generate"}  # the decorators of many options are the same
INSTEAD = {**dict.fromkeys(("size", "bits", "rates", "max_kl", "plan_file"), "--bits"), "text": "--sensitivity"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its sensitivities, its artifact, and a text."""
    root = tmp_path_factory.mktemp("tiny")
    models.tiny_llama(root / "model", layers=1, tokenizer=True)
    made = waterfill.plan(
        root / "model",
        bits=4.5,
        codecs=["higgs-p1-n16"],
        probe="random",
        sequences=2,
        length=8,
        save=root / "plan.json",
    )
    waterfill.pack(root / "model", root / "packed", plan=made)
    (root / "text").write_text("Once upon a time there was a small model. " * 4)
    return root


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with what a path had better not be."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "noise").write_bytes(bytes(range(256)))
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    """Who reads a pipe waits for ever."""

    def late(*_: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def parameters() -> list[Any]:
    """(command, option or argument) of all that take a value."""
    known = {name: {each.name for each in command.params} for name, command in cli.commands.commands.items()}
    return [
        pytest.param(name, parameter, id=f"{name}-{parameter.name}")
        for name, command in cli.commands.commands.items()
        for parameter in command.params
        if not getattr(parameter, "is_flag", False) and parameter.name not in known.get(SAME_AS.get(name, ""), ())
    ]


def hostile(parameter: click.Parameter) -> list[str]:
    if isinstance(parameter.type, click.types.IntParamType | click.types.FloatParamType):
        values = NUMBERS
    elif isinstance(parameter.type, click.Choice):
        values = ["", "many"]
    else:
        values = PATHS if isinstance(parameter.type, click.Path) else TEXTS
    return [value for value in values if value not in SENSIBLE.get(str(parameter.name), ())]


@pytest.mark.parametrize(("name", "parameter"), parameters())
def test_hostile_values(name: str, parameter: click.Parameter, command: Command, tiny: Path, here: Path) -> None:
    kernels.set_up()  # logs which kernels run, once per process: not part of an error
    before = sorted(here.iterdir())
    for value in hostile(parameter):
        given = [part.replace("WORK", str(tiny)) for part in USUAL[name]]
        if parameter.name in INSTEAD and name in ("plan", "pack"):
            at = given.index(INSTEAD[parameter.name])
            del given[at : at + 2]
        if isinstance(parameter, click.Argument):
            given[["model", "out"].index(parameter.name) if parameter.name == "out" else 0] = value
        else:
            given += [parameter.opts[0], value]
        result = command(name, *given)
        assert result.code == 2, (value, result)
        assert re.fullmatch(r"(?s)error: .+\n", result.err), (value, result.err)
        assert sorted(here.iterdir()) == before, (value, "nothing is left behind")
