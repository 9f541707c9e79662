"""How long a token takes a plan's matrices: measured seconds per weight of each codec's products, and bytes to be read.

    in memory    products from what is loaded
    streamed     of each matrix the longer of reading, and of decoding (or arranging) and multiplying

A streamed matrix is read while others are decoded and multiplied. Where the two even out over the few chunks that are
read ahead, a token takes the longer of all reading and all work; never more than the sum of what takes longer in each
matrix. That sum adds up over matrices, which an allocation needs, and is what is promised. Weights that are kept in
memory save time; attention, norms and what else is no product come on top, and so does what narrow rows cost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from waterfill.base.errors import WaterfillError
from waterfill.base.typed import Magnitude, Positive
from waterfill.codecs import Rates, Shape, buffer_bytes, get_codec
from waterfill.files.artifact.format import is_packed
from waterfill.planning.inventory import PlannedMatrix
from waterfill.planning.loss import Coefficients, Floats

# Rates that are timed where a code has any, besides its least and most.
NODES = (1.0, 1.25, 2.0, 3.0, 4.0, 4.5, 5.0, 6.0, 7.0)
FINE_STEP = 1 / 16  # of rates: those of a code with larger ones are timed one by one
LOOKED_UP_WEIGHTS = 1 << 18  # of a part, which a row is read with where weights are streamed
UNITS_PER_S = 10**12  # times are whole numbers when they are allotted, as bytes are


@dataclass(frozen=True)
class CodecSpeed:
    """Seconds per weight of products with one vector, by all threads."""

    resident: Magnitude  # from the form in memory
    streamed: Magnitude  # from what was just read: checked, decoded or arranged, and multiplied


@dataclass(frozen=True, eq=False)
class Speeds:
    """Of codecs on one machine."""

    machine: str
    isa: str
    threads: Positive
    codecs: Mapping[str, CodecSpeed]

    def of(self, name: str) -> CodecSpeed:
        """Of a codec: its own, or what lies between those of its code at the rates next to it.

        Raises:
            WaterfillError: neither was measured.
        """
        if name in self.codecs:
            return self.codecs[name]
        codec = get_codec(name)
        nodes = self._nodes.get((codec.rates, codec.memory.name), ()) if codec.rates else ()
        if not nodes:
            raise WaterfillError(f"the speed of {name} on {self.machine} is not known; measure it, or leave it out")
        rates, *speeds = zip(*nodes, strict=True)
        return CodecSpeed(*(float(np.interp(codec.rate, rates, each)) for each in speeds))

    @cached_property
    def _nodes(self) -> dict[tuple[Rates | None, str], list[tuple[float, float, float]]]:
        """Rates that were measured and how fast they are in memory and streamed, by code and form in memory."""
        found: dict[tuple[Rates | None, str], list[tuple[float, float, float]]] = {}
        for name, speed in self.codecs.items():
            codec = get_codec(name)
            node = (codec.rate, speed.resident, speed.streamed)
            found.setdefault((codec.rates, codec.memory.name), []).append(node)
        return {code: sorted(nodes) for code, nodes in found.items()}


def timed_codecs(names: Iterable[str]) -> tuple[str, ...]:
    """What has to be timed to know how fast all of these are: of continuous rates a few. What is not packed is not."""
    timed: dict[str, None] = {}
    for name in filter(is_packed, names):
        rates = get_codec(name).rates
        timed |= dict.fromkeys([name] if rates is None or rates.step > FINE_STEP else _ends_and_nodes(rates))
    return tuple(timed)


@lru_cache(maxsize=64)
def _ends_and_nodes(rates: Rates) -> tuple[str, ...]:
    return tuple(rates.codec(rate).name for rate in sorted({rates.least, *NODES, rates.most}))


@dataclass(frozen=True)
class Speed:
    """Tokens per second that a plan's products allow, and what that holds for: this machine and instruction set."""

    tokens_per_second: Magnitude
    reading_s: Magnitude  # of a token; 0 in memory
    working_s: Magnitude  # of a token: decoding and products
    storage_bytes_per_s: Magnitude | None  # None: all weights are in memory
    machine: str
    isa: str
    threads: Positive


@dataclass(frozen=True, eq=False)
class Timing:
    """What a token takes on one machine, of one model."""

    speeds: Speeds
    storage_bytes_per_s: float | None = None  # that weights are streamed at; None: they are in memory
    tied_head: bool = False  # whether the largest embedding is multiplied as well

    def uses(self, matrices: Sequence[PlannedMatrix], coefficients: Mapping[str, Coefficients]) -> Floats:
        """How many products with each matrix a token takes as much time as, float64 `[matrices]`: of what is looked up
        the part that is read and decoded, or the row in memory; of experts and towers as many as the probe's tokens
        took, one where they were not counted."""
        tokens = [coefficients[matrix.name].tokens for matrix in matrices]
        all_tokens = max((t or 0 for m, t in zip(matrices, tokens, strict=True) if m.role == "linear"), default=0)
        tables = [matrix for matrix in matrices if matrix.role == "embedding"]
        head = max(tables, key=lambda table: table.shape[0]).name if tables and self.tied_head else None
        looked_up = 0 if self.storage_bytes_per_s is None else LOOKED_UP_WEIGHTS
        uses = [_products(m, t, all_tokens) for m, t in zip(matrices, tokens, strict=True)]
        for i, table in enumerate(matrices):
            if table.role == "embedding":
                part = min(1.0, max(looked_up, table.shape[1]) / math.prod(table.shape))
                uses[i] = part + (table.name == head)
        return np.array(uses, np.float64)

    def seconds(self, codec: str, shape: Shape) -> tuple[float, float]:
        """Of one product: reading, and work.

        Raises:
            WaterfillError: what is not packed is not streamed, and its products are not timed.
        """
        return _seconds(self, codec, shape)

    def units(self, codecs: Sequence[str], shape: Shape) -> Floats:
        """Time that a product takes by each codec, as it is promised: float64 `[codecs]`, of UNITS_PER_S."""
        return np.array([max(self.seconds(codec, shape)) for codec in codecs]) * UNITS_PER_S

    def claim(self, codecs: Sequence[str], shapes: Sequence[Shape], uses: Floats) -> Speed | None:
        """What a plan promises that gives these codecs to matrices of these shapes; None where some are not packed, or
        nothing is multiplied."""
        if not all(map(is_packed, codecs)):
            return None
        each = np.array([self.seconds(codec, shape) for codec, shape in zip(codecs, shapes, strict=True)])
        each *= uses[:, None]
        whole_s = math.fsum(each.max(1))
        if not whole_s:
            return None
        speeds = self.speeds
        reading_s, working_s = (math.fsum(column) for column in each.T)
        where = (self.storage_bytes_per_s, speeds.machine, speeds.isa, speeds.threads)
        return Speed(1 / whole_s, reading_s, working_s, *where)


def _products(matrix: PlannedMatrix, tokens: int | None, all_tokens: int) -> float:
    if matrix.role == "head" or tokens is None or not all_tokens:
        return 1.0
    return min(1.0, tokens / all_tokens)


@lru_cache(maxsize=1 << 16)  # matrices of a model have few shapes
def _seconds(timing: Timing, name: str, shape: Shape) -> tuple[float, float]:
    if not is_packed(name):
        raise WaterfillError(f"{name} cannot be planned for speed: its products are not timed; leave it out")
    speed, weights = timing.speeds.of(name), math.prod(shape)
    if timing.storage_bytes_per_s is None:
        return 0.0, speed.resident * weights
    return _read_bytes(name, shape) / timing.storage_bytes_per_s, speed.streamed * weights


def _read_bytes(name: str, shape: Shape) -> int:
    """Of a streamed matrix, for one product: all but what is small, which stays in memory."""
    codec = get_codec(name)
    return buffer_bytes(codec.layout(shape)[codec.parts(shape, math.prod(shape)).key])
