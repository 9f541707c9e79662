"""Pipes, devices and files without end in the place of a model's files: refused at once by all that read them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import waterfill
from tests.support.artifact_drafts import make_special
from tests.support.fuzz_samples import FIXED, pack_mixed
from tests.support.models import tiny_llama
from waterfill.base.errors import WaterfillError
from waterfill.base.reading import UnfitFileError, read_small
from waterfill.files.artifact import open_artifact
from waterfill.files.checkpoint import open_checkpoint
from waterfill.files.original import load_tokenizer
from waterfill.running.engine.engine import Engine

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
KINDS = ("pipe", "zero", "folder", "sparse")
READERS: dict[str, Callable[[Path], Any]] = {
    "open": open_artifact,
    "engine": Engine,
    "engine, unverified": lambda path: Engine(path, verify=False),
    "load": waterfill.load,
    "load, unverified": lambda path: waterfill.load(path, verify=False),
    "tokenizer": load_tokenizer,
}
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    return pack_mixed(tiny_llama(folder / "model", hidden=64, layers=1), folder / "out", FIXED)


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "copy"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", [*FILES, "waterfill.json", "model.safetensors"])
def test_special_files_are_refused_by_every_reader(copy: Path, file: str, kind: str) -> None:
    make_special(copy / file, kind)
    for name, reader in READERS.items():
        if name == "tokenizer" and file not in FILES[2:]:
            continue
        if "unverified" in name and file == "waterfill.json":
            continue
        with pytest.raises(WaterfillError):
            reader(copy)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_special_files_of_a_checkpoint_are_refused(llama: Path, file: str, kind: str) -> None:
    if "index" in file:
        (llama / "model.safetensors").unlink()
    make_special(llama / file, kind)
    with pytest.raises(WaterfillError):
        open_checkpoint(llama)


def test_links_to_regular_files_are_read(copy: Path, tmp_path: Path) -> None:
    """As in a hub's cache."""
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in copy.iterdir():
        (linked / file.name).symlink_to(file)
    waterfill.load(linked)
    Engine(linked)


def test_small_files_have_a_bound(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100)
    assert read_small(tmp_path / "a", 100) == b"x" * 100
    with pytest.raises(UnfitFileError, match="larger than 99 bytes"):
        read_small(tmp_path / "a", 99)
