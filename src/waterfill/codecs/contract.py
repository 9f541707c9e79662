"""What a codec is, and the registry that maps the name stored in an artifact to the class that decodes it.

A codec encodes a matrix `[out, in]` into named buffers whose sizes are known beforehand, and decodes them back. Its
rate and distortion are known before it sees a weight, because a rotated matrix is Gaussian: that is what makes planning
data-free and instant.

    codec = get_codec("higgs-p2-n16")
    point = codec.menu_point((4096, 4096))                   # planning: size_bytes, rate_bits, t2; `rates`
    encoder = codec.encoder((4096, 4096), exponent=e, rho=1.0)
    pieces = encoder.add(rows) ... encoder.finish()          # packing: of buffers, rows in order, in blocks
    buffers = codec.to_memory(stored, (4096, 4096), e)       # running: those of `codec.memory`, which is multiplied
    parts = codec.parts((4096, 4096), 1 << 18)               # streaming: what is read and decoded at a time

Whoever uses a codec asks it, and never which one it is. A new one has to say `layout`, `distortion`, `encode` and
`decode`, and does better to say more (docs/design.md, section 4).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from waterfill.base.dtypes import ITEM_BYTES
from waterfill.base.errors import WaterfillError
from waterfill.base.lazy import torch
from waterfill.base.native import Native
from waterfill.codecs import decoded
from waterfill.codecs.feedback import Blocks, Feedback
from waterfill.codecs.hadamard import rotate
from waterfill.codecs.parts import Parts

Shape = tuple[int, int]  # (out_features, in_features)

BLOCK_WEIGHTS = 1 << 20  # 4 MiB of float32; encoding takes about 25 times that
DECODING_BYTES = 32  # per weight of a block, while it is decoded, rotated and rounded: measured


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
    """A matrix, or with a fixed number of bytes per row a block of its rows, encoded."""

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


class Stages(NamedTuple):
    """Buffers of a matrix whose weights are sums: what of them is not cut into parts."""

    wide: Mapping[str, bool]  # by the key of a stage's streams, from the lowest on: whether its levels take 16 bits
    gains: str  # key of the numbers, F16, that the sums of each part are multiplied with


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


@dataclass(frozen=True)
class Rates:
    """The rates that codecs of one kind come in, bits per weight: multiples of `step` from `least` to `most`.

    Continuous where steps are fine, which planning refines; else one by one on a menu.
    """

    pattern: str  # of the codecs' names, which `format` completes with a rate
    least: float
    most: float
    step: float

    def codec(self, rate: float) -> Codec:
        """The codec of a rate, or of the nearest that there is."""
        return get_codec(self.pattern.format(min(max(rate, self.least), self.most)))


class Codec(ABC):
    """Base of all matrix codecs. Instances are immutable; `name` fully describes them."""

    name: str
    for_files = True  # False: a form in memory alone, which nothing is packed with
    rates: Rates | None = None  # that the like of it come in; None: it stands for itself
    rate = 0.0  # of those, its own
    level_count = 1  # that its buffers can be read at: those of a lower one are the first of all

    @abstractmethod
    def layout(self, shape: Shape) -> Mapping[str, BufferLayout]:
        """Buffers of a matrix, in storage order, sizes exact."""

    @abstractmethod
    def distortion(self, shape: Shape) -> float:
        """Expected t2 of a Gaussian matrix of this shape with MSE scales."""

    def at(self, level: int) -> Codec:
        """The codec of the buffers of one of its levels, from 1 up; the last is itself."""
        return self

    def along(self, shape: Shape) -> float:
        """Share of the noise that lies along the weights; 0 where the gain is exact in every group."""
        return 0.0

    @abstractmethod
    def encode(self, weight: torch.Tensor, *, exponent: int = 0, rho: float = 1.0) -> Encoded:
        """Encode a matrix, or any block of its rows where each row has its `row_bytes`: finite, fp32/fp16/bf16.

        `rho` chooses the gain (`waterfill.planning.loss`).
        """

    def encoder(
        self, shape: Shape, *, exponent: int = 0, rho: float = 1.0, feedback: Feedback | None = None
    ) -> Encoder:
        """An encoder of a matrix of that shape, for matrices that are not held in memory; with error feedback where the
        codec has `feedback` for its width."""
        return RowEncoder(partial(self.encode, exponent=exponent, rho=rho), self.layout(shape), shape)

    @abstractmethod
    def decode(self, encoded: Encoded) -> torch.Tensor:
        """Decode to float32 `[rows, in]`; the same bits on every machine."""

    def menu_point(self, shape: Shape) -> MenuPoint:
        size_bytes = layout_bytes(self.layout(shape))
        rate_bits = 8 * size_bytes / math.prod(shape)
        return MenuPoint(self.name, size_bytes, rate_bits, self.distortion(shape), self.along(shape))

    def feedback(self, width: int) -> Blocks:
        """Blocks of the columns of a rotated row of `width`, in the order in which they are encoded where what one
        loses is made up for in those that come after it (`codecs.feedback`); none where they are not."""
        return ()

    # ------------------------------------------------------------------------------------------------- to be multiplied

    @property
    def memory(self) -> MemoryForm:
        """The form that a matrix is multiplied in, once it is loaded: the codec itself where its codes are."""
        return get_codec(decoded.FORM).memory

    def to_memory(self, buffers: Mapping[str, torch.Tensor], shape: Shape, exponent: int) -> Mapping[str, torch.Tensor]:
        """Buffers of a matrix, or of a block of its rows -> those of `memory`, with the same exponent; on the CPU.

        Raises:
            ArtifactError: they are damaged.
        """
        decoded.say_once(self.name)
        step, parts = self._rows_at_a_time(shape), []
        for first in range(0, shape[0], step):
            last = min(first + step, shape[0])
            some = self._some(buffers, shape, first, last) if self._in_rows(shape) else buffers
            encoded = Encoded((last - first, shape[1]), some, exponent, noise_power=0.0, power=0.0)
            parts.append(decoded.rounded(rotate(self.decode(encoded)) * 2.0**-exponent))
        scales, codes = (torch.cat([part[i] for part in parts]) for i in range(2))
        return {"scales": scales, "codes": codes}

    def _rows_at_a_time(self, shape: Shape) -> int:
        """That `to_memory` decodes together: all of them where they have no fixed size."""
        return min(shape[0], max(1, BLOCK_WEIGHTS // shape[1])) if self._in_rows(shape) else shape[0]

    def _in_rows(self, shape: Shape) -> bool:
        """Whether rows are of a fixed size."""
        return all(part.row_bytes for part in self.layout(shape).values())

    def _some(
        self, buffers: Mapping[str, torch.Tensor], shape: Shape, first: int, last: int
    ) -> Mapping[str, torch.Tensor]:
        """Buffers of rows, of those of a matrix whose rows are of a fixed size."""
        flat = {key: data.contiguous().reshape(-1).view(torch.uint8).numpy() for key, data in buffers.items()}
        layout = self.layout(shape)
        return {
            key: torch.from_numpy(data).view(buffers[key].dtype).reshape(-1, *layout[key].shape[1:])
            for key, data in self.rows(flat, shape, first, last).items()
        }

    def rows(
        self, buffers: Mapping[str, npt.NDArray[np.uint8]], shape: Shape, first: int, last: int
    ) -> Mapping[str, npt.NDArray[np.uint8]]:
        """The bytes of rows `[first, last)`, which are those of whole parts, of the bytes of some buffers."""
        layout = self.layout(shape)
        return {
            key: data[first * layout[key].row_bytes : last * layout[key].row_bytes] for key, data in buffers.items()
        }

    def memory_bytes(self, shape: Shape) -> int:
        """What a matrix takes in memory, as it is multiplied."""
        return layout_bytes(self.memory.layout(shape))

    def decoding_bytes(self, shape: Shape) -> int:
        """What a block of rows takes for a while, about, where `to_memory` decodes it for one product: twice its
        result, which is arranged for the kernels, and the rows on the way. Who takes more has to say so here."""
        return 2 * self.memory_bytes(shape) + DECODING_BYTES * self._rows_at_a_time(shape) * shape[1]

    def native_fields(self, width: int) -> Mapping[str, int] | None:
        """How the native library decodes parts of rows of `width` into `memory`: fields of its `wf_chunk`, beside the
        `scales` if there are any, or its `stages`. None: it cannot, and `to_memory` does."""
        return None

    def native_stages(self) -> Stages | None:
        """Where streams are those of the last of several stages, whose sum is decoded."""
        return None

    def parts(self, shape: Shape, weights: int) -> Parts:
        """How a matrix is cut into parts of about so many weights, unless the codec has parts of its own."""
        layout = self.layout(shape)
        key = max(layout, key=lambda key: layout[key].row_bytes)
        if not self._in_rows(shape):
            raise NotImplementedError(f"{self.name} has rows of no fixed size; define its `parts`")
        return Parts(key, 4 * max(1, weights // (4 * shape[1])), layout[key].row_bytes)


class MemoryForm(Codec):
    """A codec that kernels multiply from: weights are whole numbers times a step and scales of their groups.

    Its buffers are `scales` F16 `[rows, groups]` and `codes` U8, `row_bytes` for every row: W = number * step * scale *
    2^exponent in the rotated basis, but for the rounding of numbers to `precision`.
    """

    precision = 16  # bits that numbers and activations are multiplied with: 8 or 16, of which 12 are used

    @abstractmethod
    def row_bytes(self, width: int) -> int:
        """Bytes of codes per row of `width` weights."""

    @abstractmethod
    def decode_rotated(self, codes: torch.Tensor, scales: torch.Tensor, exponent: int, width: int) -> torch.Tensor:
        """Rows in the rotated basis, the form that multiplies rotated activations.

        Args:
            codes: uint8, `rows * row_bytes(width)` bytes, any shape (padding after them is ignored).
            scales: float16 `[rows, groups]`.

        Returns:
            float32 `[rows, width]`.
        """

    @abstractmethod
    def whole_numbers(self, codes: torch.Tensor, width: int) -> tuple[torch.Tensor, float]:
        """What kernels multiply, of codes uint8 `[rows, row_bytes]`: whole numbers `[rows, width]`, and their step."""

    @abstractmethod
    def new_table(self, library: Native, isa: int) -> tuple[float, int]:
        """The step of its whole numbers, and the address of a new table of the library's that gives them."""

    @abstractmethod
    def native_fields(self, width: int) -> Mapping[str, int]:
        """`word_indices`, `word_bytes` and `row_bytes` of the library's `wf_arrange`."""

    def in_registers(self, isa: str = "") -> bool:
        """Whether its tables fit vector registers, of every instruction set or of `isa` in particular."""
        return True

    @property
    def memory(self) -> MemoryForm:
        return self

    def to_memory(self, buffers: Mapping[str, torch.Tensor], shape: Shape, exponent: int) -> Mapping[str, torch.Tensor]:
        return buffers


class PointForm(MemoryForm):
    """Vectors of `p` weights, each one of the `n` points of a table."""

    p: int
    n: int

    @property
    @abstractmethod
    def array(self) -> npt.NDArray[np.float32]:
        """The points, `[n, p]`."""

    @property
    def direct(self) -> bool:
        """Whether a code is the number itself, plus n / 2: there are as many as `precision` has bits for, and nothing
        to be looked up."""
        return self.p == 1 and self.n == 1 << self.precision


class RowEncoder(Encoder):
    """Rows contribute a fixed number of bytes to each buffer."""

    def __init__(
        self, encode: Callable[[torch.Tensor], Encoded], layout: Mapping[str, BufferLayout], shape: Shape
    ) -> None:
        self._encode, self._layout, self._shape, self._row = encode, layout, shape, 0
        self.block_rows = max(1, BLOCK_WEIGHTS // shape[1])

    def add(self, rows: torch.Tensor) -> Iterator[Piece]:
        encoded = self._encode(rows)
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


def layout_bytes(layout: Mapping[str, BufferLayout]) -> int:
    """Bytes of all buffers."""
    return sum(map(buffer_bytes, layout.values()))


_FAMILIES: dict[str, Callable[[str], Codec]] = {}
_RATES: dict[str, Callable[[str], Rates | None]] = {}


def register_codec(
    family: str, factory: Callable[[str], Codec], rates: Callable[[str], Rates | None] | None = None
) -> None:
    """Register the codecs whose names are `family` or start with `family-`. `factory` gets the whole name.

    `rates` says which rates a name stands for that is not of one codec, as "trellis" is not; None: of one.
    """
    if family in _FAMILIES:
        raise ValueError(f"codec family {family!r} is registered already")
    _FAMILIES[family] = factory
    if rates is not None:
        _RATES[family] = rates


def rates_of(name: str) -> Rates | None:
    """The rates that a name stands for which is not that of one codec."""
    rates = _RATES.get(_family(name))
    return None if rates is None else rates(name)


@lru_cache(maxsize=1024)
def get_codec(name: str) -> Codec:
    """The codec of that name; a WaterfillError names the known families otherwise."""
    factory = _FAMILIES.get(_family(name))
    if factory is None:
        raise WaterfillError(
            f"codec {name!r} is unknown; known families are {', '.join(sorted(_FAMILIES))} "
            "(a newer waterfill, or a plug-in that registers it, may read this)"
        )
    return factory(name)


def _family(name: str) -> str:
    return name.split("-", 1)[0]
