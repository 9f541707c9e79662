"""A language model of a few lines for tests of generating, without torch: the next token depends on the last two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

TEXTS = 97  # that the model tells apart


class ToySequence:
    """A text that a `Toy` reads."""

    def __init__(self, model: Any) -> None:
        self.model, self.ids, self.expected = model, list[int](), 0

    def truncate(self, length: int) -> None:
        assert length >= 0
        del self.ids[length:]


class Toy:
    """Random logits per pair of last tokens; `passes` records how many ids each pass was given, `ids` the text that was
    read last."""

    def __init__(self, vocabulary: int, seed: int = 0, *, positions: int | None = None, spread: float = 2.0) -> None:
        self.vocabulary, self.positions = vocabulary, positions
        random = np.random.default_rng(seed)
        self.table = (spread * random.standard_normal((TEXTS, vocabulary))).astype(np.float32)
        self.ids: list[int] = []
        self.passes: list[int] = []

    def logits(self, text: Sequence[int]) -> npt.NDArray[np.float32]:
        """After a text: float32 [vocabulary]."""
        return self.table[sum(place * token for place, token in zip((7, 13), text[-2:], strict=False)) % TEXTS]

    def sequence(self) -> ToySequence:
        return ToySequence(self)

    def expect(self, sequence: Any, tokens: int, prompt: int, *, logits: int = 1, draft: Any = None) -> None:
        assert self.positions is None or tokens <= self.positions

    def forward(
        self, sequences: Sequence[Any], tokens: Sequence[Sequence[int]], logits: int | Sequence[int] = 1
    ) -> list[npt.NDArray[np.float32]]:
        wanted = [logits] * len(sequences) if isinstance(logits, int) else logits
        self.passes.append(sum(map(len, tokens)))
        return [self.read(*one) for one in zip(sequences, tokens, wanted, strict=True)]

    def read(self, sequence: Any, ids: Sequence[int], logits: int) -> npt.NDArray[np.float32]:
        assert 0 < logits <= len(ids)
        self.ids = sequence.ids
        self.ids += ids
        assert self.positions is None or len(self.ids) <= self.positions
        ends = range(len(self.ids) - logits + 1, len(self.ids) + 1)
        return np.stack([self.logits(self.ids[:end]) for end in ends])
