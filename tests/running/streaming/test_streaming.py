"""Streamed models compute what resident ones do, to the bit, whatever is kept in memory; and end cleanly."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import waterfill
from tests.support import models, streams
from tests.support.commands import Command
from tests.support.plans import plan_for
from waterfill import kernels
from waterfill.base import native, process
from waterfill.base.errors import ArtifactError, MemoryLimitError, WaterfillError
from waterfill.files.artifact import open_artifact
from waterfill.planning.budget import Budget
from waterfill.running.streaming.chunks import StreamedMatrix
from waterfill.running.streaming.limit import Limit
from waterfill.running.streaming.residency import Residency
from waterfill.running.streaming.storage import Storage
from waterfill.running.streaming.streamer import Streamer
from waterfill.running.streaming.tuning import Tuning
from waterfill.running.streaming.view import View

pytestmark = pytest.mark.usefixtures("no_reader_left")

CODECS = (
    *("trellis-s8-r3.0000", "trellis-s4-r6.0000", "higgs-p1-n4", "higgs-p1-n6", "higgs-p2-n16", "higgs-p4-n1024"),
    "bitshift-2.5",
)
KEEPS = (streams.nothing, streams.coded, streams.decoded, streams.mixed)
Packed = Callable[[str], Path]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """An artifact of a tiny Llama in one codec, made when first asked for."""
    root = tmp_path_factory.mktemp("streams")
    checkpoint = models.tiny_llama(root / "model", tokenizer=True, hidden=96, intermediate=272, layers=3)

    def pack(codec: str) -> Path:
        out = root / codec
        if not out.exists():
            plan = plan_for(checkpoint, codecs=[codec], budget=Budget(bits=16.0), uniform=True)
            waterfill.pack(checkpoint, out, plan=plan)
        return out

    return pack


def ids(count: int = 12, batch: int = 1) -> torch.Tensor:
    return torch.randint(256, (batch, count), generator=torch.Generator().manual_seed(count))


@torch.inference_mode()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(tokens, use_cache=False).logits
    return found


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("codec", CODECS)
def test_logits_are_those_of_the_resident_model(packed: Packed, codec: str, keep: streams.Keep) -> None:
    resident, streamed = waterfill.load(packed(codec)), streams.load(packed(codec), keep)
    for tokens in (ids(1), ids(12), ids(40, batch=2)):
        for _ in range(2):  # around the end of a pass
            assert torch.equal(logits(streamed, tokens), logits(resident, tokens))
    assert not [p for p in streamed.parameters() if p.ndim == 2], "nothing but norms is a parameter"


@pytest.mark.parametrize(
    "sizes", [{"slots": 1}, {"chunk_bytes": 1, "part_weights": 1}, {"chunk_bytes": 1 << 30}], ids=str
)
def test_results_do_not_depend_on_sizes(packed: Packed, sizes: dict[str, int]) -> None:
    tokens, expected = ids(9), logits(waterfill.load(packed(CODECS[4])), ids(9))
    streamed = streams.load(packed(CODECS[4]), tuning=streams.quick(streams.mixed, **sizes))
    for _ in range(2):
        assert torch.equal(logits(streamed, tokens), expected)


def test_sizes_with_which_nothing_could_be_read_are_refused() -> None:
    for name, value in {"slots": 0, "chunk_bytes": 0, "part_weights": -1, "pass_bytes": 0, "reading_s": -0.1}.items():
        with pytest.raises(WaterfillError, match=f"{name} is {value}; choose at least [01]"):
            Tuning(**{name: value})


@pytest.mark.parametrize("isa", [*(native.library().isas if native.library() else ()), "none"])
@pytest.mark.parametrize("codec", ["trellis-s8-r3.0000", "higgs-p2-n16"])
def test_every_instruction_set(packed: Packed, isa: str, codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATERFILL_ISA", isa)
    for cached in (native.isa, kernels.implementation):
        cached.cache_clear()
    try:
        resident, streamed = waterfill.load(packed(codec)), streams.load(packed(codec), streams.mixed)
        # The reference multiplies float32 matrices through BLAS, whose sums depend on a matrix's shape.
        tolerance = 0.05 if isa == "none" else 0.0
        torch.testing.assert_close(logits(streamed, ids()), logits(resident, ids()), atol=tolerance, rtol=0)
    finally:
        monkeypatch.undo()
        for cached in (native.isa, kernels.implementation):
            cached.cache_clear()


def test_float_activations_are_respected(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    rounded = logits(streams.load(packed(CODECS[0])), ids())
    monkeypatch.setenv("WATERFILL_ACTIVATIONS", "float")
    exact = logits(streams.load(packed(CODECS[0])), ids())
    assert torch.equal(exact, logits(waterfill.load(packed(CODECS[0])), ids()))
    assert not torch.equal(exact, rounded)


@pytest.mark.parametrize("family", [name.removeprefix("tiny_") for name in vars(models) if name.startswith("tiny_")])
def test_every_family_streams(family: str, tmp_path: Path) -> None:
    checkpoint = getattr(models, f"tiny_{family}")(tmp_path / "model")
    waterfill.pack(checkpoint, tmp_path / "packed", plan=plan_for(checkpoint, budget=Budget(bits=5.0)))
    resident, streamed = waterfill.load(tmp_path / "packed"), streams.load(tmp_path / "packed")
    tokens = ids(9, batch=2)
    assert torch.equal(logits(streamed, tokens), logits(resident, tokens))
    assert torch.equal(logits(streamed, tokens), logits(resident, tokens))


def test_only_the_experts_that_were_picked_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = models.tiny_mixtral(tmp_path / "model")
    waterfill.pack(checkpoint, tmp_path / "packed", plan=plan_for(checkpoint, budget=Budget(bits=5.0)))
    streamed = streams.load(tmp_path / "packed")
    read: list[str] = []
    check = StreamedMatrix.check
    monkeypatch.setattr(StreamedMatrix, "check", lambda self, *args: (read.append(self.name), check(self, *args))[1])
    logits(streamed, ids(1))
    experts = {name for name in read if ".experts." in name}
    config = streamed.config
    picked = config.num_experts_per_tok * config.num_hidden_layers
    assert 0 < len({name.rpartition(".")[::2][0] + name.rpartition(".")[2] for name in experts}) <= 2 * picked
    assert picked < config.num_local_experts * config.num_hidden_layers
    read.clear()
    logits(streamed, ids(1))
    assert not [name for name in read if ".experts." in name], "the experts used last are still in memory"


def test_greedy_generation_is_the_same(packed: Packed) -> None:
    resident = waterfill.load(packed(CODECS[0]), dtype=torch.float32)
    streamed = streams.load(packed(CODECS[0]), dtype=torch.float32)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = resident.generate(ids(), **options)
    assert torch.equal(streamed.generate(ids(), **options), expected)
    assert torch.equal(streamed.generate(ids(), prompt_lookup_num_tokens=4, **options), expected)
    assert torch.equal(streamed.generate(ids(), assistant_model=resident, **options), expected)


def test_long_prompts_are_read_in_pieces_where_memory_is_short(packed: Packed) -> None:
    streamed = streams.load(packed(CODECS[0]), tuning=streams.quick(pass_bytes=1), dtype=torch.float32)
    assert streamed.generation_config.prefill_chunk_size == 16
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    whole = waterfill.load(packed(CODECS[0]), dtype=torch.float32).generate(ids(40), **options)
    streamed.streaming.reset()
    assert torch.equal(streamed.generate(ids(40), **options), whole)
    assert streamed.streaming.summary().passes == 3 + 3


def test_the_order_of_execution_is_learnt(packed: Packed) -> None:
    storage, tuning = Storage(), streams.quick()
    tensors = open_artifact(packed(CODECS[0]), verify=False).tensors
    matrices = [tuning.matrix(tensors[name], storage, verify=False) for name in packed_names_in_order(tensors)]
    limits: dict[str, Any] = {"spare_bytes": 0, "limit_bytes": 1 << 40, "verify": False}
    streamer = Streamer(storage, matrices[::-1], (), tuning=tuning, **limits)
    with contextlib.closing(streamer):
        first = [multiplied(streamer, matrix) for matrix in matrices]
        assert streamer.sequence == tuple(matrices[::-1]), "it is learnt when the pass is over"
        again = [multiplied(streamer, matrix) for matrix in matrices]
        assert streamer.sequence == tuple(matrices)
    assert all(np.array_equal(*pair) for pair in zip(first, again, strict=True))


def packed_names_in_order(tensors: dict[str, Any]) -> list[str]:
    return [name for name, tensor in tensors.items() if tensor.codec == CODECS[0]]


def multiplied(streamer: Streamer, matrix: StreamedMatrix) -> Any:
    rows, width = matrix.shape
    x, y = np.ones((1, width), np.float32), np.empty((1, rows), np.float32)
    streamer.product(matrix, View.of_array(x), View.of_array(y))
    return y


def test_memory_that_something_else_takes_is_given_up(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    streamed = streams.load(packed(CODECS[0]), streams.coded)
    expected = logits(streamed, ids())
    monkeypatch.setattr(Limit, "begin_pass", lambda *_, **__: None)  # nobody says what passes take
    kept = streamed.streaming.summary().kept_bytes
    taken = streamed.streaming.limit_bytes + kept // 2
    monkeypatch.setattr(process, "resident_bytes", lambda: taken)
    assert torch.equal(logits(streamed, ids()), expected)
    assert 0 < streamed.streaming.summary().kept_bytes < kept
    monkeypatch.setattr(process, "resident_bytes", lambda: 2 * taken)
    for _ in range(2):
        assert torch.equal(logits(streamed, ids()), expected)
    assert streamed.streaming.summary().kept_bytes == 0


def test_the_largest_chunk_may_be_given_up(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    def largest(sequence: Any) -> Residency:
        return Residency((max(sequence, key=lambda chunk: chunk.region.size_bytes),), (), 1.0)

    streamed = streams.load(packed(CODECS[0]), largest)
    expected, limit = logits(streamed, ids()), streamed.streaming.limit_bytes
    monkeypatch.setattr(process, "resident_bytes", lambda: limit)
    streamed.streaming.make_way(1)
    assert streamed.streaming.summary().kept_bytes == 0
    assert torch.equal(logits(streamed, ids()), expected)


def test_too_little_memory_says_how_much_is_needed(packed: Packed) -> None:
    with pytest.raises(
        MemoryLimitError, match=r"1 MB are too little .* takes [0-9]+ MB at least.*; give more"
    ) as found:
        waterfill.load(packed(CODECS[0]), memory="1MB")
    enough = found.value.smallest_bytes + 30_000_000
    assert waterfill.load(packed(CODECS[0]), memory=enough, streamed=True, tuning=streams.quick()).streaming


def test_what_fits_is_not_streamed(packed: Packed) -> None:
    assert waterfill.load(packed(CODECS[0]), memory="64GB").streaming is None
    assert waterfill.load(packed(CODECS[0])).streaming is None


def test_without_a_limit_what_is_free_decides(
    packed: Packed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(process, "free_bytes", lambda: 120e6)
    with caplog.at_level(logging.INFO, logger="waterfill"):
        model = waterfill.load(packed(CODECS[0]), tuning=streams.quick())
    assert model.streaming is not None
    said = " ".join(record.message for record in caplog.records)
    assert "0.1 GB are free: its weights are decoded for every token" in said
    assert model.streaming.summary().form == "codes"
    assert "G weights/s" in said
    assert "tok/s expected" in said


def test_a_closed_model_says_so(packed: Packed) -> None:
    model = streams.load(packed(CODECS[0]))
    model.streaming.close()
    model.streaming.close()
    with pytest.raises(WaterfillError, match="closed"):
        logits(model, ids())


@pytest.mark.parametrize("place", ["index", "part", "padding"])
def test_digests_are_compared_when_it_is_loaded(packed: Packed, tmp_path: Path, place: str) -> None:
    original = streams.load(packed(CODECS[0]))
    matrix = original.streaming.sequence[-1]
    last = matrix.buffer.size_bytes - 1
    offset = matrix.offset_bytes + {"index": 0, "part": int(matrix.ends[0]) + 99, "padding": last}[place]
    copy = damaged_copy(packed(CODECS[0]), tmp_path / "copy", offset)
    with pytest.raises(ArtifactError, match=rf"{matrix.name}"):
        streams.load(copy)


def test_digests_of_scales_are_compared_too(packed: Packed, tmp_path: Path) -> None:
    tensor = open_artifact(packed("higgs-p2-n16")).tensors["model.layers.1.mlp.up_proj"]
    scales = tensor.buffers[tensor.keys.index("scales")]
    copy = damaged_copy(packed("higgs-p2-n16"), tmp_path / "copy", scales.offset_bytes + 1)
    with pytest.raises(ArtifactError, match=r"up_proj\.scales"):
        streams.load(copy)
    assert streams.load(copy, verify=False).streaming


def damaged_copy(artifact: Path, copy: Path, offset: int) -> Path:
    copy.mkdir()
    for file in artifact.iterdir():
        data = bytearray(file.read_bytes())
        if file.suffix == ".safetensors":
            data[offset] ^= 0x10
        (copy / file.name).write_bytes(data)
    return copy


def twice(model: Any) -> None:
    logits(model, ids())
    logits(model, ids())


def test_damage_that_comes_later_is_found(packed: Packed, tmp_path: Path) -> None:
    for codec in CODECS[0], "higgs-p2-n16":
        copy = tmp_path / codec
        damaged_copy(packed(codec), copy, -1)
        (copy / "model.safetensors").write_bytes((packed(codec) / "model.safetensors").read_bytes())
        model = streams.load(copy)
        expected = logits(model, ids())
        matrix = model.streaming.sequence[1]
        offset = matrix.offset_bytes + int(matrix.ends[0]) + 7
        with (copy / "model.safetensors").open("r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 1]))
        with pytest.raises(
            ArtifactError, match=rf"{matrix.name}.*is not what it was when it was first read.*byte [0-9]+"
        ):
            twice(model)  # the ring may still hold what was read before
        with (copy / "model.safetensors").open("r+b") as file:
            file.seek(offset)
            file.write(bytes([byte]))
        assert torch.equal(logits(model, ids()), expected), "and once it is whole again, so are the answers"


def test_exceptions_of_the_consumer_leave_nothing_behind(packed: Packed) -> None:
    model = streams.load(packed(CODECS[0]))
    expected = logits(model, ids())

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    for layer in model.model.layers:
        hook = layer.mlp.register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            logits(model, ids())
        hook.remove()
        assert torch.equal(logits(model, ids()), expected)


def test_the_summary_adds_up(packed: Packed) -> None:
    model = streams.load(packed(CODECS[0]))
    model.streaming.reset()
    for _ in range(5):
        logits(model, ids(1))
    found = model.streaming.summary()
    streamed = sum(matrix.coded_bytes for matrix in model.streaming.sequence)
    assert found.passes == 5
    assert 5 * streamed <= found.bytes_read <= 7 * streamed
    assert found.kept_bytes == 0
    assert min(found.waiting_s, found.decode_s, found.multiply_s) >= 0
    assert found.limiting in ("storage", "decode", "multiply", "other")
    assert found.limiting in found.line
    assert found.limiting in found.short
    assert found.to_dict()["limiting"] == found.limiting


def test_on_the_command_line(work: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = f"{process.resident_bytes() + 200_000_000}"
    monkeypatch.setattr("waterfill.running.streaming.fit.resident_size", lambda artifact: 1 << 40)
    arguments = ("generate", work / "packed", "-p", "def f(", "--temperature", "0", "--max-new-tokens", "6")
    plain = command(*arguments, "--memory", memory)
    assert plain.code == 0
    assert "passes/s" in plain.err
    assert "tok/s expected" in plain.err
    record = command(*arguments, "--memory", memory, "--lookup", "3", "--json").record
    assert plain.out == "def f(" + record["text"] + "\n"
    assert record["streaming"]["passes"] > 0
    assert record["streaming"]["kept_bytes"] > 0
    scored = command(
        "eval", work / "packed", "--text", work / "text.py", "--windows", "1", "--memory", memory, "--json"
    )
    monkeypatch.undo()
    resident = command("eval", work / "packed", "--text", work / "text.py", "--windows", "1", "--json", "--no-cache")
    assert scored.record["ppl"] == resident.record["ppl"]
    refused = command(*arguments, "--memory", "1MB")
    assert refused.code == 2
    assert "too little" in refused.err
    both = command(*arguments, "--lookup", "2", "--draft", work / "packed")
    assert (both.code, "either draft or lookup" in both.err) == (2, True)
