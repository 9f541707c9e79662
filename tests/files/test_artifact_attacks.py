"""Hostile files are refused with a reason, and without allocating what they claim."""

from __future__ import annotations

import json
import os
import re
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.attacks.shards import ATTACKS, SOUND, coded, guard, header, metadata_text, seal
from tests.support.artifact_samples import build, model, packed, raw
from waterfill.base.errors import ArtifactError
from waterfill.files.artifact import open_artifact, read_shard_metadata
from waterfill.files.artifact.header import MAX_HEADER_BYTES

INDEX = "model.safetensors.index.json"


@contextmanager
def _refused(message: str, limit_bytes: int = 4_000_000) -> Iterator[None]:
    """Expect an `ArtifactError` that says `message`, from less than `limit_bytes` of memory."""
    tracemalloc.start()
    try:
        with pytest.raises(ArtifactError, match=message) as caught:
            yield
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < limit_bytes
    assert len(str(caught.value)) < 1500


def test_the_unchanged_shard_is_sound(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(SOUND)
    artifact = open_artifact(tmp_path, verify=False)
    artifact.verify()
    assert list(artifact.tensors) == ["norm.weight", "proj"]


@pytest.mark.parametrize("content", [coded(), guard()])
def test_what_other_attacks_change_is_sound(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert open_artifact(tmp_path, verify=False).tensors["proj"].size_bytes == 8


@pytest.mark.parametrize("filling", ["[],", "1,", '"a",', '{"a":[1]},'])
def test_a_header_of_very_many_values_costs_little_more_than_itself(tmp_path: Path, filling: str) -> None:
    text = header(metadata_text({}), ',"a":[' + filling * (12_000_000 // len(filling)) + "0]")
    (tmp_path / "model.safetensors").write_bytes(seal(text))
    with _refused("its JSON holds more than 2097152 values", limit_bytes=4 * len(text)):
        read_shard_metadata(tmp_path / "model.safetensors")


def test_a_header_of_very_many_tensors_is_refused_before_any_is_made(tmp_path: Path) -> None:
    record = {"codec": "raw", "shape": [0], "dtype": "U8", "params": {}, "digests": {}}
    text = header(metadata_text({f"t{i}": record for i in range(40_000)}), "")
    (tmp_path / "model.safetensors").write_bytes(seal(text))
    with _refused("holds 40000 tensors, more than 32768", limit_bytes=20 * len(text)):
        read_shard_metadata(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ATTACKS)
def test_hostile_shard(tmp_path: Path, name: str) -> None:
    content, message = ATTACKS[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with _refused(rf"^{re.escape(str(path))} is refused: .*({message})"):
        read_shard_metadata(path)
    with _refused("is refused"):
        open_artifact(tmp_path, verify=False)


# ------------------------------------------------------------------------------------------------- whole directories


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return build(tmp_path / "out", model(), shard_bytes=100)


def _change_index(out: Path, **changes: object) -> None:
    index = json.loads((out / INDEX).read_text())
    (out / INDEX).write_text(json.dumps({**index, **changes}))


def _weight_map(out: Path) -> dict[str, str]:
    mapping: dict[str, str] = json.loads((out / INDEX).read_text())["weight_map"]
    return mapping


@pytest.mark.parametrize(
    "name",
    [
        "../evil.safetensors",
        "/etc/passwd",
        "sub/model-00001-of-00002.safetensors",
        "model.safetensors",
        "",
        "a\0b",
        "x" * 10**6,
    ],
)
def test_index_that_leads_elsewhere(sharded: Path, name: str) -> None:
    _change_index(sharded, weight_map={**_weight_map(sharded), "flag": name})
    with _refused("index.json is refused: it names the shard"):
        open_artifact(sharded, verify=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_map": {}}, "not numbered"),
        ({"weight_map": []}, "maps no buffers"),
        ({"weight_map": {"flag": 1}}, "maps no buffers"),
        (
            {"weight_map": {"a": "model-00001-of-00009.safetensors", "b": "model-00009-of-00009.safetensors"}},
            "not numbered",
        ),
        ({"metadata": {"total_size": 10**12}}, "total_size"),
        ({"metadata": {}}, "total_size"),
        ({"more": 1}, "other fields"),
    ],
)
def test_index_that_is_wrong(sharded: Path, changes: dict[str, object], message: str) -> None:
    _change_index(sharded, **changes)
    with _refused(message):
        open_artifact(sharded, verify=False)


def test_index_that_disagrees_with_the_shards(sharded: Path) -> None:
    sound = _weight_map(sharded)
    other = {**sound, "flag": next(file for file in sound.values() if file != sound["flag"])}
    less = {buffer: file for buffer, file in sound.items() if buffer != "flag"}
    for weight_map in (other, less, {**sound, "zero": sound["flag"]}):
        _change_index(sharded, weight_map=weight_map)
        with _refused("does not agree with the shards about buffer '(flag|zero)'"):
            open_artifact(sharded, verify=False)


@pytest.mark.parametrize("name", [INDEX, "waterfill.json"])
def test_small_files_that_are_not_small(sharded: Path, name: str) -> None:
    for content, message in [
        (b"", "does not parse"),
        (b"[]", "not an object"),
        (b"{}", "is refused"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"\xff\xfe{}", "does not parse"),
    ]:
        (sharded / name).write_bytes(content)
        with _refused(message):
            open_artifact(sharded)
    with (sharded / name).open("wb") as file:
        file.truncate(10**12)  # sparse: takes no room on the disk
    with _refused("larger than 64000000 bytes"):
        open_artifact(sharded)


def test_buffer_in_two_shards(tmp_path: Path) -> None:
    out = build(tmp_path / "out", [raw("a", "F32", 1), packed("p", 1, 2, 2)], shard_bytes=4)
    copy = build(tmp_path / "copy", [raw("a", "F32", 1), raw("b", "F32", 1)], shard_bytes=4)
    for source, target in [(out, out), (copy, out)]:
        first = (source / "model-00001-of-00002.safetensors").read_bytes()
        (target / "model-00002-of-00002.safetensors").write_bytes(first)
        with _refused(r"model-00002-of-00002\.safetensors is refused: 'a' is also in model-00001-of-00002"):
            open_artifact(out, verify=False)


def test_single_shard_beside_an_index(sharded: Path) -> None:
    (sharded / "model.safetensors").write_bytes(SOUND)
    with _refused("programs disagree"):
        open_artifact(sharded, verify=False)


def test_manifest_that_leads_elsewhere(tmp_path: Path) -> None:
    out = build(tmp_path / "out")
    manifest = json.loads((out / "waterfill.json").read_text())
    for name in ("../secret", "/etc/passwd", "..", ".hidden", "a\\b", "C:x", "a/b", "", "x" * 300):
        changed = {**manifest, "files": {**manifest["files"], name: {"digest": "0" * 16, "size_bytes": 0}}}
        (out / "waterfill.json").write_text(json.dumps(changed))
        with _refused("is not a plain file name"):
            open_artifact(out)
    for entry in (
        1,
        {},
        {"digest": "x", "size_bytes": 0},
        {"digest": "0" * 16, "size_bytes": -1},
        {"digest": "0" * 16, "size_bytes": True},
    ):
        (out / "waterfill.json").write_text(json.dumps({**manifest, "files": {"config.json": entry}}))
        with _refused("entry for 'config.json' is malformed"):
            open_artifact(out)
    for changed, message in [
        ({"version": 2}, "version 2"),
        ({"more": 1}, "own digest"),
        ({"shards": []}, "lists no files"),
    ]:
        (out / "waterfill.json").write_text(json.dumps({**manifest, **changed}))
        with _refused(message):
            open_artifact(out)


def test_things_that_are_not_files(tmp_path: Path) -> None:
    with _refused("is not a directory"):
        open_artifact(tmp_path / "absent")
    with _refused(r"model\.safetensors cannot be read or written \(No such file"):
        open_artifact(tmp_path)
    (tmp_path / "model.safetensors").mkdir()
    with _refused("not a regular file"):
        open_artifact(tmp_path)
    out = build(tmp_path / "out")
    (out / "config.json").unlink()
    (out / "config.json").mkdir()
    with _refused(r"config\.json is refused: it is not a regular file"):
        open_artifact(out)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with _refused("not a regular file"):
        open_artifact(tmp_path)


def test_large_header_within_a_large_file(tmp_path: Path) -> None:
    """A length that the file could hold is believed only after the first bytes are those of a waterfill shard."""
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(MAX_HEADER_BYTES.to_bytes(8, "little"))
        file.truncate(10**12)
    with _refused("does not begin as a waterfill shard does"):
        read_shard_metadata(path)


def test_shard_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(SOUND)
    artifact = open_artifact(tmp_path, verify=False)
    (tmp_path / "model.safetensors").write_bytes(SOUND[:-2])
    with _refused("ends inside buffer 'proj.codes'"):
        artifact.read("proj.codes")
    with _refused("ends 2 bytes early"):
        artifact.verify()
