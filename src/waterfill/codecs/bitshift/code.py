"""The bitshift trellis: what a weight becomes is computed from the last bits of its row (QTIP, arXiv 2406.11235, §3).

Every step shifts a weight's symbols into registers, whose 12 bits, the first register's lowest, are a window s:

    u = s * multiplier mod 2^16, from -1 to 1           level = u * (a + b u^8 + c u^16)

Neighbours share all but a few bits of their windows, so that the best path through a row, which the Viterbi algorithm
finds, comes near to what vectors of many weights would reach. Numbers of 16 bits do: there is nothing to be looked up.

Windows that may follow one another differ by small multiples of the multiplier, so that their u are spread evenly if it
is chosen well; and the polynomial makes of even u what a Gaussian's quantiles are, tails included.

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
POWERS = (1, 9, 17)  # of u, in a level
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
    2.5: (Register(2, 5), Register(1, 2, 2)),
    3.0: (Register(2, 4), Register(1, 4)),
    3.5: (Register(2, 3), Register(1, 4), Register(1, 2, 2)),
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
    multiplier: int
    coefficients: tuple[int, int, int]  # in fractions of 32768, and levels of 256
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
        u = place(np.arange(STATES), self.multiplier)
        u4 = _product(_product(u, u), _product(u, u))
        u8 = _product(u4, u4)
        a, b, c = self.coefficients
        return (_product(u, a + _product(u8, b + _product(u8, c))) >> 8).astype(np.int8)

    @cached_property
    def trellises(self) -> tuple[Trellis, ...]:
        """How steps go, of each kind."""
        return tuple(self._trellis(kind) for kind in range(self.period))

    def _trellis(self, kind: int) -> Trellis:
        kept, known = np.zeros(STATES, np.int64), np.zeros(STATES, np.int64)
        for register, part in zip(self.registers, self.parts(np.arange(STATES)), strict=True):
            shifted = kind % register.every == 0
            left = register.width - (register.bits if shifted else 0)
            kept = kept << left | (part & ((1 << left) - 1))  # of what comes before: all but the oldest symbol
            known = known << left | (part >> (register.width - left))  # of what comes after: all but the newest
        ways = STATES // len(np.unique(kept))
        before, after = (np.argsort(key, kind="stable").astype(np.uint16).reshape(-1, ways) for key in (kept, known))
        return Trellis(before, after)

    def parts(self, windows: npt.NDArray[np.integer]) -> list[npt.NDArray[np.int64]]:
        """Each register of windows."""
        parts, rest = [], windows.astype(np.int64)
        for register in self.registers:
            parts.append(rest & ((1 << register.width) - 1))
            rest = rest >> register.width
        return parts


def place(windows: npt.NDArray[np.integer], multiplier: int) -> npt.NDArray[np.int64]:
    """u of windows, in fractions of 32768; never -1, as the multiplier is odd."""
    u: npt.NDArray[np.int64] = (windows.astype(np.int64) * multiplier + 32768) % 65536 - 32768
    return u


def _product(u: npt.NDArray[np.int64], v: npt.NDArray[np.int64] | int) -> npt.NDArray[np.int64]:
    """Of fractions of 32768, rounded."""
    return u * v + 16384 >> 15


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

    multiplier: str  # hexadecimal
    coefficients: tuple[int, int, int]
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
    a, b, c = stored["coefficients"]
    return Code(rate, int(stored["multiplier"], 16), (a, b, c), stored["step"], stored["t2"])
