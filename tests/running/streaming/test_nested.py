"""Models that were packed at several rates: each read at each of them, by either engine and in every form."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

import waterfill
from tests.codecs.test_nested import SHAPES, encoded, gaussian
from tests.support import models, streams
from tests.support.kernel_samples import every_isa, needs_engine
from tests.support.plans import sensitivity_of
from waterfill.base import native, process
from waterfill.base.errors import ArtifactError, WaterfillError
from waterfill.codecs import Encoded
from waterfill.codecs.nested.codec import nested
from waterfill.files.architecture import describe
from waterfill.files.artifact import StoredBuffer, StoredTensor, at_level, bits_of, digest, levels_of, open_artifact
from waterfill.files.checkpoint import open_checkpoint
from waterfill.files.original import load_original
from waterfill.kernels import Packed, cpu
from waterfill.planning.budget import Budget
from waterfill.planning.ladder import MENU, nested_plan
from waterfill.planning.plan import read_plan
from waterfill.planning.planner import Request, make_plan
from waterfill.running.engine.opening import open_model
from waterfill.running.runner import open_runner
from waterfill.running.streaming.chunks import StreamedMatrix
from waterfill.running.streaming.fit import fitting_level, resident_size
from waterfill.running.streaming.storage import Storage

pytestmark = pytest.mark.usefixtures("no_reader_left")

RATES = (2.2, 3.0, 4.5)
IDS = torch.arange(3, 15)[None]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("nested")
    models.tiny_llama(root / "model", tokenizer=True)
    checkpoint = open_checkpoint(root / "model")
    architecture = describe(checkpoint)
    measured = sensitivity_of(architecture, fingerprint=checkpoint.fingerprint)

    def at(rate: float) -> Any:
        return make_plan("m", architecture, measured, Budget(None, rate), Request(codecs=MENU))

    waterfill.pack(root / "model", root / "out", plan=nested_plan(at, RATES, MappingProxyType({})))
    return root / "out"


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(IDS, use_cache=False).logits
    return found


def test_a_rate_is_what_was_asked_for_and_its_bytes_are_promised(packed: Path) -> None:
    artifact, plan = open_artifact(packed), read_plan(packed)
    assert levels_of(artifact) == len(plan.levels) == 3
    assert artifact.size_bytes == plan.size_bytes
    for number, (rate, level) in enumerate(zip(RATES, plan.levels, strict=True), 1):
        lower = at_level(artifact, number)
        assert bits_of(lower.tensors) == pytest.approx(level.bits)
        assert rate - 0.4 < level.bits <= rate
        unread = sum(t.size_bytes for t in artifact.tensors.values()) - sum(
            t.size_bytes for t in lower.tensors.values()
        )
        assert level.size_bytes == plan.size_bytes - unread
    assert [level.predicted.kl for level in plan.levels] == sorted((x.predicted.kl for x in plan.levels), reverse=True)


def test_every_level_is_another_model_and_comes_nearer(packed: Path) -> None:
    original = logits(load_original(open_checkpoint(packed.parent / "model"), None))
    off = [float((logits(waterfill.load(packed, rate=rate)) - original).square().mean()) for rate in RATES]
    assert off[0] > 1.5 * off[1] > 2 * off[2]
    assert torch.equal(logits(waterfill.load(packed)), logits(waterfill.load(packed, rate=4.5)))
    assert torch.equal(logits(waterfill.load(packed, rate=3.9)), logits(waterfill.load(packed, rate=3)))


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("form", [{"memory_form": "codes"}, {"streamed": True}], ids=["codes", "streamed"])
def test_logits_are_the_same_in_every_form(packed: Path, rate: float, form: dict[str, Any]) -> None:
    levels = waterfill.load(packed, rate=rate, memory_form="levels")
    other = waterfill.load(packed, rate=rate, tuning=streams.quick(), **form)
    assert other.streaming is not None
    assert torch.equal(logits(other), logits(levels))


@needs_engine
@pytest.mark.parametrize("rate", RATES)
def test_the_engine_writes_the_same_in_every_form(packed: Path, rate: float) -> None:
    texts = set()
    for options in ({"memory_form": "levels"}, {"memory_form": "codes"}, {"streamed": True}):
        engine = waterfill.Engine(packed, rate=rate, tuning=streams.quick(), **options)  # type: ignore[arg-type]
        texts.add("".join(engine.generate("def f(", max_new_tokens=8, temperature=0)))
        if engine.streaming is not None:
            engine.streaming.close()
    assert len(texts) == 1


@needs_engine
def test_a_lower_rate_reads_less(packed: Path) -> None:
    read = []
    for rate in RATES:
        model = open_model(packed, rate=rate, streamed=True, tuning=streams.quick())
        assert model.streaming is not None
        read.append(
            sum(m.coded_bytes + sum(held.nbytes for held in m.held.values()) for m in model.streaming._matrices)
        )
        model.streaming.close()
    stored = [at_level(open_artifact(packed), level).tensors.values() for level in (1, 2, 3)]
    taken = [sum(tensor.size_bytes for tensor in tensors if tensor.packed) for tensors in stored]
    assert read == pytest.approx(taken, rel=0.03), "but for indices and what fills the end"
    assert read[0] < 0.6 * read[2]


@needs_engine
def test_an_artifact_drafts_for_itself_and_writes_the_same(packed: Path) -> None:
    runners = [open_runner(packed, memory_form="codes", draft_rate=rate) for rate in (None, 2.2, 4.5)]
    texts, passes = [], []
    for runner in runners:
        assert runner.streaming is not None
        runner.streaming.reset()
        texts.append("".join(runner.generate("def f(", max_new_tokens=12, temperature=0)))
        passes.append(runner.streaming.summary().passes)
    assert texts[0] == texts[1] == texts[2]
    assert passes[2] < passes[0], "what it drafts at its own rate is right"
    with pytest.raises(WaterfillError, match="leave out one of them"):
        open_runner(packed, draft=packed, draft_rate=2.2)
    with pytest.raises(WaterfillError, match="give either draft or lookup"):
        open_runner(packed, draft_rate=2.2, lookup=4)


def test_rates_that_there_are_not_are_refused(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(WaterfillError, match=r"rate is 2 bits per weight, and .* has 2\.[0-9]+, .*; ask for one"):
        waterfill.load(packed, rate=2)
    waterfill.pack(packed.parent / "model", tmp_path / "one", lossless=True)
    with pytest.raises(WaterfillError, match=r"rate is 3, and .* has one only"):
        waterfill.load(tmp_path / "one", rate=3)


def test_within_a_limit_the_highest_rate_that_fits_is_read(
    packed: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    artifact, taken = open_artifact(packed), 50_000_000
    monkeypatch.setattr(process, "resident_bytes", lambda: taken)
    sizes = [resident_size(at_level(artifact, level)) for level in (1, 2, 3)]
    assert sizes[1] < sizes[2], "levels of 8 bits, and of 16"
    none: dict[str, Any] = {"working_bytes": 0, "loading_bytes": 0}
    for room, level in ((sizes[2], 3), (sizes[2] - 1, 2), (sizes[0] - 1, 3)):
        assert fitting_level(artifact, None, taken + room, None, "auto", **none) == level
    with caplog.at_level(logging.INFO, logger="waterfill"):
        fitting_level(artifact, None, taken + sizes[2] - 1, None, "auto", **none)
    assert re.search(r"is read at [0-9.]+ of [0-9.]+ bits per weight, the most that fits", caplog.text)
    assert fitting_level(artifact, 2.2, taken + sizes[2], None, "auto", **none) == 1
    assert fitting_level(artifact, None, taken + 1, True, "auto", **none) == 3, "somebody said where weights are"
    assert fitting_level(artifact, None, None, None, "auto", **none) == 3


def matrix_of(file: Path, whole: Encoded, codec: str) -> StreamedMatrix:
    """A matrix whose buffers lie in a file one after the other."""
    data, buffers = b"", []
    for key, buffer in whole.buffers.items():
        some = buffer.view(torch.uint8).numpy().tobytes()
        dtype = "F16" if buffer.dtype == torch.float16 else "U8"
        shape = tuple(buffer.shape)
        buffers.append(StoredBuffer(f"m.{key}", dtype, shape, file, len(data), digest(some)))
        data += some
    file.write_bytes(data)
    tensor = StoredTensor("m", codec, whole.shape, "BF16", tuple(buffers), 0, 0.0)
    return StreamedMatrix(tensor, Storage(direct=False), verify=True)


@every_isa
@pytest.mark.parametrize("name", ["nested-s8-r2.0000", "nested-s8-r2.0000-3.0000", "nested-s64-r1.0000-6.0000-6.5000"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_library_decodes_to_the_same_bits(
    name: str, shape: tuple[int, int], isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(native.ISA_VARIABLE, isa)
    codec = nested(name)
    whole = encoded(codec, gaussian(*shape))
    memory = codec.to_memory(whole.buffers, shape, 0)
    expected = cpu.arrange(Packed(codec.memory, memory["scales"], memory["codes"], 0, shape), isa)
    found = matrix_of(tmp_path / "some", whole, name).whole(verify=True).arrange().packed()
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scales.view(torch.int16).flatten(), expected.scales.view(torch.int16).flatten())


@every_isa
def test_the_library_refuses_what_the_reference_does(isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.ISA_VARIABLE, isa)
    codec = nested("nested-s8-r2.0000-3.0000")
    whole = encoded(codec, gaussian(40, 128))
    cut = whole.buffers["streams1"].clone()
    cut[60:90] = torch.from_numpy(np.arange(30, dtype=np.uint8))
    for number, (key, value) in enumerate(
        [("gains2", torch.full_like(whole.buffers["gains2"], float("inf"))), ("streams1", cut)]
    ):
        damaged = Encoded(whole.shape, {**whole.buffers, key: value}, 0, 0.0, 0.0)
        with pytest.raises(ArtifactError):
            codec.to_memory(damaged.buffers, whole.shape, 0)
        matrix = matrix_of(tmp_path / str(number), damaged, codec.name)
        with pytest.raises(ArtifactError, match="is damaged"):
            matrix.whole(verify=True).arrange()


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    codec = nested("nested-s8-r2.0000-3.0000")
    whole = encoded(codec, gaussian(1100, 240))
    streams_ = whole.buffers["streams1"].clone()
    streams_[:4] = 255
    damaged = Encoded(whole.shape, {**whole.buffers, "streams1": streams_}, 0, 0.0, 0.0)
    with pytest.raises(ArtifactError, match="index of its streams1 is damaged"):
        matrix_of(tmp_path / "some", damaged, codec.name)
