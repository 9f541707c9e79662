"""What generating asks of a model, and which tokens a model's cache holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt


class TokenModel(Protocol):
    """A model that remembers the text: each pass appends to its cache of keys and values.

    Two are equal only if they are the same object, as with any class that does not say otherwise.
    """

    vocabulary: int

    @property
    def positions(self) -> int | None:
        """Most tokens of a text; None: as many as fit."""

    @property
    def length(self) -> int:
        """Tokens in the cache."""

    def expect(self, tokens: int, prompt: int, *, logits: int = 1, draft: Any = None) -> None:
        """Look whether there is memory for a text of `tokens`, of which `prompt` are read first, with the logits of so
        many positions at a time, and for a draft's own. Raises MemoryLimitError if there is not."""

    def forward(self, ids: Sequence[int], logits: int = 1) -> npt.NDArray[np.float32]:
        """Append ids to the cache; logits, float32 [logits, vocabulary], of the last `logits` of them."""

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on."""


_held: WeakKeyDictionary[TokenModel, list[int]] = WeakKeyDictionary()  # ids in the cache of each model


def read(model: TokenModel, ids: Sequence[int], logits: int = 1) -> npt.NDArray[np.float32]:
    """Logits, float32 [logits, vocabulary], after the last `logits` ids of a text, whatever text was read before.

    Only what the cache does not have is forwarded: of a conversation its next turn, of a text whose last tokens were
    rejected those in their place.
    """
    held = _held.get(model, [])
    if model.length != len(held):  # somebody else has used the model, or a pass was interrupted
        held = []
    kept = min(_common(held, ids), len(ids) - logits)
    if kept < model.length:
        model.truncate(kept)
    _held[model] = list(ids[:kept])  # should the pass not come to its end
    found = model.forward(ids[kept:], logits)
    _held[model] = list(ids)
    return found


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two texts have in common from their beginning."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    return next(place for place in range(shorter) if one[place] != other[place])
