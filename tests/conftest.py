"""Shared fixtures: models, the command line, and optional reference data that lives outside the repository."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores; their threads would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WATERFILL_FEEDBACK"] = "none"  # plans are made by the hundred; what asks for feedback has it

import pytest
import torch
from hypothesis import settings

import waterfill
from tests.support.commands import SCALAR, Command, Result
from tests.support.models import tiny_llama
from tests.support.speeds import stated
from waterfill.cli import main as cli
from waterfill.cli import stages
from waterfill.files.architecture import Architecture, describe
from waterfill.files.checkpoint import open_checkpoint

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def ref_llama() -> Path:
    """The small trained Llama that the repository ships."""
    return REPOSITORY / "examples" / "ref-llama"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Directory with held-out text and published sensitivities; set WATERFILL_TEST_DATA to its parent."""
    root = Path(os.environ.get("WATERFILL_TEST_DATA", REPOSITORY.parent / "shared"))
    if not (root / "data").is_dir():
        pytest.skip(f"no reference data at {root} (set WATERFILL_TEST_DATA to a folder that holds data/)")
    return root / "data"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A tiny random Llama, for the test to spoil if it likes."""
    return tiny_llama(tmp_path / "llama")


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    """Architecture of a tiny Llama, which is all of a model that planning needs."""
    return describe(open_checkpoint(tiny_llama(tmp_path_factory.mktemp("dense"))))


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a command in this process: `command("plan", model, "--size", "3MB")`."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(stages, "FIRST_S", 3600.0)  # standard error does not depend on how fast a machine is

    def run(*arguments: str | Path) -> Result:
        monkeypatch.setattr(sys, "argv", ["waterfill", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory, ref_llama: Path) -> Path:
    """A directory with `plan.json`, `plan.sensitivity.json` and the artifact `packed`, of the example model; `text.py`,
    Python source as it was trained on; and `latin.txt`, which is not UTF-8."""
    root = tmp_path_factory.mktemp("cli")
    codecs = SCALAR[1::2]
    plan = waterfill.plan(ref_llama, size="3MB", codecs=codecs, sequences=4, length=64, save=root / "plan.json")
    waterfill.pack(ref_llama, root / "packed", plan=plan)
    (root / "text.py").write_text(Path(argparse.__file__).read_text("utf-8")[:20_000])
    (root / "latin.txt").write_bytes(b"caf\xe9 " * 99)
    return root


@pytest.fixture
def no_reader_left() -> Iterator[None]:
    """Threads that read ahead end with their model."""
    yield
    gc.collect()
    assert not [thread.name for thread in threading.enumerate() if thread.name == "waterfill-read"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What evaluations keep stays out of the user's folder, and out of other tests."""
    monkeypatch.setenv("WATERFILL_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def _stated_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans by speed are those of a machine that is stated: nothing is timed."""
    monkeypatch.setattr("waterfill.running.codec_speeds.measure", stated)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
