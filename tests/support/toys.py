"""A language model of a few lines for tests of generating, without torch: the next token depends on the last two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

TEXTS = 97  # that the model tells apart


class Toy:
    """Random logits per pair of last tokens; `passes` records how many ids each pass was given."""

    def __init__(self, vocabulary: int, seed: int = 0, *, positions: int | None = None, spread: float = 2.0) -> None:
        self.vocabulary, self.positions = vocabulary, positions
        random = np.random.default_rng(seed)
        self.table = (spread * random.standard_normal((TEXTS, vocabulary))).astype(np.float32)
        self.ids: list[int] = []
        self.passes: list[int] = []

    @property
    def length(self) -> int:
        return len(self.ids)

    def logits(self, text: Sequence[int]) -> npt.NDArray[np.float32]:
        """After a text: float32 [vocabulary]."""
        return self.table[sum(place * token for place, token in zip((7, 13), text[-2:], strict=False)) % TEXTS]

    def expect(self, tokens: int, prompt: int, *, logits: int = 1, draft: Any = None) -> None:
        assert self.positions is None or tokens <= self.positions

    def forward(self, ids: Sequence[int], logits: int = 1) -> npt.NDArray[np.float32]:
        assert 0 < logits <= len(ids)
        self.passes.append(len(ids))
        self.ids += ids
        assert self.positions is None or len(self.ids) <= self.positions
        ends = range(len(self.ids) - logits + 1, len(self.ids) + 1)
        return np.stack([self.logits(self.ids[:end]) for end in ends])

    def truncate(self, length: int) -> None:
        assert length <= len(self.ids)
        del self.ids[length:]
