"""A codec that the package has never heard of is planned, packed, loaded, run and streamed through the contract alone.

`Six` says how rows are encoded and decoded, and no more. `Whole` stores the same, and says as well in which form a
kernel can multiply it. Neither has the buffers of another codec.
"""

from __future__ import annotations

import logging
import math
import re
import tracemalloc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import waterfill
from tests.support import streams
from tests.support.models import tiny_llama
from tests.support.plans import plan_for
from waterfill import codecs, kernels
from waterfill.base import native
from waterfill.codecs import (
    BufferLayout,
    Codec,
    Encoded,
    Levels,
    MemoryForm,
    Shape,
    contract,
    decoded,
    get_codec,
)
from waterfill.codecs.groups import per_weight
from waterfill.codecs.hadamard import groups, rotate, unrotate
from waterfill.files.architecture import describe
from waterfill.files.artifact import open_artifact
from waterfill.files.checkpoint import open_checkpoint
from waterfill.files.original import load_original
from waterfill.planning.budget import Budget
from waterfill.planning.costs import matrix_view
from waterfill.running.engine.opening import open_model
from waterfill.running.hf.packed import PackedMatrix
from waterfill.running.hf.trial import _Alive
from waterfill.running.streaming.ahead import ring_bytes
from waterfill.running.streaming.chunks import decoding_bytes
from waterfill.running.streaming.limit import Working, spare_bytes

NAMES = ("six", "whole")
MOST = 31  # of 6 bits with a sign
TOLERANCE = 0.05  # of logits, relative: activations of 8 bits in groups of 96
EXACT = 0.01  # of 12 bits, or keys and values of bfloat16
ROUNDED = 0.001  # of weights: levels of 12 bits, or scales of fp16


class Six(Codec):
    """6 bits per weight, uniform: a step F32 for each row and group, and for every four weights three bytes."""

    name = "six"

    def layout(self, shape: Shape) -> Mapping[str, BufferLayout]:
        rows, width = shape
        row, parts = 3 * -(-width // 4), len(groups(width))
        return {
            "triples": BufferLayout("U8", (rows * row + rows * row % 2,), row),
            "steps": BufferLayout("F32", (rows, parts), 4 * parts),
        }

    def distortion(self, shape: Shape) -> float:
        return 4e-3

    def encode(self, weight: torch.Tensor, *, exponent: int = 0, rho: float = 1.0) -> Encoded:
        rotated = rotate(weight.to(torch.float32))
        width = rotated.shape[1]
        largest = torch.stack([rotated[:, g.start : g.stop].abs().amax(1) for g in groups(width)], dim=1)
        steps = largest / MOST
        levels = (rotated / per_weight(steps, width).clamp_min(1e-30)).round()
        error = levels * per_weight(steps, width) - rotated
        return Encoded(
            shape=(len(rotated), width),
            buffers={"triples": _triples(levels), "steps": steps},
            exponent=exponent,
            noise_power=float(error.double().square().sum()),
            power=float(rotated.double().square().sum()),
        )

    def decode(self, encoded: Encoded) -> torch.Tensor:
        width = encoded.shape[1]
        return unrotate(_levels(encoded) * per_weight(encoded.buffers["steps"], width))


class Whole(Six):
    """The same; its levels are whole numbers, so that kernels can multiply them as they are."""

    name = "whole"

    @property
    def memory(self) -> MemoryForm:
        return Levels(8)

    def to_memory(self, buffers: Mapping[str, torch.Tensor], shape: Shape, exponent: int) -> Mapping[str, torch.Tensor]:
        levels = _levels(Encoded(shape, buffers, exponent, 0.0, 0.0))
        codes = torch.zeros(self.memory.layout(shape)["codes"].shape, dtype=torch.uint8)
        codes[: levels.numel()] = (levels + 128).to(torch.uint8).flatten()
        return {"scales": (buffers["steps"] * 2.0**-exponent).to(torch.float16), "codes": codes}


def _triples(levels: torch.Tensor) -> torch.Tensor:
    """Whole numbers from -31 to 31, `[rows, width]` -> bytes."""
    codes = torch.nn.functional.pad(levels.to(torch.int64) + 32, (0, -levels.shape[1] % 4))
    a, b, c, d = codes.unflatten(1, (-1, 4)).unbind(2)
    words = a | b << 6 | c << 12 | d << 18
    return torch.stack([words & 255, words >> 8 & 255, words >> 16], dim=2).to(torch.uint8).flatten()


def _levels(encoded: Encoded) -> torch.Tensor:
    rows, width = encoded.shape
    count = rows * 3 * -(-width // 4)
    x, y, z = encoded.buffers["triples"].flatten()[:count].to(torch.int64).view(rows, -1, 3).unbind(2)
    words = x | y << 8 | z << 16
    codes = torch.stack([words >> shift & 63 for shift in (0, 6, 12, 18)], dim=2).flatten(1)[:, :width]
    return (codes - 32).to(torch.float32)


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    codecs.register_codec("six", lambda name: Six())
    codecs.register_codec("whole", lambda name: Whole())
    yield
    for name in NAMES:
        del contract._FAMILIES[name]
    get_codec.cache_clear()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"), tokenizer=True, hidden=96, intermediate=272, layers=2)


@pytest.fixture(scope="module")
def packed(checkpoint: Path, registered: None, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """One artifact of each, and one where a matrix may have either or another codec."""
    root, made = tmp_path_factory.mktemp("packed"), {}
    for name, names in {
        "six": ["six"],
        "whole": ["whole"],
        "mixed": ["six", "higgs-p2-n16", "trellis-s8-r3.0000"],
    }.items():
        plan = plan_for(checkpoint, codecs=names, budget=Budget(bits=5 if name == "mixed" else 8))
        waterfill.pack(checkpoint, root / name, plan=plan)
        made[name] = root / name
    return made


def twin(checkpoint: Path, artifact: Path) -> Any:
    """The original model with every packed matrix as its codec decodes it."""
    opened, source = open_artifact(artifact), open_checkpoint(checkpoint)
    model = load_original(source, torch.float32)
    state, matrices = model.state_dict(keep_vars=True), {m.name: m for m in describe(source).matrices}
    for tensor in opened.tensors.values():
        if tensor.packed:
            matrix = matrices[tensor.name]
            buffers = {key: opened.read(b.name) for key, b in zip(tensor.keys, tensor.buffers, strict=True)}
            weight = get_codec(tensor.codec).decode(Encoded(matrix.shape, buffers, tensor.exponent, 0.0, 0.0))
            with torch.no_grad():
                matrix_view(state[matrix.parameter], matrix).copy_(weight)
    return model


IDS = torch.randint(256, (1, 24), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(IDS, use_cache=False).logits[0].to(torch.float32)
    return found


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def tolerance(name: str) -> float:
    """What the activations' bits do: 12 beside levels of 16, else 8."""
    return EXACT if name == "six" else TOLERANCE


def test_it_is_planned_and_packed_to_the_byte(packed: Mapping[str, Path]) -> None:
    for name in NAMES:
        found = waterfill.inspect(packed[name])
        assert {tensor.codec for tensor in found.plan.tensors} == {name}
        assert found.plan.size_bytes == sum(file.stat().st_size for file in packed[name].glob("*.safetensors"))
        for tensor in found.plan.tensors:
            assert tensor.size_bytes == sum(
                math.prod(part.shape) * {"U8": 1, "F32": 4}[part.dtype]
                for part in get_codec(name).layout(tensor.shape).values()
            )
            assert 0 < found.measured_t2[tensor.name] < 4e-3
    assert {"six"} < {tensor.codec for tensor in waterfill.inspect(packed["mixed"]).plan.tensors}


@pytest.mark.parametrize("name", [*NAMES, "mixed"])
def test_a_loaded_model_computes_what_decoded_weights_do(
    name: str, checkpoint: Path, packed: Mapping[str, Path]
) -> None:
    model, dense = waterfill.load(packed[name], dtype=torch.float32), twin(checkpoint, packed[name])
    assert off(logits(model), logits(dense)) < tolerance(name)
    for path, module in model.named_modules():
        if isinstance(module, PackedMatrix):
            assert off(module.dense(), dense.get_submodule(path).weight.detach()) < ROUNDED


@pytest.mark.parametrize("name", [*NAMES, "mixed"])
@pytest.mark.parametrize("streamed", [False, True])
def test_the_engine_computes_the_same(name: str, streamed: bool, checkpoint: Path, packed: Mapping[str, Path]) -> None:
    if native.isa() is None:
        pytest.skip("the engine takes the native library")
    expected = logits(twin(checkpoint, packed[name]))
    opened = open_model(packed[name], streamed=streamed, logits=IDS.shape[1], tuning=streams.quick(streams.mixed))
    sequence = opened.sequence()
    found = torch.stack([torch.from_numpy(sequence.forward([token]))[-1] for token in IDS[0].tolist()])
    assert off(found, expected) < tolerance(name)


@pytest.mark.parametrize("keep", [streams.nothing, streams.mixed])
@pytest.mark.parametrize("name", [*NAMES, "mixed"])
def test_a_streamed_model_computes_what_a_resident_one_does(
    name: str, keep: streams.Keep, packed: Mapping[str, Path]
) -> None:
    resident, streamed = waterfill.load(packed[name]), streams.load(packed[name], keep)
    assert streamed.streaming is not None
    for _ in range(2):  # around the end of a pass
        assert torch.equal(logits(streamed), logits(resident))


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_does_without_the_library(
    name: str, checkpoint: Path, packed: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATERFILL_ISA", "none")
    for cached in (native.isa, kernels.implementation):
        cached.cache_clear()
    try:
        expected = logits(twin(checkpoint, packed[name]))
        for load in (waterfill.load, streams.load):
            model = load(packed[name], dtype=torch.float32)
            assert off(logits(model), expected) < 3 * ROUNDED
    finally:
        monkeypatch.undo()
        for cached in (native.isa, kernels.implementation):
            cached.cache_clear()


def test_it_says_once_that_it_is_slow(packed: Mapping[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    decoded.say_once.cache_clear()
    with caplog.at_level(logging.INFO, "waterfill.kernels"):
        for _ in range(2):
            waterfill.load(packed["six"])
        waterfill.load(packed["whole"])
    said = [record.getMessage() for record in caplog.records if "no kernel reads its codes" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("six: ")


def test_damage_is_found_where_it_is_streamed(packed: Mapping[str, Path], tmp_path: Path) -> None:
    """What is held and what is cut are both compared with their digests."""
    tensor = next(t for t in open_artifact(packed["six"]).tensors.values() if t.packed)
    for buffer in tensor.buffers:
        copy = tmp_path / buffer.name
        copy.mkdir()
        for file in packed["six"].iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        with (copy / buffer.file.name).open("r+b") as file:
            file.seek(buffer.offset_bytes)
            first = file.read(1)[0]
            file.seek(buffer.offset_bytes)
            file.write(bytes([first ^ 1]))
        with pytest.raises(waterfill.ArtifactError, match=re.escape(tensor.name)):
            streams.load(copy)


@pytest.mark.parametrize("name", NAMES)
def test_what_decoding_takes_is_measured_and_counted_in_the_limit(name: str, packed: Mapping[str, Path]) -> None:
    codec, shape = get_codec(name), (700, 1024)
    buffers = codec.encode(torch.randn(shape, generator=torch.Generator().manual_seed(5))).buffers
    tracemalloc.start()
    with _Alive() as tensors, torch.inference_mode():
        memory = codec.to_memory(buffers, shape, 0)
        kernels.arrange(kernels.Packed(codec.memory, memory["scales"], memory["codes"], 0, shape))
    _, arrays = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0.7 * codec.decoding_bytes(shape) < tensors.peak + arrays < codec.decoding_bytes(shape)

    streamed = streams.load(packed[name])
    matrices, kept = streamed.streaming.sequence, streamed.streaming.kept.nbytes
    assert decoding_bytes(matrices) == max(
        codec.decoding_bytes((chunk.rows, matrix.shape[1])) for matrix in matrices for chunk in matrix.chunks
    )
    assert streamed.streaming.firm_bytes == decoding_bytes(matrices) - kept
    working = Working(token=0, activations=0, logits=0)
    needs: dict[str, Any] = {"held": 0, "context": None, "logits": 1}
    taken = (1 << 30) - spare_bytes(packed[name], matrices, 1 << 30, working, **needs)
    assert taken == ring_bytes(matrices) + decoding_bytes(matrices)


def test_what_the_library_decodes_takes_nothing_more(packed: Mapping[str, Path]) -> None:
    streamed = streams.load(packed["mixed"])
    for matrix in streamed.streaming.sequence:
        assert (matrix.decoding_bytes > 0) == (matrix.stored.name == "six")


# ---------------------------------------------------------------------------------------- the contract, codec by codec


@pytest.mark.parametrize("width", [96, 1024, 2048, 2900])
@pytest.mark.parametrize("name", ["higgs-p1-n16", "higgs-p3-n64", "higgs-p1-n6", "trellis-s8-r3.0000", "six", "whole"])
def test_parts_decode_alone_to_what_the_matrix_decodes_to(name: str, width: int) -> None:
    codec, rows = get_codec(name), 300
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(width))
    encoded = codec.encode(weight)
    parts = codec.parts((rows, width), 1 << 15)
    data = encoded.buffers[parts.key].flatten().numpy()
    bounds = parts.bounds(rows, data[: parts.index_bytes(rows)].tobytes())
    assert parts.rows % 4 == 0
    assert len(bounds) == -(-rows // parts.rows) + 1
    memory = codec.to_memory(encoded.buffers, (rows, width), 0)
    assert {key: (part.dtype, part.shape) for key, part in codec.memory.layout((rows, width)).items()} == {
        key: ({torch.float16: "F16", torch.uint8: "U8"}[buffer.dtype], tuple(buffer.shape))
        for key, buffer in memory.items()
    }
    assert sum(buffer.nbytes for buffer in memory.values()) == codec.memory_bytes((rows, width))
    for number in (0, (len(bounds) - 1) // 2, len(bounds) - 2):
        first, last = number * parts.rows, min((number + 1) * parts.rows, rows)
        start, stop = bounds[number], bounds[number + 1]
        buffers = {parts.key: torch.from_numpy(parts.alone(np.array([stop - start], np.uint32), data[start:stop]))}
        buffers |= {key: held[first:last] for key, held in encoded.buffers.items() if key != parts.key}
        part = codec.to_memory(buffers, (last - first, width), 0)
        size, count = codec.memory.row_bytes(width), last - first
        assert torch.equal(part["codes"][: count * size], memory["codes"][first * size : last * size])
        assert torch.equal(part["scales"], memory["scales"][first:last])


class Unsteady(Six):
    """Rows of no fixed number of bytes: nothing can be said of where they are."""

    name = "unsteady"

    def layout(self, shape: Shape) -> Mapping[str, BufferLayout]:
        return {key: part._replace(row_bytes=0) for key, part in super().layout(shape).items()}


def test_rows_of_no_fixed_size_are_decoded_together_and_have_to_say_how_they_are_cut() -> None:
    shape = (40, 96)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    found, expected = (codec.to_memory(codec.encode(weight).buffers, shape, 0) for codec in (Unsteady(), Six()))
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    with pytest.raises(NotImplementedError, match="unsteady has rows of no fixed size; define its `parts`"):
        Unsteady().parts(shape, 1024)


@pytest.mark.parametrize("name", ["trellis-s8-r3.0000", "trellis-s64-r6.5000"])
def test_rates_name_their_codecs(name: str) -> None:
    rates, codec = get_codec(name).rates, get_codec(name)
    assert rates is not None
    assert rates.codec(codec.rate).name == name
    assert (rates.codec(0.0).rate, rates.codec(99.0).rate) == (rates.least, rates.most)
    assert rates.codec(codec.rate + rates.step).menu_point((4096, 4096)).t2 < codec.menu_point((4096, 4096)).t2
    assert codecs.rates_of(name) is None
    assert codecs.rates_of("trellis-s8") == get_codec("trellis-s8-r1.0000").rates
    assert codecs.rates_of("higgs-p1-n16") is None


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_levels_of_twelve_bits_keep_any_rows(scale: float) -> None:
    """Small beside large ones, zeros, and one weight alone in its group."""
    rotated = torch.randn(5, 2048, generator=torch.Generator().manual_seed(3))
    rotated[1] *= 1e-4
    rotated[2] = 0
    rotated[3, 1:] = 0
    exponent = codecs.scale_exponent(float(rotated.abs().max()) * scale)
    scales, codes = decoded.rounded(rotated * scale * 2.0**-exponent)
    found = get_codec("levels-16").memory.decode_rotated(codes, scales, exponent, 2048) / scale
    assert off(found[[0]], rotated[[0]]) < 1e-3
    assert off(found[[1]], rotated[[1]]) < 1e-3
    assert torch.equal(found[2], rotated[2])
    assert off(found[3], rotated[3]) < 1e-3
