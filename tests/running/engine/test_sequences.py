"""Several texts over one set of weights: in one pass they are what they are one after another, to the bit."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import waterfill
from tests.support import streams
from waterfill.base import native, process
from waterfill.base.errors import MemoryLimitError, WaterfillError
from waterfill.running.engine.cache import KeysValues, Sequence, Shape
from waterfill.running.engine.families.llama import LlamaModel
from waterfill.running.engine.opening import open_model
from waterfill.running.streaming.limit import Limit, Working
from waterfill.running.text.model import Sequences, read

pytestmark = [
    pytest.mark.skipif(native.isa() is None, reason="the native library was not built, or is switched off"),
    pytest.mark.usefixtures("no_reader_left"),
]

LIBRARY = native.library()
ISAS = [] if LIBRARY is None else list(LIBRARY.isas)
PROMPTS = [
    "def read(",
    "import os\n",
    "class Box:\n    def",
    "x = 1\nx = 1\nx =",
    "return self.",
    "for i in range(",
    "if",
]
OPTIONS: dict[str, Any] = {"temperature": 0, "max_new_tokens": 12}


@pytest.fixture
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """One of the machine's instruction sets, in use."""
    monkeypatch.setenv(native.ISA_VARIABLE, request.param)
    native.isa.cache_clear()
    yield request.param
    monkeypatch.undo()
    native.isa.cache_clear()


@pytest.fixture(scope="module")
def model(work: Path) -> LlamaModel:
    return open_model(work / "packed")


@pytest.fixture(scope="module")
def engine(work: Path) -> waterfill.Engine:
    return waterfill.Engine(work / "packed")


def texts(count: int) -> list[list[int]]:
    """Token ids of texts of other lengths, from one token to some dozens."""
    random = np.random.default_rng(count)
    return [random.integers(0, 8000, length).tolist() for length in (1 + 7 * np.arange(count)) % 40 + 1]


def streamed(path: Path) -> LlamaModel:
    tuning = streams.quick(streams.mixed, chunk_bytes=1 << 16)
    return open_model(path, memory=process.resident_bytes() + 200_000_000, streamed=True, tuning=tuning)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("where", ["resident", "streamed"])
def test_a_pass_over_several_is_one_over_each(work: Path, isa: str, where: str) -> None:
    """Prompts of several lengths, a token for each, and then a prompt beside tokens; twelve texts, and eight."""
    model = open_model(work / "packed") if where == "resident" else streamed(work / "packed")
    prompts = texts(12)
    together, alone = ([model.sequence() for _ in prompts] for _ in range(2))
    for new, logits in ((prompts, 1), ([[5]] * 12, 1), (prompts[3:] + prompts[:3], [min(3, len(p)) for p in prompts])):
        wanted = [1] * 12 if isinstance(logits, int) else [min(n, len(i)) for n, i in zip(logits, new, strict=True)]
        found = model.forward(together, new, wanted)
        for sequence, ids, count, rows in zip(alone, new, wanted, found, strict=True):
            assert rows.shape == (count, model.vocabulary)
            assert np.array_equal(rows, sequence.forward(ids, count))
    few = model.forward(together[2:10], [[7]] * 8)
    assert all(np.array_equal(rows, one.forward([7])) for rows, one in zip(few, alone[2:10], strict=True))
    assert [sequence.ids for sequence in together] == [sequence.ids for sequence in alone]
    if model.streaming is not None:
        model.streaming.close()


def test_one_goes_back_and_the_others_do_not(model: LlamaModel) -> None:
    one, two, fresh = (model.sequence() for _ in range(3))
    model.forward([one, two], [[1, 2, 3, 4, 5, 6], [9, 8]])
    one.truncate(3)
    found = model.forward([one, two], [[7, 7], [7]], [2, 1])
    assert np.array_equal(found[0], fresh.forward([1, 2, 3, 7, 7], 2))
    assert (one.ids, two.ids) == ([1, 2, 3, 7, 7], [9, 8, 7])


def test_long_prompts_are_read_in_several_passes(work: Path) -> None:
    """Cut anywhere, with the end of one prompt and the beginning of the next in one pass."""
    model = open_model(work / "packed")
    prompts = [list(range(1, 50)), [3], list(range(100, 171))]
    whole = model.forward([model.sequence() for _ in prompts], prompts, [5, 1, 30])
    model._pass_tokens = 16
    found = model.forward([model.sequence() for _ in prompts], prompts, [5, 1, 30])
    assert all(np.array_equal(a, b) for a, b in zip(found, whole, strict=True))


def test_only_what_is_new_is_read(model: LlamaModel) -> None:
    one, two = model.sequence(), model.sequence()
    read([one, two], [[1, 2, 3], [4, 5]])
    lengths = []
    forward = model.forward
    model.forward = lambda s, tokens, n: (lengths.append([len(i) for i in tokens]), forward(s, tokens, n))[1]  # type: ignore[method-assign]
    try:
        found = read([one, two], [[1, 2, 9, 9], [4, 5]])
    finally:
        del model.forward
    assert lengths == [[2, 1]]
    assert np.array_equal(found[0], model.sequence().forward([1, 2, 9, 9]))


def test_wrong_passes_are_refused_and_change_nothing(model: LlamaModel, work: Path) -> None:
    one, two = model.sequence(), model.sequence()
    one.forward([1, 2])
    strange = open_model(work / "packed").sequence()
    for sequences, tokens in (
        ([one, one], [[1], [1]]),
        ([one, strange], [[1], [1]]),
        ([one, two], [[1], []]),
        ([], []),
    ):
        with pytest.raises(ValueError, match="pass"):
            model.forward(sequences, tokens)
    with pytest.raises(IndexError, match="8192 is none of the model's"):
        model.forward([one, two], [[3], [8192]])
    with pytest.raises(WaterfillError, match="tokens are more than the"):
        model.forward([one, two], [[3], [0] * (model.positions + 1)])
    assert (one.ids, two.ids, one.cache.length, two.cache.length) == ([1, 2], [], 2, 0)


Lie = Callable[[native.SequenceView], None]


@pytest.mark.parametrize(
    "lie",
    [
        lambda view: setattr(view, "tokens", view.tokens + 1),
        lambda view: setattr(view, "tokens", -1),
        lambda view: setattr(view, "position", view.capacity),
        lambda view: setattr(view, "position", -1),
        lambda view: setattr(view, "capacity", 2 * view.capacity),
        lambda view: setattr(view, "bytes", view.bytes - 1),
        lambda view: setattr(view, "layers", view.layers - 1),
        lambda view: setattr(view, "keys", None),
        lambda view: setattr(view, "values", view.keys),
    ],
)
def test_the_library_refuses_sizes_that_cannot_be(model: LlamaModel, lie: Lie, monkeypatch: pytest.MonkeyPatch) -> None:
    view = KeysValues.view

    def lying(cache: KeysValues, tokens: int) -> native.SequenceView:
        found = view(cache, tokens)
        lie(found)
        return found

    one = model.sequence()
    one.forward([1, 2])
    with monkeypatch.context() as changed:
        changed.setattr(KeysValues, "view", lying)
        with pytest.raises(ValueError, match=r"wf_run_layers refused its arguments \(status -3\)"):
            one.forward([3])
    assert one.ids == [1, 2]
    assert np.array_equal(one.forward([3]), model.sequence().forward([1, 2, 3]))


def test_a_sequence_that_is_forgotten_frees_its_memory(model: LlamaModel) -> None:
    each = model._shape.token_bytes * 256
    gc.collect()
    tracemalloc.start()
    try:
        kept = [model.sequence() for _ in range(5)]
        model.forward(kept, [[1, 2, 3]] * 5)
        held = tracemalloc.get_traced_memory()[0]
        assert held > 5 * each
        del kept[1:]
        assert tracemalloc.get_traced_memory()[0] < held - 3.9 * each
        assert len(model._sequences) == 1
    finally:
        tracemalloc.stop()


def test_what_other_texts_are_to_take_is_not_there_for_a_new_one(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_model(work / "packed")
    monkeypatch.setattr(process, "resident_bytes", lambda: 0)
    token = model._shape.token_bytes
    working = Working(token=token, activations=1e-6, logits=0)
    model._limit = Limit(Path("artifact"), 700 * token, working, overhead_bytes=0)
    one, two = model.sequence(), model.sequence()
    model.expect(one, 400, 10)
    with pytest.raises(MemoryLimitError, match="too little for reading 10 tokens"):
        model.expect(two, 400, 10)
    model.expect(two, 200, 10)
    del two
    one.forward([1] * 300)
    model.expect(model.sequence(), 500, 10)  # of the first 400 at least 300 are in memory


def test_caches_that_cannot_go_back_just_there_are_read_again() -> None:
    """As a recurrent state, of which only some are kept."""

    class Recurrent(KeysValues):
        def truncate(self, length: int) -> int:
            return super().truncate(length // 4 * 4 if length < self.length else length)

    class Noting:
        vocabulary, positions = 9, 99

        def forward(self, sequences: Any, tokens: Any, logits: Any = 1) -> Any:
            seen.extend(tokens)
            for sequence, ids in zip(sequences, tokens, strict=True):
                sequence.append(ids)
            return [np.zeros((1, 9), np.float32)] * len(tokens)

    seen: list[list[int]] = []
    sequence = Sequence(Noting(), Recurrent(Shape(1, 1, 2, False, 99)))
    read([sequence], [[1, 2, 3, 4, 5, 6, 7]])
    read([sequence], [[1, 2, 3, 4, 5, 6, 8, 9]])
    assert seen == [[1, 2, 3, 4, 5, 6, 7], [5, 6, 8, 9]]


def test_texts_together_are_the_texts_one_by_one(engine: waterfill.Engine) -> None:
    single = ["".join(engine.generate(prompt, **OPTIONS)) for prompt in PROMPTS]
    for options in ({}, {"together": 3}, {"together": 1}, {"lookup": 4}):
        generations = engine.generate_many(PROMPTS, **OPTIONS, **options)
        assert generations.texts() == single
        assert generations.stats.tokens == 12 * len(PROMPTS)
    seeded = {"temperature": 1.0, "seed": 3, "max_new_tokens": 9}
    assert engine.generate_many(PROMPTS, **seeded).texts() == ["".join(engine.generate(p, **seeded)) for p in PROMPTS]


def test_a_text_that_has_ended_leaves_and_the_next_one_joins(
    engine: waterfill.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts of other lengths, by an end of text that only some of them come to."""
    plain = []
    for prompt in PROMPTS:
        list(engine.generate(prompt, **OPTIONS))
        used = engine._sequences.take()
        plain.append(used.ids[-11:])
        engine._sequences.give_back(used)
    end = next(token for token in plain[0][3:] if not all(token in ids for ids in plain))
    monkeypatch.setattr(engine, "defaults", replace(engine.defaults, ends=frozenset({end})))
    single = ["".join(engine.generate(prompt, **OPTIONS)) for prompt in PROMPTS]
    assert len({len(text) for text in single}) > 1
    widths: list[int] = []
    forward = LlamaModel.forward
    monkeypatch.setattr(
        LlamaModel,
        "forward",
        lambda model, sequences, *given: (widths.append(len(sequences)), forward(model, sequences, *given))[1],
    )
    assert engine.generate_many(PROMPTS, **OPTIONS, together=3).texts() == single
    assert max(widths) == 3
    assert sum(widths) < 12 * len(PROMPTS)


def test_texts_wait_where_memory_is_short(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = waterfill.Engine(work / "packed")
    expected = engine.generate_many(PROMPTS, **OPTIONS).texts()
    monkeypatch.setattr(process, "resident_bytes", lambda: 0)
    working = Working(token=1, activations=1e-6, logits=0)
    monkeypatch.setattr(KeysValues, "growth_bytes", lambda cache, tokens: 0)
    monkeypatch.setattr(KeysValues, "owed_bytes", property(lambda cache: cache.expected))
    engine.model._limit = Limit(Path("artifact"), 45, working, overhead_bytes=0)  # two of the texts, or so
    widths: list[int] = []
    forward = LlamaModel.forward
    monkeypatch.setattr(
        LlamaModel,
        "forward",
        lambda model, sequences, *given: (widths.append(len(sequences)), forward(model, sequences, *given))[1],
    )
    assert engine.generate_many(PROMPTS, **OPTIONS).texts() == expected
    assert 1 < max(widths) < len(PROMPTS)
    engine.model._limit = Limit(Path("artifact"), 5, working, overhead_bytes=0)
    engine._sequences.take()  # which has memory already
    with pytest.raises(MemoryLimitError):
        engine.generate_many(PROMPTS, **OPTIONS)


def test_leaving_a_batch_gives_its_sequences_back(engine: waterfill.Engine) -> None:
    generations = engine.generate_many(PROMPTS, **OPTIONS)
    number, piece = next(generations)
    assert 0 <= number < len(PROMPTS)
    assert piece
    generations.close()
    assert list(generations) == []
    gc.collect()
    assert len(engine.model._sequences) == 1
    assert engine.generate_many([], **OPTIONS).texts() == []


def test_texts_that_are_over_hold_no_memory(engine: waterfill.Engine) -> None:
    gc.collect()
    over = [engine.generate(prompt, **OPTIONS) for prompt in PROMPTS]
    for generation in over:
        list(generation)
    assert len(engine.model._sequences) == 1
    assert all(generation.stats.tokens == 12 for generation in over)


def test_the_sequence_of_the_last_text_is_kept_and_no_other(model: LlamaModel) -> None:
    sequences = Sequences(model)
    one, two = sequences.take(), sequences.take()
    sequences.give_back(one)
    sequences.give_back(two)
    assert sequences.take() is two
    assert sequences.take() is not one
