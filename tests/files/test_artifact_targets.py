"""Where an artifact may be written, and calls of the writer that are wrong."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.artifact_samples import (
    CONFIG,
    FILES,
    build,
    content,
    directory_bytes,
    fill,
    model,
    names_in,
    packed,
    raw,
)
from waterfill.base.errors import ArtifactError
from waterfill.files.artifact import ArtifactWriter, Layout, lay_out, open_artifact


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


# ------------------------------------------------------------------------------------------------- where it may write


def test_existing_output(tmp_path: Path, layout: Layout, expected: dict[str, bytes]) -> None:
    out = build(tmp_path / "out", [raw("old", "F32", 1)])
    before = directory_bytes(out)
    with pytest.raises(ArtifactError, match="exists already; give another output"):
        ArtifactWriter(out, layout, "plan")
    with ArtifactWriter(out, layout, "plan", overwrite=True) as writer:
        for tensor in writer.pending():
            fill(writer, tensor)
        assert directory_bytes(out) == before
        writer.publish(FILES)
    assert directory_bytes(out) == expected
    assert names_in(tmp_path) == ["out", "undisturbed"]


def test_only_artifacts_are_overwritten(tmp_path: Path, layout: Layout) -> None:
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match="not a packed model"):
        ArtifactWriter(precious, layout, "plan", overwrite=True)
    with pytest.raises(ArtifactError, match="not a packed model"):
        ArtifactWriter(precious / "thesis.tex", layout, "plan", overwrite=True)
    assert names_in(tmp_path) == ["home"]


def test_empty_directory_and_missing_parents_are_fine(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    open_artifact(build(tmp_path / "empty"))
    open_artifact(build(tmp_path / "a" / "b" / "c"))
    assert names_in(tmp_path) == ["a", "empty"]


def test_two_writers(tmp_path: Path, layout: Layout) -> None:
    pytest.importorskip("fcntl")
    out = tmp_path / "out"
    with ArtifactWriter(out, layout, "plan"), pytest.raises(ArtifactError, match="written by another process"):
        ArtifactWriter(out, layout, "plan", overwrite=True)
    build(out, layout)


def test_lock_on_a_ledger_that_was_just_removed(
    tmp_path: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between our opening and locking it, its holder may finish and remove it: the lock would be on nothing."""
    fcntl = pytest.importorskip("fcntl")
    ledger = tmp_path / "out.partial" / "ledger.jsonl"
    lock = fcntl.flock
    for what_remains in ("nothing", "another run's"):

        def late_lock(file: Any, how: int, what_remains: str = what_remains) -> None:
            ledger.unlink()
            if what_remains != "nothing":
                ledger.touch()
            lock(file, how)

        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "flock", late_lock)
            with pytest.raises(ArtifactError, match="written by another process"):
                ArtifactWriter(tmp_path / "out", layout, "plan")


def test_disk_too_small(tmp_path: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    needed = sum(tensor.size_bytes for tensor in model())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(ArtifactError, match=f"needs {needed} more bytes and its disk has {needed - 1} free"):
        ArtifactWriter(tmp_path / "out", layout, "plan")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    build(tmp_path / "out", layout)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_disk_fills_up(tmp_path: Path) -> None:
    layout = lay_out([raw("a", "F32", 2)])
    with ArtifactWriter(tmp_path / "out", layout, "plan") as writer:
        shard = tmp_path / "out.partial" / "artifact" / "model.safetensors"
        shard.unlink()
        shard.symlink_to("/dev/full")
        with pytest.raises(ArtifactError, match=r"model\.safetensors .*No space left.*free some space and run again"):
            writer.write("a", 0, bytes(8))


# ------------------------------------------------------------------------------------------------------ wrong calls


def test_wrong_calls_are_refused(tmp_path: Path) -> None:
    layout = lay_out([raw("a", "F32", 2), packed("p", 1, 2, 2)])
    with ArtifactWriter(tmp_path / "out", layout, "plan") as writer:
        with pytest.raises(ArtifactError, match=r"'b' is not a buffer"):
            writer.write("b", 0, bytes(8))
        for offset, size in [(-1, 4), (4, 5), (9, 0), (0, 9)]:
            with pytest.raises(ArtifactError, match="of buffer 'a' cannot be written"):
                writer.write("a", offset, bytes(size))
        writer.write("a", 0, bytes(4))
        with pytest.raises(ArtifactError, match="4 of the 8 bytes of 'a' were written"):
            writer.complete("a")
        writer.write("a", 4, torch.ones(2, 1, dtype=torch.bfloat16).t())
        for exponent, t2 in [(10_000, 0.1), (0, -0.1), (0, float("nan")), (0, float("inf")), (0, 1e6)]:
            with pytest.raises(ArtifactError, match="tensor 'a'"):
                writer.complete("a", exponent=exponent, t2=t2)
        writer.complete("a")
        with pytest.raises(ArtifactError, match="'a' is not pending"):
            writer.complete("a")
        with pytest.raises(ArtifactError, match="must not be complete"):
            writer.write("a", 0, bytes(4))
        with pytest.raises(ArtifactError, match="1 tensors are not complete, first 'p'"):
            writer.publish(FILES)
        fill(writer, writer.pending()[0])
        for name in ["../x", "/x", "a/b", ".x", "", "waterfill.json", "x.safetensors", "model.safetensors.index.json"]:
            with pytest.raises(ArtifactError):
                writer.publish({name: b""})
        with pytest.raises(ArtifactError, match="No such file"):
            writer.publish({"config.json": tmp_path / "absent"})
        writer.publish(FILES)
    assert open_artifact(tmp_path / "out").read("a").view(torch.uint8).tolist() == [0, 0, 0, 0, 128, 63, 128, 63]


def test_extra_files_are_copied(tmp_path: Path, layout: Layout) -> None:
    (tmp_path / "source").write_bytes(CONFIG)
    with ArtifactWriter(tmp_path / "out", layout, "plan") as writer:
        for tensor in writer.pending():
            fill(writer, tensor)
        out = writer.publish({"config.json": tmp_path / "source"})
    assert (out / "config.json").read_bytes() == CONFIG
    assert open_artifact(out).read("embed.codes").numpy().tobytes() == content(model()[0].buffers[1])
