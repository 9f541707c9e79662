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
import torch

from tests.support.artifact_samples import CONFIG, FILES, build, content, directory_bytes, fill, model, packed, raw
from waterfill.base.errors import ArtifactError
from waterfill.files.artifact import ArtifactWriter, Layout, check_target, lay_out, open_artifact
from waterfill.files.artifact.ledger import Ledger
from waterfill.files.artifact.writer import _untidied

SHARDED = 40


@pytest.fixture
def layout() -> Layout:
    return lay_out(model(), shard_bytes=SHARDED)


@pytest.fixture
def expected(tmp_path: Path, layout: Layout) -> dict[str, bytes]:
    """The files of an undisturbed run."""
    return directory_bytes(build(tmp_path / "undisturbed", layout))


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


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
    assert _names(tmp_path) == ["out", "undisturbed"]


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
        assert _names(folder) == ["out"]
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
        if _names(folder) != ["out"]:
            build(folder / "out", layout, overwrite=overwrite)
        assert directory_bytes(folder / "out") == expected
        assert _names(folder) == ["out"]
        shutil.rmtree(folder)
        shutil.copytree(left, folder)
    shutil.rmtree(left)
    assert directory_bytes(folder / "out") == expected
    assert _names(folder) == ["out"]


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
    assert _names(tmp_path) == ["out"]


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
    assert _names(tmp_path) == ["circle", "here"]


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
    assert _names(tmp_path) == ["out", "undisturbed"]


def test_only_artifacts_are_overwritten(tmp_path: Path, layout: Layout) -> None:
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match="not a packed model"):
        ArtifactWriter(precious, layout, "plan", overwrite=True)
    with pytest.raises(ArtifactError, match="not a packed model"):
        ArtifactWriter(precious / "thesis.tex", layout, "plan", overwrite=True)
    assert _names(tmp_path) == ["home"]


def test_empty_directory_and_missing_parents_are_fine(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    open_artifact(build(tmp_path / "empty"))
    open_artifact(build(tmp_path / "a" / "b" / "c"))
    assert _names(tmp_path) == ["a", "empty"]


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
