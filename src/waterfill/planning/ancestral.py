"""Text from a model's own predictions: ancestral sampling at temperature 1, several sequences in lockstep.

Each goes on from a random token (LLM-QAT, arXiv 2305.17888, §3.1): left to itself a model writes the few kinds of text
that it writes most, and from there it writes whatever it knows (docs/design.md §5).

    begin(count) ──► read(last token of each) ──► logits of each ──► the next token of each
                           ▲                                                  │
                           └──────────────────────────────────────────────────┘

What a sequence is drawn with depends on the seed and its number alone, not on which others are drawn beside it. So one
more sequence is one more, and the text is the same however many are read at a time. One that falls into a loop is drawn
again, from other numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from waterfill.base.progress import Step
from waterfill.planning.estimators import check_probabilities

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Read = Callable[[Ids], Iterable[Floats]]
"""Reads on in texts by one token of each, `[count]`, and gives the logits `[vocabulary]` behind it of each."""
Begin = Callable[[int], Read]
"""Begins so many new texts."""


class Writer(Protocol):
    """Who writes a model's own text."""

    def __call__(
        self, numbers: Sequence[int], length: int, seed: int, progress: Step | None = None, *, start: int | None = None
    ) -> torch.Tensor:
        """Sequences of these numbers, int64 `[numbers, length]`, as `sample` draws them.

        Raises UnsupportedError, having said why, where the model's own class has to.
        """


TOGETHER = 48  # sequences of a pass over the weights
ATTEMPTS = 7  # at a sequence that does not repeat itself
LEAST_HALF, DISTINCT = 32, 4  # tokens of a half that is judged; one of so many has to be new
BLOCK = 256  # probabilities that are added up in float32


def sample(
    begin: Begin,
    numbers: Sequence[int],
    length: int,
    seed: int,
    *,
    start: int | None,
    vocabulary: int,
    together: int = TOGETHER,
    progress: Step | None = None,
) -> torch.Tensor:
    """Sequences of these numbers, int64 `[numbers, length]`. A document that ends is followed by the next one; a
    sequence that repeats itself is drawn again, as far as that helps: nobody's texts are like it.

    Args:
        start: a token that is before the random one.
        vocabulary: tokens that may be drawn.
        together: how many are read at a time.
        progress: called with (tokens of a batch drawn, in all).

    Raises:
        WaterfillError: logits are NaN or infinite.
    """
    tokens = np.empty((len(numbers), length), np.int64)
    due, attempts, done = list(range(len(numbers))), range(1), 0  # places to be drawn, and batches that were
    if progress and due:
        progress(0, -(-len(due) // together) * (length - 1))
    while due and attempts.stop <= ATTEMPTS:
        drawn = [(place, attempt) for place in due for attempt in attempts]
        batches = [drawn[i : i + together] for i in range(0, len(drawn), together)]
        for number, batch in enumerate(batches):
            step = None if progress is None else _after(progress, done + number, done + len(batches))
            generators = [np.random.default_rng([seed % 2**64, numbers[place], attempt]) for place, attempt in batch]
            texts = _batch(begin(len(batch)), generators, length, start, vocabulary, step)
            for (place, attempt), text in zip(batch, texts, strict=True):
                if attempt == attempts.start or repeats_itself(tokens[place]):
                    tokens[place] = text
        done += len(batches)
        due = [place for place in due if repeats_itself(tokens[place])]
        attempts = range(attempts.stop, 2 * attempts.stop + 1)  # twice as many: a pass costs little more
    return torch.from_numpy(tokens)


def repeats_itself(tokens: Ids) -> bool:
    """Whether a text `[length]` has fallen into a loop, as models do that are left to themselves (Holtzman et al. 2020,
    arXiv 1904.09751, §4): a long one whose second half has few tokens over and over."""
    half = tokens[len(tokens) // 2 :]
    return len(half) >= LEAST_HALF and len(np.unique(half)) * DISTINCT < len(half)


def _after(progress: Step, done: int, batches: int) -> Step:
    """Progress of a batch as that of all."""
    return lambda position, last: progress(done * last + position, batches * last)


def _batch(
    read: Read,
    generators: Sequence[np.random.Generator],
    length: int,
    start: int | None,
    vocabulary: int,
    progress: Step | None,
) -> Ids:
    tokens = np.empty((len(generators), length), np.int64)
    begun = [] if start is None else [start]
    tokens[:, : len(begun)] = begun
    tokens[:, len(begun) : len(begun) + 1] = [[generator.integers(vocabulary)] for generator in generators]
    for position in range(1, length):
        pairs = zip(read(tokens[:, position - 1]), generators, strict=True)
        drawn = [choose(row[:vocabulary], generator.random()) for row, generator in pairs]
        if position > len(begun):
            tokens[:, position] = drawn
        if progress:
            progress(position, length - 1)
    return tokens


def choose(logits: Floats, draw: float) -> int:
    """The token at `draw`, in [0, 1), of the cumulative probabilities that float32 logits `[vocabulary]` mean.

    Raises WaterfillError where they mean none.
    """
    with np.errstate(invalid="ignore"):
        weights = np.exp(logits - logits.max())
    sums = np.add.reduceat(weights, np.arange(0, len(weights), BLOCK))  # adding up all in float64 takes 4 times as long
    ends = np.cumsum(sums, dtype=np.float64)
    check_probabilities(torch.from_numpy(ends[-1:]))
    place = draw * ends[-1]
    block = int(np.searchsorted(ends[:-1], place, side="right"))
    inside = np.cumsum(weights[block * BLOCK : (block + 1) * BLOCK], dtype=np.float64)
    left = place - (ends[block - 1] if block else 0.0)
    last = np.searchsorted(inside, inside[-1])  # that can be drawn: sums are rounded
    return block * BLOCK + int(min(np.searchsorted(inside, left, side="right"), last))


def start_token(config: Any) -> int | None:
    """What texts of a transformers configuration begin with; None where it names no token."""
    for name in ("bos_token_id", "eos_token_id"):
        value = getattr(config, name, None)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int):
            return value
    return None
