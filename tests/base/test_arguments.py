"""Values of the Python functions: whatever is given in the place of an argument, what comes back is one sentence."""

from __future__ import annotations

import errno
import os
import resource
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import waterfill
from tests.support.commands import Command
from waterfill import api
from waterfill.api import PlanOptions, ProbeOptions
from waterfill.base import reading as files
from waterfill.base.errors import BudgetError, WaterfillError
from waterfill.base.writing import write_file
from waterfill.planning.budget import parse_size
from waterfill.planning.probe import Probe
from waterfill.running.text.sampling import Sampling
from waterfill.studies.comparison.study import CompareOptions

WRONG: dict[str, list[Any]] = {
    "number": [True, "3", [3], 10**400, float("nan"), float("inf"), 3 + 0j, torch.ones(2)],
    "count": [True, "3", 2.0, 0, -1, 10**23, float("nan"), [3]],
    "share": [True, "half", "", "%", 0, -0.1, 1.0, "100%", float("nan"), float("inf"), [0.1]],
    "seed": [True, "3", 2.0, -1, 10**23],
    "flag": [0, 1, "yes", "no"],
    "texts": ["lm_head", 3, [3], b"x", {"x": 1}.values()],
    "choice": ["x", "", 3, ["auto"]],
    "path": ["", 3, b"x", "a\0b", ["a"]],
    "size": [True, [3], 3 + 0j, float("nan"), float("inf"), 10**400],
    "revision": ["", 3, ["main"]],
    "disk": [None, True, 3, 5e8, b"1GB/s", ["1GB/s"]],
    "function": [3, "print"],
    "tuning": [None, 3, {"slots": 4}],
    "rates": [True, 3, 3.0, "", "3", "3,x", [True, 3], ["2", "3"], [float("nan"), 3], [2], b"2,3", {"x": 2}],
    "cache bits": [True, 4.0, 0, 6, 32, "", "x", "4,", "4,4,4", "4.0", [], [4, 4, 4], [4, 6], (True, 4), {"k": 4}],
}
KIND = {
    **dict.fromkeys(("size", "memory"), "size"),
    **dict.fromkeys(("bits", "max_kl", "speed", "rate"), "number"),
    "rates": "rates",
    **dict.fromkeys(("sequences", "length", "context", "stride", "max_windows", "batch", "limit", "shots"), "count"),
    **dict.fromkeys(("prompt_tokens", "new_tokens", "max_new_tokens", "logits", "calibration_tokens"), "count"),
    **dict.fromkeys(
        ("lossless", "uniform", "overwrite", "match", "cache", "chat_template", "efficiency", "quick"), "flag"
    ),
    **dict.fromkeys(("verify", "streamed"), "flag"),
    **dict.fromkeys(("keep", "tie", "codecs", "prompts", "methods"), "texts"),
    **dict.fromkeys(("gain", "purpose", "probe", "method", "alpha", "convention", "feedback", "memory_form"), "choice"),
    **dict.fromkeys(
        ("text", "save", "output", "against", "original", "calibration", "calibrate", "sensitivity", "plan"), "path"
    ),
    **dict.fromkeys(("model", "out", "artifact"), "path"),
    "seed": "seed",
    "precision": "share",
    "revision": "revision",
    "disk": "disk",
    "progress": "function",
    "tuning": "tuning",
    "kv": "cache bits",
}
# Function, usual arguments in order, their names, the TypedDict of its options, and its other options.
FUNCTIONS: list[tuple[Callable[..., Any], dict[str, Any], Any, str]] = [
    (waterfill.plan, {"model": "MODEL"}, PlanOptions, "save progress"),
    (waterfill.pack, {"model": "MODEL", "out": "out"}, PlanOptions, "plan overwrite progress"),
    (waterfill.sensitivity, {"model": "MODEL"}, ProbeOptions, "keep progress"),
    (waterfill.inspect, {"artifact": "MODEL"}, None, "verify"),
    (waterfill.load, {"artifact": "MODEL"}, None, "verify memory memory_form rate streamed logits tuning"),
    (waterfill.Engine, {"artifact": "MODEL"}, None, "verify memory memory_form rate streamed tuning kv"),
    (
        waterfill.evaluate,
        {"model": "MODEL"},
        None,
        "against text context convention stride max_windows batch memory memory_form rate cache limit chat_template "
        "efficiency prompt_tokens new_tokens revision progress",
    ),
    (
        waterfill.compare,
        {"model": "MODEL", "text": "text"},
        CompareOptions,
        "methods match context max_windows batch progress",
    ),
    (
        waterfill.report,
        {"artifact": "MODEL"},
        None,
        "output original text context max_windows batch prompts max_new_tokens revision progress",
    ),
]


def cases() -> list[Any]:
    return [
        pytest.param(function, usual, name, id=f"{function.__name__}-{name}")
        for function, usual, options, names in FUNCTIONS
        for name in [*usual, *names.split(), *(options.__annotations__ if options else ())]
    ]


@pytest.mark.parametrize(("function", "usual", "name"), cases())
def test_wrong_values(function: Callable[..., Any], usual: dict[str, Any], name: str, ref_llama: Path) -> None:
    for value in WRONG[KIND[name]]:
        given = {key: str(ref_llama) if part == "MODEL" else part for key, part in usual.items()} | {name: value}
        places = [given.pop(key) for key in usual]
        with pytest.raises(WaterfillError) as caught:
            function(*places, **given)
        sentence = str(caught.value)
        assert "\n" not in sentence
        assert name in sentence or (KIND[name] in ("size", "number") and "--" in sentence) or "not a size" in sentence


def test_unknown_options_are_no_options(ref_llama: Path) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'sise'"):
        waterfill.plan(ref_llama, sise=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'batch'"):
        waterfill.plan(ref_llama, bits=3.0, batch=2)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", ["max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed"])
def test_wrong_sampling(name: str) -> None:
    wrong = [True, "1", -1, 10**400, float("nan"), float("inf"), [1]]
    wrong += {"temperature": [1e-45, 1e30], "repetition_penalty": [0, 1e-320, 1e30], "top_p": [0, 1.1]}.get(name, [0.5])
    for value in wrong:
        with pytest.raises(WaterfillError, match=f"^{name} is "):
            Sampling(**{name: value})
    Sampling(**{name: np.int64(1)})


def test_sizes_as_numbers() -> None:
    assert [parse_size(size) for size in (3_500_000, 3.5e6, "3.5e6", np.float64(3.5e6), np.int32(9))] == [
        3_500_000
    ] * 4 + [9]
    for size in (-1, True, float("nan"), 10**400):
        with pytest.raises(BudgetError, match="is not a size"):
            parse_size(size)


def test_probes_beyond_all_bounds(llama: Path) -> None:
    with pytest.raises(WaterfillError, match="use fewer or shorter"):
        Probe(sequences=2**31 - 1, length=512)
    measured = waterfill.sensitivity(llama, probe="random", sequences=2, length=2, seed=2**63 - 1)
    assert measured.probe["seed"] == 2**63 - 1


# -------------------------------------------------------------------------------------------------- files of the user's


def test_a_full_disk_leaves_what_was_there(command: Command, work: Path, ref_llama: Path, tmp_path: Path) -> None:
    """Of `plan --save` and of `report`: no cut file, no other one beside it."""
    (tmp_path / "plan.json").write_text("before")
    (tmp_path / "page.html").write_text("before")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        reuse = ["--sensitivity", work / "plan.sensitivity.json"]
        planned = command("plan", ref_llama, "--bits", "4", *reuse, "--save", tmp_path / "plan.json")
        reported = command("report", work / "packed", "--output", tmp_path / "page.html")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    for result, name in ((planned, "plan.json"), (reported, "page.html")):
        assert result.code == 2
        assert f"cannot write {tmp_path / name} (File too large)" in result.err
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {
        "plan.json": "before",
        "page.html": "before",
    }


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_files_are_written_whole_or_not_at_all(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a" / "file"
    write_file(target, "first")
    target.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to(target)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(*{"fsync": (os, "fsync"), "replace": (Path, "replace")}[step], full)
        with pytest.raises(WaterfillError, match=r"cannot write .*/link \(No space left on device\); free some space"):
            write_file(link, "second")
    assert [file.read_text() for file in target.parent.iterdir()] == ["first"]
    write_file(link, "third")
    assert (target.read_text(), link.is_symlink(), stat.S_IMODE(target.stat().st_mode)) == ("third", True, 0o640)


@pytest.mark.skipif(sys.platform == "win32", reason="pipes")
def test_what_is_no_regular_file(tmp_path: Path) -> None:
    """A pipe is not waited for; one that somebody reads is written to; devices stay what they are."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match=r"regular|directory"):
            files.read_text(path)
    for path, sentence in (
        (pipe, "No such device"),
        (tmp_path, "Is a directory"),
        (tmp_path / ("x" * 300), "too long"),
    ):
        with pytest.raises(WaterfillError, match=sentence):
            write_file(path, "x")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    while not read:
        try:
            write_file(pipe, "said")
        except WaterfillError:  # the reader has not begun
            continue
        reader.join()
    assert read == ["said"]
    write_file(Path(os.devnull), "x")
    assert Path(os.devnull).is_char_device()


def test_nothing_is_packed_over_the_current_directory(
    ref_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for out in ("", ".", tmp_path):
        with pytest.raises(WaterfillError, match=r"out is ''|current directory"):
            api.pack(ref_llama, out, lossless=True)
    assert list(tmp_path.iterdir()) == []
    assert Path.cwd() == tmp_path
