"""What generating asks of a model and its sequences, and reading no more of a text than a sequence does not hold.

Sequences ──take──► a sequence ──read(text)──► only what is new: a pass ──► logits
    ▲                   │
    └────give_back──────┘  when the text has ended: the next turn of a conversation goes on in it
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


class TokenModel(Protocol):
    """Weights that any number of sequences are read with."""

    vocabulary: int

    @property
    def positions(self) -> int | None:
        """Most tokens of a text; None: as many as fit."""

    def sequence(self) -> Any:
        """A new `TokenSequence`, which holds no token yet."""

    def expect(self, sequence: Any, tokens: int, prompt: int, *, logits: int = 1, draft: Any = None) -> None:
        """Look whether there is memory for a text of `tokens`, of which `prompt` are read first, with the logits of so
        many positions at a time, and for that of a draft's sequence.

        Raises:
            MemoryLimitError: there is not.
        """

    def forward(
        self, sequences: Sequence[Any], tokens: Sequence[Sequence[int]], logits: int | Sequence[int] = 1
    ) -> list[Floats]:
        """Read on in several sequences; of each, logits `[logits, vocabulary]` of its last `logits` tokens."""


class TokenSequence(Protocol):
    """A text as a model remembers it. Which tokens those are it says itself, after whatever was done to it."""

    ids: list[int]
    expected: int  # tokens that the text is going to have; 0 where that is not known

    @property
    def model(self) -> Any:
        """The `TokenModel` whose sequence it is."""

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on, or more."""


class Sequences:
    """A model, and the sequence that was used last, unless somebody is using it: a text that begins as that one did is
    read from where it differs. Several threads may take sequences."""

    def __init__(self, model: TokenModel) -> None:
        self.model = model
        self._idle: deque[TokenSequence] = deque(maxlen=1)

    def take(self) -> TokenSequence:
        """A sequence for one text."""
        try:
            return self._idle.pop()
        except IndexError:
            sequence: TokenSequence = self.model.sequence()
            return sequence

    def give_back(self, sequence: TokenSequence) -> None:
        """The text has ended; the one that was kept until now is forgotten."""
        sequence.expected = 0
        self._idle.append(sequence)


class Lease:
    """A sequence for as long as a text is generated: given back by `close`, or when nobody holds the lease any more."""

    def __init__(self, sequences: Sequences) -> None:
        self.sequence = sequences.take()
        self.close = weakref.finalize(self, sequences.give_back, self.sequence)
        self.close.atexit = False


def read(
    sequences: Sequence[TokenSequence], texts: Sequence[Sequence[int]], logits: Sequence[int] | None = None
) -> list[Floats]:
    """Logits, float32 `[logits, vocabulary]`, after the last ids of each text (1 where it is not said of how many), in
    one pass over the sequences of one model, whatever these held before.

    Only what a sequence does not have is forwarded: of a conversation its next turn, of a text whose last tokens were
    rejected those in their place.
    """
    wanted = [1] * len(texts) if logits is None else list(logits)
    new = []
    for sequence, ids, count in zip(sequences, texts, wanted, strict=True):
        sequence.truncate(min(_common(sequence.ids, ids), len(ids) - count))
        new.append(ids[len(sequence.ids) :])
    predictions: list[Floats] = sequences[0].model.forward(sequences, new, wanted)
    return predictions


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two texts have in common from their beginning."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    return next(place for place in range(shorter) if one[place] != other[place])
