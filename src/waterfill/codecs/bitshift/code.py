"""The bitshift trellis: what a weight becomes is computed from the last bits of its row (QTIP, arXiv 2406.11235, §3).

Every step shifts a weight's symbols into registers, whose 12 bits, the first register's lowest, are a window of three
times four bits s0, s1, s2:

    h = A[s0] ^ B[s1] ^ C[s2], a byte                   level = U[h / 16] + V[h mod 16]

Neighbours share all but a few bits of their windows, so that the best path through a row, which the Viterbi algorithm
finds, comes near to what vectors of many weights would reach. Five tables of 16 bytes do, which instructions that
shuffle bytes look up for many weights at once.

The newest symbols move the highest bits of h, so that windows that may follow one another are spread evenly over U, the
coarse part of levels; everything else about A, B and C is chance, improved here and there (make_codes.py).

A rate is the sum of its registers': `bits` each step, or every second one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt

from waterfill.base import native
from waterfill.base.errors import WaterfillError

FILE = Path(__file__).with_name("codes.json")
WINDOW = 12  # bits
STATES = 1 << WINDOW
SIDE_BY_SIDE = 16  # sequences that are searched together
NIBBLES = 3  # of a window
LEAST_LEVEL, MOST_LEVEL = -64, 63  # 7 bits
FINE = 24.0  # of cost, that a weight's error is about: whole numbers are exact enough, and a path's fit 16 bits
MOST_UNIT = 4000.0  # of cost, that an error of a standard deviation is
MOST_METRIC, MOST_COST = 0xFFFF, 16384  # of a path, where it ends to count; of a step
LOWER = 32  # steps after which the least metric is made 0 again

Windows = npt.NDArray[np.uint16]
Floats = npt.NDArray[np.float32]


class Register(NamedTuple):
    """Of a window: the last `symbols` of `bits` each, of which a new one comes `every` so many steps."""

    bits: int
    symbols: int
    every: int = 1

    @property
    def width(self) -> int:
        """Bits of the window."""
        return self.bits * self.symbols


REGISTERS: Mapping[float, tuple[Register, ...]] = {
    1.0: (Register(1, 12),),
    1.5: (Register(1, 8), Register(1, 4, 2)),
    2.0: (Register(2, 6),),
    2.5: (Register(2, 4), Register(1, 4, 2)),
    3.0: (Register(2, 4), Register(1, 4)),
    3.5: (Register(2, 2), Register(1, 4), Register(1, 4, 2)),
    4.0: (Register(4, 3),),
    4.5: (Register(4, 2), Register(1, 4, 2)),
    5.0: (Register(4, 2), Register(1, 4)),
}


RATES = ", ".join(f"{rate:g}" for rate in REGISTERS)  # as a sentence has them


class Trellis(NamedTuple):
    """Steps of one kind: states are in groups that all follow each of as many others, `[groups, ways]`."""

    before: Windows
    after: Windows


@dataclass(frozen=True, eq=False)
class Code:
    """One rate's code.

    t2: what it leaves of a long Gaussian sequence's power.
    step: standard deviations that a level of 1 stands for, where this is least.
    """

    rate: float
    hashes: npt.NDArray[np.uint8]  # A, B, C: [NIBBLES, 16]
    parts: npt.NDArray[np.int8]  # U, V: [2, 16]
    step: float
    t2: float

    @property
    def registers(self) -> tuple[Register, ...]:
        """The lowest first."""
        return REGISTERS[self.rate]

    @property
    def unit(self) -> float:
        """Of cost, that an error of one level is."""
        return float(np.float32(min(FINE * 4.0**self.rate, MOST_UNIT) * self.step**2))

    @property
    def period(self) -> int:
        """Steps until the next is of the first kind again."""
        return max(register.every for register in self.registers)

    @cached_property
    def levels(self) -> npt.NDArray[np.int8]:
        """The level of every window, `[STATES]`."""
        hashed = hash_of(self.hashes)
        levels: npt.NDArray[np.int8] = self.parts[0][hashed >> 4] + self.parts[1][hashed & 15]
        return levels

    @cached_property
    def trellises(self) -> tuple[Trellis, ...]:
        """How steps go, of each kind."""
        return tuple(self._trellis(kind) for kind in range(self.period))

    def _trellis(self, kind: int) -> Trellis:
        kept, known = np.zeros(STATES, np.int64), np.zeros(STATES, np.int64)
        for register, part in zip(self.registers, self.split(np.arange(STATES)), strict=True):
            shifted = kind % register.every == 0
            left = register.width - (register.bits if shifted else 0)
            kept = kept << left | (part & ((1 << left) - 1))  # of what comes before: all but the oldest symbol
            known = known << left | (part >> (register.width - left))  # of what comes after: all but the newest
        ways = STATES // len(np.unique(kept))
        before, after = (np.argsort(key, kind="stable").astype(np.uint16).reshape(-1, ways) for key in (kept, known))
        return Trellis(before, after)

    def split(self, windows: npt.NDArray[np.integer]) -> list[npt.NDArray[np.int64]]:
        """Each register of windows."""
        parts, rest = [], windows.astype(np.int64)
        for register in self.registers:
            parts.append(rest & ((1 << register.width) - 1))
            rest = rest >> register.width
        return parts


def hash_of(hashes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """h of every window, `[STATES]`, by tables `[NIBBLES, 16]`."""
    windows = np.arange(STATES)
    a, b, c = (table[windows >> 4 * i & 15] for i, table in enumerate(hashes))
    hashed: npt.NDArray[np.uint8] = a ^ b ^ c
    return hashed


def search(x: Floats, code: Code, start: Windows, *, first: int = 0) -> Windows:
    """The windows of the paths that come nearest to x, in units of levels, `[sequences, steps]`.

    Args:
        start: window before the first step, `[sequences]`.
        first: number of the first step, which says of what kind it is.
    """
    sequences, steps = x.shape
    blocks = -(-sequences // SIDE_BY_SIDE)
    side_by_side = np.zeros((blocks * SIDE_BY_SIDE, steps), np.float32)
    side_by_side[:sequences] = x
    begin = np.zeros(blocks * SIDE_BY_SIDE, np.uint16)
    begin[:sequences] = start
    targets = np.ascontiguousarray(side_by_side.reshape(blocks, SIDE_BY_SIDE, steps).swapaxes(1, 2))
    isa, library = native.isa(), native.library()
    if isa is None or library is None:
        found = np.stack(
            [
                search_reference(block, code, some, first=first)
                for block, some in zip(targets, begin.reshape(blocks, SIDE_BY_SIDE), strict=True)
            ]
        )
    else:
        trellises = [code.trellises[(first + kind) % code.period] for kind in range(code.period)]
        found = np.empty(targets.shape, np.uint16)
        library.bitshift_search(
            library.isas[isa],
            levels=code.levels,
            unit=code.unit,
            before=[trellis.before for trellis in trellises],
            after=[trellis.after for trellis in trellises],
            x=targets,
            start=begin,
            windows=found,
        )
    return found.swapaxes(1, 2).reshape(blocks * SIDE_BY_SIDE, steps)[:sequences]


def search_reference(x: Floats, code: Code, start: Windows, *, first: int = 0) -> Windows:
    """The Viterbi algorithm for sequences side by side, `[steps, sequences]` -> `[steps, sequences]`."""
    steps, lanes = x.shape
    lane = np.arange(lanes)
    metric = np.full((STATES, lanes), MOST_METRIC)
    metric[start, lane] = 0
    levels = code.levels.astype(np.float32)[:, None]
    choices = []
    for t, target in enumerate(x.astype(np.float32)):
        before, after = code.trellises[(first + t) % code.period]
        if t % LOWER == 0:
            metric -= metric.min(0)
        ways = metric[before]  # [groups, ways, lanes]
        choices.append(ways.argmin(1))
        error = target - levels
        cost = np.minimum(error * error * np.float32(code.unit) + np.float32(0.5), MOST_COST).astype(np.int64)
        metric = np.empty_like(metric)
        metric[after] = np.minimum(ways.min(1)[:, None] + cost[after], MOST_METRIC)
    out, now = np.empty((steps, lanes), np.uint16), metric.argmin(0)
    for t in range(steps - 1, -1, -1):
        out[t] = now
        before, after = code.trellises[(first + t) % code.period]
        group = np.empty(STATES, np.int64)
        group[after] = np.arange(len(after))[:, None]
        reached = group[now]
        now = before[reached, choices[t][reached, lane]]
    return out


class _Stored(TypedDict):
    """What the file has of a code."""

    hash: list[str]  # hexadecimal, the first entry first
    levels: list[list[int]]
    step: float
    t2: float


@lru_cache(maxsize=1)
def _stored() -> Mapping[str, _Stored]:
    stored: Mapping[str, _Stored] = json.loads(FILE.read_text("utf-8"))
    return stored


@lru_cache(maxsize=16)
def code_of(rate: float) -> Code:
    """The code of a rate.

    Raises:
        WaterfillError: there is none.
    """
    if rate not in REGISTERS:
        raise WaterfillError(f"there is no bitshift trellis of {rate:g} bits; there are {RATES}")
    stored = _stored()[f"{rate:g}"]
    hashes = np.array([list(bytes.fromhex(table)) for table in stored["hash"]], np.uint8)
    return Code(rate, hashes, np.array(stored["levels"], np.int8), stored["step"], stored["t2"])
