"""The packed format: golden bytes, exact sizes, other readers, and that no truncation or flipped bit passes."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from tests.support.artifact_samples import build, content, directory_bytes, model, packed, raw
from waterfill.base.dtypes import ITEM_BYTES
from waterfill.base.errors import ArtifactError
from waterfill.files.artifact import (
    ArtifactWriter,
    Buffer,
    TensorSpec,
    lay_out,
    open_artifact,
    read_buffer,
    read_shard_metadata,
)
from waterfill.files.artifact.format import FormatError, guard_of
from waterfill.files.artifact.header import validate
from waterfill.files.artifact.manifest import decode_manifest

SHARDED = 40  # bytes per shard: `model()` then has four

# -------------------------------------------------------------------------------------------------------- golden

GOLDEN_METADATA = (
    '{"digest":"a7317f16a5b20031","version":1,"tensors":{'
    '"norm.weight":{"codec":"raw","shape":[2],"dtype":"F32","params":{"exponent":0,"t2":0.0},'
    '"digests":{"":"0a108fd7267a5566"}},'
    '"proj":{"codec":"demo","shape":[2,4],"dtype":"BF16","params":{"exponent":-3,"t2":0.125},'
    '"digests":{"scales":"d1fe2c4f7063574f","codes":"b1fbc5f1b6f7a8d1"}}}}'
)
GOLDEN_HEADER = (
    '{"__metadata__":{"format":"pt","waterfill":"' + GOLDEN_METADATA.replace('"', r"\"") + '"},'
    '"norm.weight":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    '"proj.scales":{"dtype":"F16","shape":[2,1],"data_offsets":[8,12]},'
    '"proj.codes":{"dtype":"U8","shape":[4],"data_offsets":[12,16]},'
    '"proj.weight":{"dtype":"U8","shape":[0],"data_offsets":[16,16]}}'
)
GOLDEN_DATA = bytes.fromhex("0000803f 00000040 003c003c 01020304")
GOLDEN_MANIFEST = (
    '{"digest":"0b1b6c92feab1acf","files":{"config.json":{"digest":"2fec7bffeff0b397","size_bytes":3}},'
    '"format":"waterfill","shards":{"model.safetensors":{"header":"a7317f16a5b20031","size_bytes":744}},"version":1}\n'
)


def golden(out: Path) -> Path:
    """The example of docs/format.md §8."""
    proj = TensorSpec(
        "proj", "demo", (2, 4), "BF16", (Buffer("proj.scales", "F16", (2, 1)), Buffer("proj.codes", "U8", (4,)))
    )
    with ArtifactWriter(out, lay_out([proj, raw("norm.weight", "F32", 2)]), "golden") as writer:
        writer.write("proj.scales", 0, torch.ones(2, 1, dtype=torch.float16))
        writer.write("proj.codes", 0, bytes([1, 2, 3, 4]))
        writer.write("norm.weight", 0, torch.tensor([1.0, 2.0]))
        writer.complete("proj", exponent=-3, t2=0.125)
        writer.complete("norm.weight")
        return writer.publish({"config.json": b"{}\n"})


def test_golden_bytes(tmp_path: Path) -> None:
    files = directory_bytes(golden(tmp_path / "out"))
    shard = files.pop("model.safetensors")
    assert shard[:8] == (720).to_bytes(8, "little")
    assert shard[8:728] == GOLDEN_HEADER.encode().ljust(720)
    assert shard[728:] == GOLDEN_DATA
    assert hashlib.blake2b(shard, digest_size=16).hexdigest() == "d88b47bedbacc37a77e561ec8bb1cf67"
    assert files == {"config.json": b"{}\n", "waterfill.json": GOLDEN_MANIFEST.encode()}


def test_specification_shows_the_golden_bytes() -> None:
    text = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
    shown = "".join(line.strip() for line in text.partition("## 8.")[2].splitlines() if line.startswith("    "))
    for expected in (GOLDEN_HEADER, GOLDEN_DATA.hex(), GOLDEN_MANIFEST.strip()):
        assert expected in shown


# ---------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("shard_bytes", [4_000_000_000, SHARDED, 1])
def test_round_trip(tmp_path: Path, shard_bytes: int) -> None:
    layout = lay_out(model(), shard_bytes=shard_bytes)
    out = build(tmp_path / "out", layout)
    artifact = open_artifact(out)
    assert artifact.size_bytes == layout.size_bytes == sum(f.stat().st_size for f in out.glob("model*"))
    assert sorted(artifact.files) == sorted(f.name for f in out.glob("model*"))
    assert len(artifact.files) == {4_000_000_000: 1, SHARDED: 5, 1: 8}[shard_bytes]
    by_name = {tensor.name: tensor for tensor in model()}
    assert list(artifact.tensors) == [
        "layers.0.q_proj.bias",  # raw: F32, then 2-byte elements as given, then U8
        "layers.0.norm.weight",
        "norm.weight",
        "flag",
        "embed",  # packed: execution order
        "layers.0.q_proj",
        "layers.0.mlp.experts.gate_up_proj.3",
    ]
    for name, stored in artifact.tensors.items():
        spec = by_name[name]
        assert (stored.codec, stored.shape, stored.dtype) == (spec.codec, spec.shape, spec.dtype)
        assert stored.exponent == (0 if spec.codec == "raw" else -len(name))
        assert stored.t2 == (0 if spec.codec == "raw" else float(f"{1 / len(name):.6e}"))
        for buffer, original in zip(stored.buffers, spec.buffers, strict=True):
            data = artifact.read(buffer.name)
            assert (buffer.name, buffer.dtype, buffer.shape) == (original.name, original.dtype, original.shape)
            assert tuple(data.shape) == original.shape
            assert data.contiguous().view(torch.uint8).numpy().tobytes() == content(original)
            assert buffer.file.read_bytes()[buffer.offset_bytes :][: buffer.size_bytes] == content(original)


def test_other_readers_see_the_same_values(tmp_path: Path) -> None:
    out = build(tmp_path / "out", shard_bytes=SHARDED)
    artifact = open_artifact(out)
    weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    seen = set()
    for file in sorted(set(weight_map.values())):
        with safe_open(out / file, framework="pt") as shard:
            assert shard.metadata()["format"] == "pt"
            metadata = read_shard_metadata(out / file)
            names, guards = [b.name for b in metadata.buffers], [metadata.guard] if metadata.guard else []
            assert list(shard.offset_keys()) == names + guards
            assert all(shard.get_tensor(name).shape == (0,) for name in guards)
            for name in names:
                assert weight_map[name] == file
                assert torch.equal(shard.get_tensor(name).view(torch.uint8), artifact.read(name).view(torch.uint8))
                seen.add(name)
    assert seen == set(weight_map) == {buffer.name for tensor in model() for buffer in tensor.buffers}
    assert not any(name.endswith(".weight") for t in artifact.tensors.values() if t.codec != "raw" for name in t.keys)


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    out = build(tmp_path / "out", [raw("scalar", "F32"), raw("none", "BF16", 0, 3), packed("p", 1, 2, 2)])
    artifact = open_artifact(out)
    assert artifact.read("scalar").shape == ()
    assert artifact.read("none").shape == (0, 3)


def test_every_dtype_in_its_place(tmp_path: Path) -> None:
    """Wide elements first, and what has an odd number of bytes where nothing follows that has to be aligned."""
    sizes = {"U8": 3, "BOOL": 4, "F16": 1, "I32": 3, "BF16": 3, "F32": 1, "I64": 3}
    specs = [raw("odd", "BOOL", 5), packed("p", 1, 2, 2), *(raw(dtype, dtype, n) for dtype, n in sizes.items())]
    artifact = open_artifact(build(tmp_path / "out", specs))
    assert list(artifact.tensors) == ["I64", "I32", "F32", "F16", "BF16", "BOOL", "p", "odd", "U8"]
    for spec in specs:
        for buffer in spec.buffers:
            assert artifact.read(buffer.name).view(-1).view(torch.uint8).numpy().tobytes() == content(buffer)


def test_unknown_buffer(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no buffer 'x\.codes'"):
        open_artifact(build(tmp_path / "out")).read("x.codes")


# --------------------------------------------------------------------------------------------------------- layout

_names = st.text("abcdefgh.0123456789_\"\\' ", min_size=1, max_size=30)
_raw = st.builds(
    lambda name, dtype, shape: raw(f"r{name}", dtype, *shape),
    _names,
    st.sampled_from(sorted(ITEM_BYTES)),
    st.lists(st.integers(0, 12), max_size=3),
)
_packed = st.builds(
    lambda name, codec, rows, counts: TensorSpec(
        f"p{name}",
        codec,
        (rows, 2 * rows),
        "F16",
        tuple(Buffer(f"p{name}.b_{i}", *kind(n)) for i, (kind, n) in enumerate(counts)),
    ),
    _names,
    st.text("abcxyz-0123456789", min_size=1, max_size=20),
    st.integers(1, 100_000),
    st.lists(
        st.tuples(st.sampled_from([lambda n: ("U8", (2 * n,)), lambda n: ("F16", (n, 1))]), st.integers(0, 900)),
        min_size=1,
        max_size=4,
    ),
)


@settings(max_examples=40)
@given(
    specs=st.lists(_raw | _packed, min_size=1, max_size=8, unique_by=lambda t: t.name),
    shard_bytes=st.integers(1, 6000),
    numbers=st.tuples(
        st.integers(-9999, 9999), st.floats(0, 900_000, exclude_max=True) | st.floats(0, 1e-90, allow_subnormal=True)
    ),
)
def test_predicted_size_is_the_written_size(
    specs: list[TensorSpec], shard_bytes: int, numbers: tuple[int, float]
) -> None:
    layout = lay_out(specs, shard_bytes=shard_bytes)
    with tempfile.TemporaryDirectory() as folder:
        with ArtifactWriter(Path(folder) / "out", layout, "plan") as writer:
            for tensor in writer.pending():
                for buffer in tensor.buffers:
                    writer.write(buffer.name, 0, content(buffer))
                writer.complete(tensor.name, exponent=numbers[0], t2=numbers[1])
            out = writer.publish({})
        assert sum(file.stat().st_size for file in out.glob("model*")) == layout.size_bytes
        artifact = open_artifact(out)
        assert artifact.size_bytes == layout.size_bytes
        assert {t.exponent for t in artifact.tensors.values()} == {numbers[0]}
        assert all(t.t2 == pytest.approx(numbers[1], rel=1e-6, abs=1e-300) for t in artifact.tensors.values())
        for stored in artifact.tensors.values():
            assert all(read_buffer(buffer).nbytes == buffer.size_bytes for buffer in stored.buffers)
        for shard in layout.shards:
            assert len(shard.tensors) == 1 or sum(t.size_bytes for t in shard.tensors) <= shard_bytes
            assert shard.header_bytes % 8 == 0


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "there are none"),
        ([raw("a", "F32", 2), raw("a", "F32", 2)], "'a' is given twice"),
        ([raw("p.codes", "F32", 2), packed("p", 1, 2, 2)], "'p.codes' is given twice"),
        ([raw("p.weight", "F32", 2), packed("p", 1, 2, 2)], "'p.weight' is both coded and kept"),
        ([packed("p", 1, 3, 3)], "'p.codes' has 3 bytes, which is odd"),
        ([raw("a", "I16", 3)], "dtype 'I16'"),
        ([raw("grün", "F32", 3)], "printable ASCII"),
        ([raw("", "F32", 3)], "printable ASCII"),
        ([raw("__metadata__", "F32", 3)], "cannot be the name"),
        ([raw("a", "F32", *[1] * 9)], "more than 8 dimensions"),
        ([raw("a", "F32", -2, -2)], "negative"),
        ([TensorSpec("a", "raw", (2,), "F32", (Buffer("a", "F32", (3,)),))], "raw tensor 'a'"),
        ([TensorSpec("a", "x", (2,), "F32", (Buffer("a.weight", "F32", (2,)),))], "'a.weight' of a packed tensor"),
        ([TensorSpec("a", "x", (2,), "F32", (Buffer("a", "F32", (2,)),))], "'a' of a packed tensor ends in ''"),
        ([TensorSpec("a", "x", (2,), "F32", (Buffer("b.codes", "F32", (2,)),))], "not named after its tensor 'a'"),
        ([TensorSpec("a", "x", (2,), "F32", ())], "has no buffer"),
        (
            [TensorSpec("a", "x", (2,), "F32", (Buffer("a.s", "F16", (1,)), Buffer("a.f", "F32", (2,))))],
            "'a.f' would not begin at a multiple",
        ),
    ],
)
def test_specs_that_break_a_rule_are_refused(specs: list[TensorSpec], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        lay_out(specs)


@pytest.mark.parametrize(
    ("names", "guard"),
    [
        (["m.embed", "m.layers.0.q"], "m.embed.weight"),
        (["m.experts.w.0", "m.layers.0.q"], "m.layers.0.q.weight"),
        (["m.experts.w.0", "m.experts.w.1"], "m.experts.w"),
        ([], None),
    ],
)
def test_guard_is_called_like_a_parameter(names: list[str], guard: str | None) -> None:
    found = guard_of([raw("norm.weight", "F32", 2), *(packed(name, 1, 2, 2) for name in names)])
    assert (None if found is None else found.name) == guard


def test_layout_of_a_large_model_is_pure_arithmetic() -> None:
    """A mixture of 25,000 experts' matrices of 600 MB each: nothing of that size is ever allocated."""
    specs = [
        packed(f"model.layers.{i // 256}.mlp.experts.gate_up_proj.{i % 256}", 4096, 7168, 4096 * 3584)
        for i in range(25_000)
    ]
    layout = lay_out(specs)
    assert sum(len(shard.tensors) for shard in layout.shards) == 25_000
    assert all(shard.size_bytes < 2**32 for shard in layout.shards)


# ---------------------------------------------------------------------------------------------- integrity, in whole


def _refused(path: Path) -> None:
    with pytest.raises(ArtifactError):
        open_artifact(path)


def _two_shards(out: Path) -> Path:
    return build(out, [raw("norm.weight", "BF16", 4), packed("p", 2, 4, 4), packed("q", 1, 4, 2)], shard_bytes=16)


@pytest.mark.parametrize("make", [golden, _two_shards])
def test_every_truncation_is_detected(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    out = make(tmp_path / "out")
    for name, whole in directory_bytes(out).items():
        for length in range(len(whole)):
            (out / name).write_bytes(whole[:length])
            _refused(out)
        (out / name).write_bytes(whole + b"\0")
        _refused(out)
        (out / name).unlink()
        _refused(out)
        (out / name).write_bytes(whole)
    open_artifact(out)


@pytest.mark.parametrize("make", [golden, _two_shards])
def test_a_flipped_bit_in_every_byte_is_detected(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    out = make(tmp_path / "out")
    chance = random.Random(0)
    for name, whole in directory_bytes(out).items():
        for position in range(len(whole)):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << chance.randrange(8)
            (out / name).write_bytes(flipped)
            _refused(out)
        (out / name).write_bytes(whole)
    open_artifact(out)


def test_every_flipped_bit_of_header_and_manifest_is_detected(tmp_path: Path) -> None:
    """In memory, where all bits can be tried."""
    files = directory_bytes(golden(tmp_path / "out"))
    shard, manifest = files["model.safetensors"], files["waterfill.json"]
    for bit in range(8 * 728):
        with pytest.raises(FormatError):
            validate(tmp_path, io.BytesIO(_flipped(shard, bit)), len(shard))
    for bit in range(8 * len(manifest)):
        with pytest.raises(FormatError):
            decode_manifest(_flipped(manifest, bit))
    assert validate(tmp_path, io.BytesIO(shard), len(shard)).tensors
    assert decode_manifest(manifest)


def _flipped(data: bytes, bit: int) -> bytes:
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


def test_a_shard_verifies_itself_without_the_manifest(tmp_path: Path) -> None:
    out = golden(tmp_path / "out")
    (out / "waterfill.json").unlink()
    (out / "config.json").unlink()
    with pytest.raises(ArtifactError, match=r"waterfill\.json is refused: it is missing"):
        open_artifact(out)
    shard = out / "model.safetensors"
    whole = shard.read_bytes()
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 0x10
        shard.write_bytes(flipped)
        if position < 728:
            with pytest.raises(ArtifactError, match=r"model\.safetensors"):
                open_artifact(out, verify=False)
        else:
            artifact = open_artifact(out, verify=False)
            damaged = {
                position < 736: "norm.weight",
                736 <= position < 740: "proj.scales",
                position >= 740: "proj.codes",
            }
            with pytest.raises(ArtifactError, match=f"buffer '{damaged[True]}' does not match"):
                artifact.read(damaged[True])
    shard.write_bytes(whole)
    artifact = open_artifact(out, verify=False)
    assert artifact.read("proj.codes").tolist() == [1, 2, 3, 4]


def test_a_shard_of_another_artifact_is_detected(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    build(ours, [raw("a", "F32", 2), packed("p", 1, 2, 2)])
    layout = lay_out([raw("a", "F32", 2), packed("p", 1, 2, 2)])
    with ArtifactWriter(theirs, layout, "other") as writer:
        for tensor in layout.shards[0].tensors:
            for buffer in tensor.buffers:
                writer.write(buffer.name, 0, bytes(buffer.size_bytes))
            writer.complete(tensor.name)
        writer.publish({})
    shutil.copy(theirs / "model.safetensors", ours)
    open_artifact(ours, verify=False)
    with pytest.raises(ArtifactError, match="does not belong to these shards"):
        open_artifact(ours)


def test_files_that_the_manifest_does_not_list_are_ignored(tmp_path: Path) -> None:
    out = build(tmp_path / "out")
    (out / "README.md").write_text("added later")
    open_artifact(out)
