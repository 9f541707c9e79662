"""What a model remembers of a text: a sequence owns the ids of its tokens, and a cache of what was made of them.

    model.sequence() ──► Sequence ──┬── ids
                                    └── Cache: KeysValues, plain numbers of every layer, or codes (coded_cache.py)

Many sequences share the weights of one model, and a pass reads on in several of them. One that is let go of gives its
memory back. A family makes the kind of cache that its layers need: the model asks no more of it than `Cache` says.
"""

from __future__ import annotations

import ctypes
from collections import abc
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from waterfill.base import native

FIRST_CAPACITY = 256  # positions of a cache to begin with; it grows by doubling
HUGE_ARRAY_BYTES = 4 << 20  # from here on numpy asks for huge pages: what is not written may be resident too

Floats = npt.NDArray[np.float32]


class Cache(Protocol):
    """Of the tokens of one sequence, whatever is kept of them. `expected`: tokens that the text is going to have, 0
    where that is not known."""

    expected: int

    @property
    def length(self) -> int:
        """Tokens that it holds."""

    @property
    def owed_bytes(self) -> int:
        """Memory that the expected text takes beyond what has been taken."""

    def held(self, tokens: int) -> int:
        """Of a text of so many tokens: how many have their memory already."""

    def growth_bytes(self, tokens: int) -> int:
        """Memory that `reserve` takes."""

    def reserve(self, tokens: int) -> None:
        """Make room for a text of so many tokens."""

    def append(self, tokens: int) -> None:
        """So many more have been written by a pass."""

    def truncate(self, length: int) -> int:
        """Forget the tokens from `length` on, and return how many are left: fewer, where it cannot go back just there,
        as a recurrent state cannot."""


class Passes(Protocol):
    """A model as its sequences see it."""

    def forward(
        self, sequences: abc.Sequence[Any], tokens: abc.Sequence[abc.Sequence[int]], logits: int = 1
    ) -> list[Floats]:
        """See `LlamaModel.forward`."""


class Sequence:
    """A text that a model reads: the ids of its tokens, in order, and the model's cache of them.

    One thread at a time may use a sequence; several may use several, of one model.
    """

    def __init__(self, model: Passes, cache: Cache) -> None:
        self.model, self.cache = model, cache
        self.ids: list[int] = []

    @property
    def expected(self) -> int:
        """Tokens that the text is going to have; 0 where nobody has said."""
        return self.cache.expected

    @expected.setter
    def expected(self, tokens: int) -> None:
        self.cache.expected = tokens

    def forward(self, ids: abc.Sequence[int], logits: int = 1) -> Floats:
        """Read on: logits `[logits, vocabulary]` of the last so many ids. Raises what `LlamaModel.forward` does."""
        return self.model.forward([self], [ids], logits)[0]

    def append(self, ids: abc.Sequence[int]) -> None:
        """These were read by a pass."""
        self.cache.append(len(ids))
        self.ids += ids

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on, or more, where the cache cannot go back just there: see `ids`."""
        left = self.cache.truncate(min(length, len(self.ids), self.cache.length))
        del self.ids[left:]


@dataclass(frozen=True)
class Shape:
    """Of keys and values: `half` is bfloat16, else float32; `positions` are the most tokens of a text."""

    layers: int
    kv_heads: int
    head_dim: int
    half: bool
    positions: int

    @property
    def token_bytes(self) -> int:
        """Of keys and values of one token, in all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim * (2 if self.half else 4)

    @property
    def text_bytes(self) -> int:
        """Of a text beside its tokens, in all layers."""
        return 0

    @property
    def dtype(self) -> int:
        """The C code of the numbers."""
        return native.BFLOAT16 if self.half else native.FLOAT32

    @property
    def number(self) -> type[np.generic]:
        """The numbers as numpy has them; bfloat16 are their bits."""
        return np.uint16 if self.half else np.float32

    def capacity(self, tokens: int) -> int:
        """Positions of memory for so many."""
        return tokens

    def room(self, values: bool, capacity: int) -> npt.NDArray[np.generic]:
        """Memory for a layer's keys, or its `values`, of so many positions: `[kv_heads, ...]`, of which the first part
        of the second axis is that of the first tokens."""
        del values
        return np.empty((self.kv_heads, capacity, self.head_dim), self.number)

    def cache(self) -> Cache:
        """An empty one."""
        return KeysValues(self)


class KeysValues:
    """Keys and values `[kv_heads, capacity, head_dim]` of each layer, as they are. Memory counts when it is written to.

    Going back is free: what is truncated stays in memory, and is written over.
    """

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self.capacity = self.length = self.expected = 0
        self._written = 0  # positions that are in memory
        self._keys: list[npt.NDArray[np.generic]] = []
        self._values: list[npt.NDArray[np.generic]] = []
        self.reserve(FIRST_CAPACITY)

    @property
    def owed_bytes(self) -> int:
        """See `Cache`."""
        return max(0, self.expected - self._written) * self._shape.token_bytes

    def held(self, tokens: int) -> int:
        """See `Cache`."""
        return min(tokens, self._written)

    def growth_bytes(self, tokens: int) -> int:
        """See `Cache`: what is replaced is given back layer by layer."""
        grown = self._grown(tokens)
        replaced = 0 if grown == self.capacity else self.length // (2 * self._shape.layers)
        return max(0, self._resident(tokens, grown) - self._written + replaced) * self._shape.token_bytes

    def reserve(self, tokens: int) -> None:
        """See `Cache`."""
        if tokens <= self.capacity:
            return
        shape, self.capacity = self._shape, self._grown(tokens)
        self._written = self._resident(self.length, self.capacity) if self.length else 0
        for arrays in (self._keys, self._values):
            for layer in range(shape.layers):
                array = shape.room(arrays is self._values, self.capacity)
                if layer < len(arrays):
                    filled = -(-self.length * array.shape[1] // self.capacity)
                    array[:, :filled] = arrays[layer][:, :filled]
                    arrays[layer] = array
                else:
                    arrays.append(array)
        self._addresses = tuple(pointers(arrays) for arrays in (self._keys, self._values))

    def append(self, tokens: int) -> None:
        """See `Cache`."""
        self.length += tokens
        self._written = max(self._written, self._resident(self.length, self.capacity))

    def truncate(self, length: int) -> int:
        """See `Cache`."""
        self.length = min(length, self.length)
        return self.length

    def view(self, tokens: int) -> native.SequenceView:
        """For a pass that writes so many more tokens, of which there is room; valid until more is reserved."""
        size = self._keys[0].nbytes if self._keys else 0
        return native.SequenceView(tokens, self.length, self.capacity, *self._addresses, len(self._keys), size)

    def _grown(self, tokens: int) -> int:
        """The capacity for so many tokens: at once that of a text whose length is known, else by doubling."""
        if tokens <= self.capacity:
            return self.capacity
        if tokens <= self.expected:
            return self._shape.capacity(self.expected)
        return self._shape.capacity(min(max(2 * self.capacity, tokens), max(tokens, self._shape.positions)))

    def _resident(self, tokens: int, capacity: int) -> int:
        """Positions that are in memory once so many of a capacity are written."""
        array_bytes = capacity * self._shape.token_bytes // (2 * self._shape.layers)
        return capacity if array_bytes >= HUGE_ARRAY_BYTES else tokens


def pointers(arrays: abc.Sequence[npt.NDArray[np.generic]]) -> Any:
    """The arrays' addresses, as wf_sequence has them."""
    addresses = (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
    return ctypes.cast(addresses, ctypes.POINTER(ctypes.c_void_p))
