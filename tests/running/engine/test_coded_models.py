"""Models with coded keys and values: cut anywhere, together, streamed, speculating; what is lost; memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import waterfill
from tests.support import streams
from tests.support.commands import Command
from tests.support.kernel_samples import needs_engine
from waterfill.base import process
from waterfill.base.arguments import cache_bits
from waterfill.base.errors import MemoryLimitError
from waterfill.running.engine.cache import Sequence
from waterfill.running.engine.families.llama import LlamaModel, shape_of, working
from waterfill.running.engine.opening import open_model
from waterfill.running.streaming.limit import Limit

pytestmark = [needs_engine, pytest.mark.usefixtures("no_reader_left")]

TOKENS = 320


@pytest.fixture(scope="module")
def ids(work: Path) -> list[int]:
    return waterfill.Engine(work / "packed").tokenizer.prompt_ids((work / "text.py").read_text())[:TOKENS]


@pytest.fixture(scope="module")
def model(work: Path) -> LlamaModel:
    return open_model(work / "packed", kv="5,4")


def logits_in(model: LlamaModel, ids: list[int], piece: int) -> npt.NDArray[np.float32]:
    sequence = model.sequence()
    parts = [ids[i : i + piece] for i in range(0, len(ids), piece)]
    return np.concatenate([sequence.forward(part, len(part)) for part in parts])


def test_passes_of_any_width_give_the_same_bits(model: LlamaModel, ids: list[int]) -> None:
    whole = logits_in(model, ids, TOKENS)
    assert np.array_equal(whole, logits_in(model, ids, 1))
    assert np.array_equal(whole, logits_in(model, ids, 37))


def test_texts_together_and_streamed_are_the_same(work: Path, model: LlamaModel, ids: list[int]) -> None:
    texts = [ids[:150], ids[150:], ids[20:90]]
    alone = [model.sequence().forward(text)[0] for text in texts]
    assert np.array_equal(alone, [rows[0] for rows in model.forward([model.sequence() for _ in texts], texts)])
    tuning = streams.quick(streams.mixed, chunk_bytes=1 << 16)
    room = process.resident_bytes() + 200_000_000
    streamed = open_model(work / "packed", memory=room, streamed=True, tuning=tuning, kv="5,4")
    assert np.array_equal(alone, [streamed.sequence().forward(text)[0] for text in texts])
    assert streamed.streaming is not None
    streamed.streaming.close()


def test_more_bits_lose_less(work: Path, ids: list[int]) -> None:
    """Of the divergence from plain numbers; keys and values apart, and together."""
    plain = logits_in(open_model(work / "packed"), ids, TOKENS).astype(np.float64)

    def lost(kv: str) -> float:
        return float(np.mean([divergence(*rows) for rows in zip(plain, logits_of(kv), strict=True)]))

    def logits_of(kv: str) -> npt.NDArray[np.float64]:
        return logits_in(open_model(work / "packed", kv=kv), ids, TOKENS).astype(np.float64)

    both = [lost(kv) for kv in ("8", "5", "4", "3")]
    assert 0 < both[0] < 1e-3
    assert both == sorted(both)
    assert both[2] < 0.05
    assert max(lost("4,16"), lost("16,4")) < 1.2 * both[2]
    assert np.array_equal(plain, logits_of("16,16"))


def divergence(p: npt.NDArray[np.float64], q: npt.NDArray[np.float64]) -> float:
    """Kullback-Leibler, of logits, nats."""
    logs = [x - x.max() - np.log(np.exp(x - x.max()).sum()) for x in (p, q)]
    return float((np.exp(logs[0]) * (logs[0] - logs[1])).sum())


def test_a_pass_that_fails_is_read_again(model: LlamaModel, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """From where codes end, if it has taken the places of tokens that have none: as one that has gone back so far."""
    sequence, back = model.sequence(), model.sequence()
    sequence.forward(ids[:100])
    back.forward(ids)
    back.truncate(36)
    with monkeypatch.context() as broken:
        broken.setattr(model.weights, "expect", lambda status: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sequence.forward(ids[100:])
    assert sequence.ids == ids[:36]
    assert np.array_equal(sequence.forward(ids[36:], 20), back.forward(ids[36:], 20))


def test_drafts_that_are_taken_back_leave_no_trace(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = waterfill.Engine(work / "packed", kv=4)
    options: dict[str, Any] = {"temperature": 0, "max_new_tokens": 150}
    prompt = "x = 1\nx = 1\nx ="
    plain = engine.generate(prompt, **options)
    text = "".join(plain)
    back: list[int] = []
    truncate = Sequence.truncate
    monkeypatch.setattr(
        Sequence,
        "truncate",
        lambda sequence, length: (back.append(len(sequence.ids) - length), truncate(sequence, length))[1],
    )
    looked_up = waterfill.Engine(work / "packed", kv=4).generate(prompt, **options, lookup=6)
    assert "".join(looked_up) == text
    assert max(back) > 0


def test_texts_fit_that_did_not(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit reckons with codes, and with the tokens that stay as they are."""
    monkeypatch.setattr(process, "resident_bytes", lambda: 0)
    room = 1000 * open_model(work / "packed")._shape.token_bytes
    for kv, fits in ((None, 990), ("8", 1600), ("4", 3000)):
        model = open_model(work / "packed", kv=kv)
        takes = working(model.spec, cache_bits(kv))
        assert takes.text_bytes(1) == shape_of(model.spec, cache_bits(kv)).token_bytes + model._shape.text_bytes
        model._limit = Limit(Path("artifact"), room + takes.pass_bytes(20, 1, 1), takes, overhead_bytes=0)
        model.expect(model.sequence(), fits, 10)
        with pytest.raises(MemoryLimitError):
            model.expect(model.sequence(), 2 * fits, 10)


def test_the_command_line(work: Path, command: Command) -> None:
    """A text too short for codes is the same text; a longer one is not told from it by eight bits."""
    short = ("generate", work / "packed", "-p", "def read(", "--temperature", "0", "--max-new-tokens", "30", "--json")
    assert command(*short, "--kv", "3").record["text"] == command(*short).record["text"]
    long = (*short, "--max-new-tokens", "120")
    assert command(*long, "--kv", "8,8").record["text"] == command(*long, "--kv", "16").record["text"]
    for kv in ("7", "4,4,4", "", "four"):
        refused = command(*short, "--kv", kv)
        assert refused.code == 2
        assert f"kv is '{kv}'; choose 16, 8, 5, 4 or 3 bits, or two of these as in '5,4'" in refused.err
