"""Keys and values by codes of a few bits, which attention reads natively: a kind of cache.

    a token's k and v ──► as they are, while it is among the newest ──► codes, for good
      the first ones ──► as they are, for good

A head's row is rotated, so that its coordinates look Gaussian, divided by one scale, and rounded to the levels of a
Gaussian grid (native/src/coded.hpp). Nothing is coded twice. What a token sees depends on its place in the text alone,
not on how the text was cut into passes.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from waterfill.base import native
from waterfill.base.errors import UnsupportedError
from waterfill.codecs.grids import grid
from waterfill.running.engine.cache import KeysValues, Shape, pointers

BLOCK = 128  # tokens; kCodedTokens in native/src/coded.hpp
HEAD_DIM = 16  # that head_dim is a multiple of: kCodedHeadDim there
SCALE_BYTES = 2  # of a token's head
MOST_LEVEL = 127
PLAIN = 16  # bits of what is not coded, whether that is bfloat16 or float32


@dataclass(frozen=True)
class CodedShape(Shape):
    """Of keys and values by codes of so many bits: 3, 4, 5 or 8 of each, or 16 for one of them as it is.

    `first` tokens of a text and the `recent` newest are seen as they are. `spare` more of the newest are kept, so that
    a text may go back by so many and be what it would have been without them.
    """

    key_bits: int
    value_bits: int
    first: int = 4
    recent: int = 64
    spare: int = 64

    @classmethod
    def of(cls, shape: Shape, bits: tuple[int, int]) -> CodedShape:
        """The same keys and values by so many bits.

        Raises:
            UnsupportedError: heads that cannot be coded.
        """
        if shape.head_dim % HEAD_DIM:
            raise UnsupportedError(
                f"its heads have {shape.head_dim} dimensions, and coded keys and values need a multiple of {HEAD_DIM}"
            )
        return cls(shape.layers, shape.kv_heads, shape.head_dim, shape.half, shape.positions, *bits)

    @property
    def ring(self) -> int:
        """Newest tokens that are kept as they are."""
        return self.recent + self.spare

    def bits(self, values: bool) -> int:
        """Of keys, or of `values`."""
        return self.value_bits if values else self.key_bits

    @property
    def token_bytes(self) -> int:
        """Of codes and scales."""
        return self.layers * self.kv_heads * sum(self._row_bytes(values) for values in (False, True))

    @property
    def text_bytes(self) -> int:
        """Of tokens that are kept as they are."""
        coded = (self.key_bits != PLAIN) + (self.value_bits != PLAIN)
        return self.layers * coded * self.kv_heads * (self.first + self.ring) * self._whole_row_bytes

    def capacity(self, tokens: int) -> int:
        return -(-tokens // BLOCK) * BLOCK

    def room(self, values: bool, capacity: int) -> npt.NDArray[np.generic]:
        if self.bits(values) == PLAIN:
            return super().room(values, capacity)
        return np.empty((self.kv_heads, capacity // BLOCK, BLOCK * self._row_bytes(values)), np.uint8)

    def whole(self) -> npt.NDArray[np.generic]:
        """Memory for a layer's keys or values as they are, `[kv_heads, first + ring, head_dim]`."""
        return np.empty((self.kv_heads, self.first + self.ring, self.head_dim), self.number)

    def cache(self) -> CodedKeysValues:
        return CodedKeysValues(self)

    @property
    def _whole_row_bytes(self) -> int:
        return self.head_dim * np.dtype(self.number).itemsize

    def _row_bytes(self, values: bool) -> int:
        bits = self.bits(values)
        return self._whole_row_bytes if bits == PLAIN else self.head_dim * bits // 8 + SCALE_BYTES


@dataclass(frozen=True, eq=False)
class GaussianLevels:
    """Whole numbers for the points of a Gaussian grid: `array` int8 `[2^bits]`, ascending, `unit` of them a standard
    deviation. Of 8 bits there is no grid: codes are levels, and `unit` is the largest coordinate."""

    array: npt.NDArray[np.int8]
    unit: float


@lru_cache(maxsize=8)
def levels(bits: int) -> GaussianLevels:
    """Of codes of 3, 4, 5 or 8 bits."""
    if bits == 8:
        return GaussianLevels(np.zeros(0, np.int8), MOST_LEVEL)
    points = grid(1, 1 << bits).array[:, 0]
    unit = float(MOST_LEVEL / np.abs(points).max())
    return GaussianLevels(np.rint(points * unit).astype(np.int8), unit)


class CodedKeysValues(KeysValues):
    """Codes `[kv_heads, capacity / 128, ...]` of each layer, and the first and newest tokens as they are.

    Going back is exact by as many tokens as the newest have to spare. From further back a text goes on with what there
    is: tokens that would be among the newest again are seen by their codes.
    """

    _shape: CodedShape

    def __init__(self, shape: CodedShape) -> None:
        self._coded = self._kept_from = self._reached = 0
        sides = [(values, shape.bits(values)) for values in (False, True)]
        self._whole = {values: [shape.whole() for _ in range(shape.layers)] for values, bits in sides if bits != PLAIN}
        self._whole_addresses = {values: pointers(arrays) for values, arrays in self._whole.items()}
        super().__init__(shape)

    @property
    def owed_bytes(self) -> int:
        """See `Cache`."""
        return super().owed_bytes + (self._shape.text_bytes if self.expected and not self._written else 0)

    def growth_bytes(self, tokens: int) -> int:
        """See `Cache`."""
        return super().growth_bytes(tokens) + (0 if self._written else self._shape.text_bytes)

    def append(self, tokens: int) -> None:
        """See `Cache`."""
        super().append(tokens)
        self._coded = max(self._coded, self.length - self._shape.recent)

    def truncate(self, length: int) -> int:
        """See `Cache`. A pass that was not finished may have taken the places of tokens that have no codes yet: then
        the text goes back to those that have."""
        self._kept_from = max(self._kept_from, self._reached - self._shape.ring)
        if self._kept_from > self._coded:
            length = min(length, max(self._coded, min(self._shape.first, self.length)))
        length = super().truncate(length)
        self._coded, self._kept_from, self._reached = min(self._coded, length), min(self._kept_from, length), length
        return length

    def view(self, tokens: int) -> native.SequenceView:
        """As of `KeysValues`."""
        self._reached = self.length + tokens
        shape, view = self._shape, super().view(tokens)
        keys, values = (self._side(values, arrays) for values, arrays in ((False, self._keys), (True, self._values)))
        view.coding = ctypes.pointer(
            native.CodingView(keys, values, shape.first, shape.recent, shape.ring, self._kept_from, self._coded)
        )
        return view

    def _side(self, values: bool, arrays: list[npt.NDArray[np.generic]]) -> native.CodedView:
        bits, size = self._shape.bits(values), arrays[0].nbytes
        if bits == PLAIN:
            return native.CodedView(bits, bytes=size)
        code, whole = levels(bits), self._whole[values]
        return native.CodedView(
            bits, code.unit, code.array.ctypes.data, self._whole_addresses[values], size, whole[0].nbytes
        )
