"""Writing an artifact: interrupted anywhere, it continues to the same bytes; nothing else is ever overwritten."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.artifact_samples import FILES, build, directory_bytes, fill, model, names_in, packed, raw
from waterfill.base.errors import ArtifactError
from waterfill.files.artifact import ArtifactWriter, Layout, check_target, lay_out, open_artifact
from waterfill.files.artifact.ledger import Ledger
from waterfill.files.artifact.writer import _untidied


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


# ---------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("finished", range(8))
@pytest.mark.parametrize("midway", [False, True])
def test_abandoned_run_is_continued(
    tmp_path: Path, layout: Layout, expected: dict[str, bytes], finished: int, midway: bool
) -> None:
    out = tmp_path / "out"
    with ArtifactWriter(out, layout, "plan") as writer:
        order = writer.pending()
        for tensor in order[:finished]:
            fill(writer, tensor)
        if midway and finished < len(order):
            buffer = order[finished].buffers[-1]
            writer.write(buffer.name, 1, b"\xff" * (buffer.size_bytes - 1))  # to be overwritten by the next run
    with ArtifactWriter(out, layout, "plan") as writer:
        assert writer.pending() == order[finished:]
        for tensor in writer.pending():
            fill(writer, tensor)
        writer.publish(FILES)
    assert directory_bytes(out) == expected
    assert names_in(tmp_path) == ["out", "undisturbed"]


class Killed(BaseException):
    """What a kill looks like from inside: nothing after it runs."""


def _kill_at(step: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Raise `Killed` before the `step`-th call that changes the disk; returns the calls made, as they are made."""
    calls: list[str] = []

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) == step:
                raise Killed
            return function(*args, **options)

        return call

    for owner, name in [
        (os, "fsync"),
        (Path, "rename"),
        (Path, "unlink"),
        (Path, "mkdir"),
        (Path, "rmdir"),
        (Path, "write_bytes"),
        (shutil, "rmtree"),
        (ArtifactWriter, "write"),
    ]:
        monkeypatch.setattr(owner, name, watched(name, getattr(owner, name)))
    return calls


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_every_step(tmp_path: Path, expected: dict[str, bytes], layout: Layout, overwrite: bool) -> None:
    """At no moment is there half an artifact at `out`; with overwriting, there is always the old one or the new one."""
    step = 0
    while True:
        step += 1
        folder = tmp_path / str(step)
        out = folder / "out"
        folder.mkdir()
        old = directory_bytes(build(out, [raw("old", "F32", 1)])) if overwrite else None
        with pytest.MonkeyPatch.context() as monkeypatch:
            calls = _kill_at(step, monkeypatch)
            try:
                build(out, layout, overwrite=overwrite)
            except Killed:
                pass
            else:
                break
        if out.exists():
            assert directory_bytes(out) in (old, expected)
        elif overwrite:
            assert directory_bytes(folder / "out.partial" / "replaced") == old
        _recovers(folder, layout, overwrite, expected)
        build(out, layout, identity="another", overwrite=True)  # whatever a kill has left behind is no obstacle
        assert names_in(folder) == ["out"]
        shutil.rmtree(folder)
    assert calls.count("rename") == 1 + overwrite
    assert len(calls) > 40


def _recovers(folder: Path, layout: Layout, overwrite: bool, expected: dict[str, bytes]) -> None:
    """Whatever was left by a kill, the same run again ends well; behind the last rename also one killed in its turn."""
    left = Path(shutil.copytree(folder, folder.with_name("left")))
    for step in itertools.count(1):
        with pytest.MonkeyPatch.context() as monkeypatch:
            if _untidied(folder / "out"):
                _kill_at(step, monkeypatch)
            with suppress(Killed):
                build(folder / "out", layout, overwrite=overwrite)
                break
        if names_in(folder) != ["out"]:
            build(folder / "out", layout, overwrite=overwrite)
        assert directory_bytes(folder / "out") == expected
        assert names_in(folder) == ["out"]
        shutil.rmtree(folder)
        shutil.copytree(left, folder)
    shutil.rmtree(left)
    assert directory_bytes(folder / "out") == expected
    assert names_in(folder) == ["out"]


def test_an_artifact_of_another_run_is_not_taken_for_the_finished_one(tmp_path: Path, layout: Layout) -> None:
    """Tidying is completed only where everything says that it is this run's."""
    out, work = build(tmp_path / "out", layout), tmp_path / "out.partial"
    before = directory_bytes(out)
    other = {**FILES, "config.json": b"{}"}

    def publish(layout: Layout, files: dict[str, bytes], **options: Any) -> None:
        work.mkdir(exist_ok=True)  # empty: a kill between the ledger's removal and the folder's
        with ArtifactWriter(out, layout, "plan", **options) as writer:
            for tensor in writer.pending():
                fill(writer, tensor)
            writer.publish(files)

    publish(layout, FILES)
    for files, wanted in ((other, layout), (FILES, lay_out([raw("a", "F32", 1)]))):
        with pytest.raises(ArtifactError, match="exists already"):
            publish(wanted, files)
        assert directory_bytes(out) == before
    publish(layout, other, overwrite=True)
    assert directory_bytes(out)["config.json"] == b"{}"
    assert names_in(tmp_path) == ["out"]


def test_finished_run_with_other_files_now(tmp_path: Path, layout: Layout, expected: dict[str, bytes]) -> None:
    """Killed while it tidied up, and a file has changed since: with overwriting, weights are not packed again."""
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Ledger, "remove", lambda self: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            build(out, layout)
    files = {**FILES, "config.json": b"{}"}
    with pytest.raises(ArtifactError, match="exists already"), ArtifactWriter(out, layout, "plan") as writer:
        writer.publish(files)
    assert directory_bytes(out) == expected
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Ledger, "remove", lambda self: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            build(out, layout, overwrite=True, identity="new")
    with ArtifactWriter(out, layout, "new", overwrite=True) as writer:
        assert writer.pending() == ()
        writer.publish(files)
    assert directory_bytes(out)["config.json"] == b"{}"
    assert open_artifact(out).size_bytes == layout.size_bytes


def test_links_in_a_circle_and_the_current_directory_are_refused(
    tmp_path: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    circle, here = tmp_path / "circle", tmp_path / "here"
    circle.symlink_to("circle")
    here.mkdir()
    monkeypatch.chdir(here)
    for out, sentence in ((circle, "symbolic links"), (Path(), "current directory"), (here, "current directory")):
        with pytest.raises(ArtifactError, match=sentence):
            check_target(out, overwrite=True)
        with pytest.raises(ArtifactError, match=sentence):
            ArtifactWriter(out, layout, "plan", overwrite=True)
    assert names_in(tmp_path) == ["circle", "here"]


def test_old_artifact_moved_aside_by_a_kill_comes_back(tmp_path: Path) -> None:
    out = build(tmp_path / "out")
    before = directory_bytes(out)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(ArtifactWriter, "_check_space", lambda self: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            build(out, identity="new", overwrite=True)
    out.rename(tmp_path / "out.partial" / "replaced")
    with pytest.raises(ArtifactError, match="exists already"):
        ArtifactWriter(out, lay_out(model()), "new")
    assert directory_bytes(out) == before


def test_ledger_torn_at_every_byte(tmp_path: Path) -> None:
    layout = lay_out([raw("a", "F32", 1), packed("p", 1, 2, 2), packed("q", 1, 2, 2)])
    expected = directory_bytes(build(tmp_path / "undisturbed", layout))
    out, work = tmp_path / "out", tmp_path / "out.partial"
    with ArtifactWriter(out, layout, "plan") as writer:
        for tensor in writer.pending():
            fill(writer, tensor)
    half_done = tmp_path / "half"
    work.rename(half_done)
    whole = (half_done / "ledger.jsonl").read_bytes()
    assert whole.count(b"\n") == 4
    for length in range(len(whole)):
        shutil.copytree(half_done, work)
        (work / "ledger.jsonl").write_bytes(whole[:length])
        with ArtifactWriter(out, layout, "plan") as writer:
            assert len(writer.pending()) == 3 - max(0, whole[:length].count(b"\n") - 1)
            for tensor in writer.pending():
                fill(writer, tensor)
        with ArtifactWriter(out, layout, "plan") as writer:
            assert not writer.pending()
        assert directory_bytes(build(out, layout)) == expected
        shutil.rmtree(out)


def test_altered_ledger_line_is_not_believed(tmp_path: Path, layout: Layout, expected: dict[str, bytes]) -> None:
    out, ledger = tmp_path / "out", tmp_path / "out.partial" / "ledger.jsonl"
    with ArtifactWriter(out, layout, "plan") as writer:
        for tensor in writer.pending():
            fill(writer, tensor)
    lines = ledger.read_bytes().splitlines(keepends=True)
    lines[5] = lines[5].replace(b'"exponent":-5', b'"exponent":-4')  # still JSON, and only its digest knows better
    ledger.write_bytes(b"".join(lines))
    with ArtifactWriter(out, layout, "plan") as writer:
        assert len(writer.pending()) == len(model()) - 4
    assert directory_bytes(build(out, layout)) == expected


def test_lost_pages_are_packed_again(tmp_path: Path, layout: Layout, expected: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    with ArtifactWriter(out, layout, "plan") as writer:
        order = writer.pending()
        for tensor in order:
            fill(writer, tensor)
    shards = tmp_path / "out.partial" / "artifact"
    altered = shards / layout.shards[0].file
    data = bytearray(altered.read_bytes())
    data[layout.shards[0].header_bytes] ^= 1
    altered.write_bytes(data)
    (shards / layout.shards[1].file).write_bytes(b"")
    (shards / layout.shards[2].file).unlink()
    with ArtifactWriter(out, layout, "plan") as writer:
        assert writer.pending() == (order[0], *layout.shards[1].tensors, *layout.shards[2].tensors)
    assert directory_bytes(build(out, layout)) == expected


def test_files_of_an_unfinished_publish_do_not_stay(tmp_path: Path, expected: dict[str, bytes], layout: Layout) -> None:
    out = tmp_path / "out"
    with ArtifactWriter(out, layout, "plan") as writer:
        for tensor in writer.pending():
            fill(writer, tensor)
    (tmp_path / "out.partial" / "artifact" / "config.json").write_bytes(b"old")
    (tmp_path / "out.partial" / "artifact" / "vocab.txt").write_bytes(b"old")
    assert directory_bytes(build(out, layout)) == expected


def test_unfinished_run_of_another_plan(tmp_path: Path, layout: Layout, expected: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    with ArtifactWriter(out, layout, "plan") as writer:
        fill(writer, writer.pending()[0])
    with pytest.raises(ArtifactError, match=r"out\.partial holds an unfinished run of another plan.*rm -r"):
        ArtifactWriter(out, layout, "another plan")
    with pytest.raises(ArtifactError, match="another plan"):
        ArtifactWriter(out, lay_out(model()), "plan")  # same identity, other shards
    assert directory_bytes(build(out, layout, identity="another plan", overwrite=True)) == expected
