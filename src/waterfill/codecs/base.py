"""What a codec is, and the registry that maps the name stored in an artifact to the class that decodes it.

A codec encodes row blocks of a matrix `[out, in]` into named buffers whose sizes are known beforehand, and decodes them
back. Its rate and distortion are known before it sees a weight, because a rotated matrix is Gaussian: that is what
makes planning data-free and instant.

    codec = get_codec("higgs-p2-n16")
    point = codec.menu_point((4096, 4096))                   # size_bytes, rate_bits, t2
    encoded = codec.encode(rows, exponent=e, rho=1.0)        # any block of rows
    rows_again = codec.decode(encoded)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from waterfill.errors import WaterfillError

Shape = tuple[int, int]  # (out_features, in_features)


class BufferLayout(NamedTuple):
    """One named buffer of an encoded matrix; rows are stored one after the other."""

    dtype: str  # safetensors name
    shape: tuple[int, ...]
    row_bytes: int  # bytes that each row of the matrix contributes


@dataclass(frozen=True)
class MenuPoint:
    """What a codec costs and gives for one matrix."""

    codec: str
    size_bytes: int  # all buffers: indices, scales, padding
    rate_bits: float  # 8 * size_bytes / weights
    t2: float  # relative squared error with MSE scales, ||W' - W||^2 / ||W||^2


@dataclass(frozen=True)
class Encoded:
    """A block of rows, encoded."""

    shape: Shape
    buffers: Mapping[str, torch.Tensor]
    exponent: int  # scales are stored times 2^-exponent
    noise_power: float  # ||W' - W||^2 of the block
    power: float  # ||W||^2 of the block


class Codec(ABC):
    """Base of all matrix codecs. Instances are immutable; `name` fully describes them."""

    name: str

    @abstractmethod
    def layout(self, shape: Shape) -> Mapping[str, BufferLayout]:
        """Buffers of a matrix, in storage order, sizes exact."""

    @abstractmethod
    def distortion(self, shape: Shape) -> float:
        """Expected t2 of a Gaussian matrix of this shape with MSE scales."""

    @abstractmethod
    def encode(self, weight: torch.Tensor, *, exponent: int = 0, rho: float = 1.0) -> Encoded:
        """Encode finite rows `[rows, in]`, fp32/fp16/bf16. `rho` chooses the gain (`waterfill.loss`)."""

    @abstractmethod
    def decode(self, encoded: Encoded) -> torch.Tensor:
        """Decode to float32 `[rows, in]`; the same bits on every machine."""

    def menu_point(self, shape: Shape) -> MenuPoint:
        size_bytes = sum(buffer_bytes(buffer) for buffer in self.layout(shape).values())
        return MenuPoint(self.name, size_bytes, 8 * size_bytes / math.prod(shape), self.distortion(shape))


ITEM_BYTES = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4}


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
