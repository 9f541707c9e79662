"""What a codec is, and the registry that maps the name stored in an artifact to the class that decodes it.

A codec encodes a matrix `[out, in]` into named buffers whose sizes are known beforehand, and decodes them back. Its
rate and distortion are known before it sees a weight, because a rotated matrix is Gaussian: that is what makes planning
data-free and instant.

    codec = get_codec("higgs-p2-n16")
    point = codec.menu_point((4096, 4096))                   # size_bytes, rate_bits, t2
    encoder = codec.encoder((4096, 4096), exponent=e, rho=1.0)
    pieces = encoder.add(rows) ... encoder.finish()          # of buffers, rows in order, in blocks
    weight = codec.decode(codec.encode(weight))              # a matrix at once
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from waterfill.base.dtypes import ITEM_BYTES
from waterfill.base.errors import WaterfillError
from waterfill.base.lazy import torch

Shape = tuple[int, int]  # (out_features, in_features)

BLOCK_WEIGHTS = 1 << 20  # 4 MiB of float32; encoding takes about 25 times that


class BufferLayout(NamedTuple):
    """One named buffer of an encoded matrix; rows are stored one after the other."""

    dtype: str  # safetensors name
    shape: tuple[int, ...]
    row_bytes: int  # bytes that each row of the matrix contributes; 0: no fixed number


@dataclass(frozen=True)
class MenuPoint:
    """What a codec costs and gives for one matrix."""

    codec: str
    size_bytes: int  # all buffers: indices, scales, padding
    rate_bits: float  # 8 * size_bytes / weights
    t2: float  # relative squared error with MSE scales, ||W' - W||^2 / ||W||^2
    along: float = 0.0  # share of the noise along the weights (`loss.predicted_kl`)


@dataclass(frozen=True)
class Encoded:
    """A matrix, or with a fixed rate a block of its rows, encoded."""

    shape: Shape
    buffers: Mapping[str, torch.Tensor]
    exponent: int  # scales are stored times 2^-exponent
    noise_power: float  # ||W' - W||^2 of the block
    power: float  # ||W||^2 of the block


class Piece(NamedTuple):
    """Part of a buffer of an encoded matrix."""

    key: str
    offset_bytes: int
    data: torch.Tensor | bytes


class Encoder(ABC):
    """Encodes one matrix. `noise_power` and `power` are ||W' - W||^2 and ||W||^2 of the rows so far."""

    block_rows: int  # rows that `add` wants, but for the last call
    noise_power = 0.0
    power = 0.0

    @abstractmethod
    def add(self, rows: torch.Tensor) -> Iterator[Piece]:
        """The next rows, finite, `[rows, in]`, fp32/fp16/bf16."""

    @abstractmethod
    def finish(self) -> Iterator[Piece]:
        """What is left after the last row; then every byte of every buffer has been given."""


class Codec(ABC):
    """Base of all matrix codecs. Instances are immutable; `name` fully describes them."""

    name: str

    @abstractmethod
    def layout(self, shape: Shape) -> Mapping[str, BufferLayout]:
        """Buffers of a matrix, in storage order, sizes exact."""

    @abstractmethod
    def distortion(self, shape: Shape) -> float:
        """Expected t2 of a Gaussian matrix of this shape with MSE scales."""

    def along(self, shape: Shape) -> float:
        """Share of the noise that lies along the weights; 0 where the gain is exact in every group."""
        return 0.0

    @abstractmethod
    def encode(self, weight: torch.Tensor, *, exponent: int = 0, rho: float = 1.0) -> Encoded:
        """Encode a matrix, or any block of its rows where each row has its `row_bytes`: finite, fp32/fp16/bf16.

        `rho` chooses the gain (`waterfill.planning.loss`).
        """

    def encoder(self, shape: Shape, *, exponent: int = 0, rho: float = 1.0) -> Encoder:
        """An encoder of a matrix of that shape, for matrices that are not held in memory."""
        return _RowEncoder(self, shape, exponent, rho)

    @abstractmethod
    def decode(self, encoded: Encoded) -> torch.Tensor:
        """Decode to float32 `[rows, in]`; the same bits on every machine."""

    def menu_point(self, shape: Shape) -> MenuPoint:
        size_bytes = sum(buffer_bytes(buffer) for buffer in self.layout(shape).values())
        rate_bits = 8 * size_bytes / math.prod(shape)
        return MenuPoint(self.name, size_bytes, rate_bits, self.distortion(shape), self.along(shape))


class _RowEncoder(Encoder):
    """Rows contribute a fixed number of bytes to each buffer."""

    def __init__(self, codec: Codec, shape: Shape, exponent: int, rho: float) -> None:
        self._codec, self._shape, self._exponent, self._rho = codec, shape, exponent, rho
        self._layout, self._row = codec.layout(shape), 0
        self.block_rows = max(1, BLOCK_WEIGHTS // shape[1])

    def add(self, rows: torch.Tensor) -> Iterator[Piece]:
        encoded = self._codec.encode(rows, exponent=self._exponent, rho=self._rho)
        self.noise_power += encoded.noise_power
        self.power += encoded.power
        for key, data in encoded.buffers.items():
            yield Piece(key, self._row * self._layout[key].row_bytes, data)
        self._row += len(rows)

    def finish(self) -> Iterator[Piece]:
        for key, part in self._layout.items():
            used = self._shape[0] * part.row_bytes
            yield Piece(key, used, bytes(buffer_bytes(part) - used))  # alignment


def buffer_bytes(buffer: BufferLayout) -> int:
    return ITEM_BYTES[buffer.dtype] * math.prod(buffer.shape)


_FAMILIES: dict[str, Callable[[str], Codec]] = {}


def register_codec(family: str, factory: Callable[[str], Codec]) -> None:
    """Register the codecs whose names are `family` or start with `family-`. `factory` gets the whole name."""
    if family in _FAMILIES:
        raise ValueError(f"codec family {family!r} is registered already")
    _FAMILIES[family] = factory


@lru_cache(maxsize=1024)
def get_codec(name: str) -> Codec:
    """The codec of that name; a WaterfillError names the known families otherwise."""
    factory = _FAMILIES.get(name.split("-", 1)[0])
    if factory is None:
        raise WaterfillError(
            f"codec {name!r} is unknown; known families are {', '.join(sorted(_FAMILIES))} "
            "(a newer waterfill, or a plug-in that registers it, may read this)"
        )
    return factory(name)
