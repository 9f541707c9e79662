"""Drawing tokens from logits, against plain float64 arithmetic."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pytest
import torch

from waterfill.base.errors import WaterfillError
from waterfill.planning import ancestral
from waterfill.planning.ancestral import ATTEMPTS, BLOCK, choose, repeats_itself, sample

Floats = npt.NDArray[np.float32]


@pytest.mark.parametrize("vocabulary", [2, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 7])
def test_a_draw_is_looked_up_in_cumulative_probabilities(vocabulary: int) -> None:
    random = np.random.default_rng(vocabulary)
    for scale in (0.1, 3.0, 20.0):
        logits = random.normal(0, scale, vocabulary).astype(np.float32)
        weights = np.exp(logits.astype(np.float64) - logits.max())
        ends = np.cumsum(weights) / weights.sum()
        for draw in random.random(200):
            token = choose(logits, draw)
            assert (ends[token - 1] if token else 0) - 1e-6 <= draw <= ends[token] + 1e-6


@pytest.mark.parametrize("draw", [0.0, 0.25, 0.5, 1 - 2**-53])
def test_what_cannot_be_is_not_drawn(draw: float) -> None:
    logits = np.full(3 * BLOCK, -np.inf, np.float32)
    possible = [5, BLOCK + 1, 2 * BLOCK + 3]
    logits[possible] = 0.0
    assert choose(logits, draw) == possible[int(3 * draw)]


@pytest.mark.parametrize("values", [[np.nan, 0.0], [0.0, np.inf], [-np.inf, -np.inf]])
def test_logits_that_mean_nothing_are_refused(values: list[float]) -> None:
    with pytest.raises(WaterfillError, match="the model gives NaN or infinite logits on the probe"):
        choose(np.array(values, np.float32), 0.5)


def test_texts_are_read_token_by_token_and_in_batches() -> None:
    """A model whose next token is sure: the last one plus one. Beyond the vocabulary, more is predicted than drawn."""
    begun: list[int] = []

    def begin(count: int) -> object:
        begun.append(count)

        def read(last: npt.NDArray[np.int64]) -> Iterable[Floats]:
            return [np.where(np.arange(12) == token + 1, 50.0, 0.0).astype(np.float32) for token in last]

        return read

    seen: list[tuple[int, int]] = []
    progress = lambda done, total: seen.append((done, total))  # noqa: E731
    tokens = sample(begin, range(5), 4, 0, start=3, vocabulary=9, together=2, progress=progress)  # type: ignore[arg-type]
    assert tokens[:, 0].eq(3).all()
    for text in tokens[:, 1:].tolist():
        assert text == [min(text[0] + step, 8) for step in range(3)] or text[0] > 6, "up to the last of the vocabulary"
    assert begun == [2, 2, 1]
    assert seen == [(step, 9) for step in range(10)]
    first = sample(begin, range(50), 2, 0, start=None, vocabulary=9)[:, 0]  # type: ignore[arg-type]
    assert set(first.tolist()) == set(range(9))
    second = sample(begin, range(50), 2, 0, start=3, vocabulary=9)[:, 1]  # type: ignore[arg-type]
    assert torch.equal(first, second)


def looping(count: int) -> object:
    """A model that begins to say 1 for ever, half of the times that its first token is above 50."""
    either = np.zeros(100, np.float32)
    either[[1, 2]] = 50.0
    stuck = np.zeros(100, np.float32)
    stuck[1] = 50.0
    free = np.where((np.arange(100) > 2) & (np.arange(100) <= 50), 0.0, -50.0).astype(np.float32)

    def read(last: npt.NDArray[np.int64]) -> Iterable[Floats]:
        return [either if token > 50 else stuck if token == 1 else free for token in last]

    return read


def test_a_text_that_repeats_itself_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    progress = lambda done, total: seen.append((done, total))  # noqa: E731
    tokens = sample(looping, range(24), 80, 0, start=0, vocabulary=100, progress=progress)  # type: ignore[arg-type]
    assert not any(repeats_itself(text) for text in tokens.numpy())
    assert all(0 <= done <= total for done, total in seen)
    assert seen[-1][0] == seen[-1][1]
    some = sample(looping, [17, 3], 80, 0, start=0, vocabulary=100, together=1)  # type: ignore[arg-type]
    assert torch.equal(some, tokens[[17, 3]])
    monkeypatch.setattr(ancestral, "ATTEMPTS", 1)
    first = sample(looping, range(24), 80, 0, start=0, vocabulary=100)  # type: ignore[arg-type]
    looped = torch.tensor([repeats_itself(text) for text in first.numpy()])
    assert 4 < looped.sum() < 20
    assert torch.equal(first[~looped], tokens[~looped])


def test_a_model_that_only_repeats_itself_is_taken_as_it_is() -> None:
    begun: list[int] = []

    def begin(count: int) -> object:
        begun.append(count)
        return lambda last: [np.where(np.arange(9) == 4, 50.0, 0.0).astype(np.float32) for _ in last]

    tokens = sample(begin, range(3), 64, 0, start=4, vocabulary=9)  # type: ignore[arg-type]
    assert tokens[:, [0, *range(2, 64)]].eq(4).all()
    assert begun == [3, 2 * 3, 4 * 3]
    assert sum(begun) == 3 * ATTEMPTS


def test_what_repeats_itself() -> None:
    words, loop = np.arange(200), np.tile([7, 8, 9], 100)
    assert not repeats_itself(words[:160])
    assert not repeats_itself(np.concatenate([loop[:60], words[:100]]))  # it came out of it
    assert repeats_itself(np.concatenate([words[:60], loop[:100]]))
    assert not repeats_itself(loop[:61])  # too short to tell
    assert repeats_itself(loop[:64])
