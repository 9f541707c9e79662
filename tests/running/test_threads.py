"""Twenty threads and sixty texts over one model: each text is the one that it is alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import waterfill
from tests.support import streams
from tests.support.kernel_samples import needs_engine
from waterfill.base import process
from waterfill.running.hf.turns import Turns

pytestmark = pytest.mark.usefixtures("no_reader_left")


THREADS, TEXTS = 20, 60
PROMPTS = ("def read(", "import os\n", "class Box:\n    def", "return self.", "for i in range(")
Ask = Callable[[int], str]


def options(number: int) -> dict[str, Any]:
    """Every other text is sampled, with a seed of its own."""
    chosen: dict[str, Any] = {"temperature": 0} if number % 2 else {"temperature": 1.0, "seed": number % 10}
    return {"max_new_tokens": 3, **chosen}


def in_threads(ask: Ask) -> list[str]:
    """What is said when all ask at once."""
    together = threading.Barrier(THREADS)

    def one(number: int) -> str:
        if number < THREADS:
            together.wait()
        return ask(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(one, range(TEXTS)))


def alone(ask: Ask) -> list[str]:
    """Texts repeat after ten numbers."""
    first = [ask(number) for number in range(10)]
    assert len(set(first)) > 5
    return first * (TEXTS // 10)


@needs_engine
@pytest.mark.parametrize("where", ["resident", "streamed"])
def test_with_one_engine(work: Path, where: str) -> None:
    tuning = streams.quick(streams.mixed, chunk_bytes=1 << 16)
    limited: dict[str, Any] = {"memory": process.resident_bytes() + 200_000_000, "streamed": True, "tuning": tuning}
    engine = waterfill.Engine(work / "packed", **(limited if where == "streamed" else {}))

    def ask(number: int) -> str:
        return "".join(engine.generate(PROMPTS[number % 5], **options(number)))

    assert in_threads(ask) == alone(ask)
    if engine.streaming is not None:
        engine.streaming.close()


@needs_engine
def test_with_one_engine_and_its_draft(work: Path) -> None:
    engine = waterfill.Engine(work / "packed")

    def ask(number: int) -> str:
        return "".join(engine.generate(PROMPTS[number % 5], draft=engine, **options(number)))

    assert in_threads(ask) == alone(ask)


@pytest.mark.parametrize("where", ["resident", "streamed"])
def test_with_one_transformers_model(work: Path, where: str) -> None:
    tuning = streams.quick(streams.mixed, chunk_bytes=1 << 16)
    model = streams.load(work / "packed", tuning=tuning) if where == "streamed" else waterfill.load(work / "packed")
    tokenizer = AutoTokenizer.from_pretrained(work / "packed")
    before = torch.get_rng_state()

    def ask(number: int) -> str:
        return "".join(waterfill.generate(model, tokenizer, PROMPTS[number % 5], **options(number)))

    assert in_threads(ask) == alone(ask)
    assert torch.equal(torch.get_rng_state(), before)
    if where == "streamed":
        model.streaming.close()


def test_passes_of_transformers_own_loop_may_overlap(work: Path) -> None:
    """Whoever calls a streamed model without `waterfill.generate` waits for products only."""
    model = streams.load(work / "packed", tuning=streams.quick(streams.nothing, chunk_bytes=1 << 16))
    prompts = [torch.arange(1, 3 + number)[None] for number in range(5)]

    def ask(number: int) -> str:
        prompt = prompts[number % 5]
        found = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=4)
        return str(found.tolist())

    assert in_threads(ask) == [ask(number) for number in range(5)] * (TEXTS // 5)
    model.streaming.close()


def test_turns_go_round() -> None:
    turns, order = Turns(), list[int]()
    turns.take()
    threads = []
    for number in range(4):
        threads.append(threading.Thread(target=lambda n=number: (turns.take(), order.append(n), turns.end())))
        threads[-1].start()
        while len(turns._waiting) <= number:
            pass
    assert turns.awaited
    turns.end()
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3]
    assert not turns.awaited
