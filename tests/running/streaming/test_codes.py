"""Codes in memory: the same bits as levels, nothing read, about as small as the file; and who gets them."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import waterfill
from tests.support import models, streams
from tests.support.commands import Command
from tests.support.kernel_samples import needs_engine
from tests.support.plans import plan_for
from waterfill.base import process
from waterfill.base.errors import MemoryLimitError, WaterfillError
from waterfill.planning.budget import Budget
from waterfill.running.engine.opening import open_model
from waterfill.running.runner import open_runner
from waterfill.running.streaming.ahead import ring_bytes
from waterfill.running.streaming.limit import Limit
from waterfill.running.streaming.residency import Speeds, keep_coded

pytestmark = pytest.mark.usefixtures("no_reader_left")


CODED, FIXED = "trellis-s8-r3.0000", "higgs-p2-n16"
MB = 1_000_000
IDS = torch.arange(3, 15)[None]
WIDE = {"hidden": 768, "intermediate": 2048, "layers": 2}  # 21 million weights
LOAD = """
import json, sys
import waterfill.running.text.generation
from waterfill.base import process
from waterfill.running.engine.opening import open_model
before = process.peak_bytes()
model = open_model(sys.argv[1], memory_form=sys.argv[2])
print(json.dumps(process.peak_bytes() - before))
"""
Pack = Callable[..., Path]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    """Artifacts of random models, made when first asked for."""
    root = tmp_path_factory.mktemp("codes")

    def pack(*codecs: str, family: str = "llama", **shape: int) -> Path:
        name = "-".join([family, *map(str, shape.values())])
        if not (root / name).exists():
            getattr(models, f"tiny_{family}")(root / name, tokenizer=True, **shape)
        out = root / f"{name}-{'-'.join(codecs) or 'lossless'}"
        if not out.exists() and codecs:
            plan = plan_for(root / name, codecs=codecs, budget=Budget(bits=16.0 if len(codecs) == 1 else 3.5))
            waterfill.pack(root / name, out, plan=plan)
        elif not out.exists():
            waterfill.pack(root / name, out, lossless=True)
        return out

    return pack


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(IDS, use_cache=False).logits
    return found


def codes_bytes(model: Any) -> int:
    return sum(matrix.coded_bytes for matrix in model.streaming._matrices)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma"])
def test_logits_are_those_of_levels_and_nothing_is_read(packed: Pack, family: str) -> None:
    levels = waterfill.load(packed(CODED, family=family), memory_form="levels")
    codes = waterfill.load(packed(CODED, family=family), memory_form="codes", tuning=streams.quick())
    assert levels.streaming is None
    for _ in range(2):
        assert torch.equal(logits(codes), logits(levels))
    found = codes.streaming.summary()
    assert (found.form, found.bytes_read, found.waiting_s) == ("codes", 0, 0.0)
    assert found.kept_bytes == codes_bytes(codes), "rows that are looked up and experts too"
    assert not [thread for thread in threading.enumerate() if thread.name == "waterfill-read"]


@needs_engine
def test_the_engine_writes_the_same(packed: Pack) -> None:
    texts = {}
    for form in ("levels", "codes", "auto"):
        runner = open_runner(packed(CODED), memory_form=form, engine="native")  # type: ignore[arg-type]
        assert (runner.streaming is not None) == (form == "codes")
        texts[form] = "".join(runner.generate("def f(", max_new_tokens=8, temperature=0))
    assert texts["levels"] == texts["codes"] == texts["auto"]


@needs_engine
def test_what_is_multiplied_from_its_codes_needs_no_streamer(packed: Pack, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="waterfill"):
        fixed = waterfill.load(packed(FIXED), memory_form="codes")
    assert fixed.streaming is None
    assert "multiplied as they are" in caplog.text
    assert torch.equal(logits(fixed), logits(waterfill.load(packed(FIXED))))


@needs_engine
def test_beside_coded_weights_it_is_arranged_once(packed: Pack) -> None:
    path = packed(CODED, FIXED, "higgs-p1-n16")
    model = waterfill.load(path, memory_form="codes", tuning=streams.quick())
    stored = {matrix.name: matrix.stored is matrix.codec for matrix in model.streaming._matrices}
    assert len({*stored.values()}) == 2, "there are some of either kind"
    for matrix in model.streaming._matrices:
        arranged = {model.streaming.kept.get(chunk).arranged for chunk in matrix.chunks}
        assert arranged == {stored[matrix.name]}
    assert torch.equal(logits(model), logits(waterfill.load(path)))


@needs_engine
def test_the_first_form_that_fits_is_chosen(
    packed: Pack, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, tuning = packed(CODED, **WIDE), streams.quick(chunk_bytes=1 << 16)
    monkeypatch.setattr(process, "resident_bytes", lambda: 50 * MB)

    def least(form: Any) -> int:
        with pytest.raises(MemoryLimitError, match=r"1 MB are too little for .* takes [0-9]+ MB at least") as refused:
            open_model(path, memory="1MB", memory_form=form)
        return int(refused.value.smallest_bytes)

    levels, codes = least("levels"), least("codes")
    assert codes + 8 * MB < levels
    said = {levels + MB: "levels", levels - 4 * MB: "codes in memory", codes - 4 * MB: "storage"}
    for memory, form in said.items():
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="waterfill"):
            model = open_model(path, memory=memory, tuning=tuning)
        assert form in caplog.messages[-1]
        assert (model.streaming is None) == (form == "levels")
        if model.streaming is not None:
            assert model.streaming.summary().form == form.split()[0]
            model.streaming.close()
    with pytest.raises(MemoryLimitError, match=r"with its codes in memory, it takes .* or let it be streamed"):
        open_model(path, memory=codes - 4 * MB, memory_form="codes")


@needs_engine
def test_what_is_left_over_holds_levels(packed: Pack) -> None:
    model = open_model(packed(CODED), memory_form="codes", tuning=streams.quick())
    assert model.streaming is not None
    embedding, *sequence = (matrix.chunks for matrix in reversed(model.streaming._matrices))
    chunks, speeds = [chunk for some in sequence for chunk in some], Speeds(1.0, 1e6, 1e9)
    coded = sum(chunk.region.size_bytes for chunk in (*chunks, *embedding))
    more = sum(chunk.decoded_bytes - chunk.region.size_bytes for chunk in chunks)
    last = float("inf")
    for share in (0.0, 0.5, 1.0):
        found = keep_coded(chunks, embedding, coded + int(share * more), speeds)
        assert found.kept == {*chunks, *embedding}
        taken = sum(c.region.size_bytes for c in found.coded) + sum(c.decoded_bytes for c in found.decoded)
        assert coded + 0.9 * share * more <= taken <= coded + share * more
        assert found.expected_s < last, "levels are not decoded again"
        last = found.expected_s


def test_codes_yield_to_a_text(packed: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    model = waterfill.load(packed(CODED), memory_form="codes", tuning=streams.quick(slots=2))
    expected, kept = logits(model), codes_bytes(model)
    monkeypatch.setattr(Limit, "begin_pass", lambda *_, **__: None)
    taken = model.streaming.limit_bytes + kept // 2
    monkeypatch.setattr(process, "resident_bytes", lambda: taken)
    model.streaming.make_way(0)
    left = model.streaming.summary().kept_bytes
    assert 0 < left <= kept - kept // 2 - ring_bytes(model.streaming.sequence, slots=2), "for what is read too"
    assert torch.equal(logits(model), expected)
    found = model.streaming.summary()
    assert found.form == "storage"
    assert found.bytes_read > 0
    model.streaming.close()


def test_what_makes_no_sense_is_one_sentence(packed: Pack, command: Command) -> None:
    with pytest.raises(WaterfillError, match="memory_form is 'dense'; choose one of auto, levels, codes"):
        waterfill.load(packed(CODED), memory_form="dense")  # type: ignore[arg-type]
    with pytest.raises(WaterfillError, match=r"streamed is True and memory_form is 'codes'.*give one of them"):
        waterfill.load(packed(CODED), memory_form="codes", streamed=True)
    with pytest.raises(WaterfillError, match=r"has no packed matrices.*; leave out memory_form"):
        waterfill.load(packed(), memory_form="codes")
    refused = command("generate", packed(), "-p", "x", "--memory-form", "codes")
    assert refused.code == 2
    assert "has no packed matrices" in refused.err


def test_on_the_command_line(packed: Pack, command: Command, tmp_path: Path) -> None:
    path, text = packed(CODED), tmp_path / "text"
    text.write_text("def f(x):\n    return x\n" * 20)
    asked = ("generate", path, "-p", "def f(", "--temperature", "0", "--max-new-tokens", "6", "--memory-form")
    levels, codes = (command(*asked, form) for form in ("levels", "codes"))
    assert levels.code == codes.code == 0
    assert levels.out == codes.out
    assert "codes in memory" in codes.err
    assert re.search(r"decode [0-9.]+ G weights/s, which adds [0-9]+ ms to every token", codes.err), "what that costs"
    assert "for the levels of coded weights" in levels.err
    record = command(*asked, "codes", "--json").record
    assert (record["streaming"]["form"], record["streaming"]["bytes_read"]) == ("codes", 0)
    scored = ("eval", path, "--text", text, "--context", "16", "--windows", "2", "--json", "--memory-form")
    records = [command(*scored, form).record for form in ("levels", "codes")]
    assert records[0]["ppl"] == records[1]["ppl"] is not None
    refused = command("eval", path.with_name("llama"), *scored[2:], "codes")
    assert refused.code == 2
    assert "is no artifact" in refused.err


@needs_engine
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks of a process")
def test_loading_never_holds_much_more_than_the_file(packed: Pack) -> None:
    path = packed(CODED, **WIDE)
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    peaks = {}
    for form in ("codes", "levels"):
        done = subprocess.run(
            [sys.executable, "-c", LOAD, str(path), form],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        peaks[form] = json.loads(done.stdout)
    slack = 6 * MB  # a slot that chunks are read into, and what the library takes
    assert peaks["codes"] < size + slack < peaks["levels"]
