"""Grids as integers: what the kernels look up and multiply.

A grid point becomes a whole number of steps, in 8 bits where that adds little to the grid's own error, else in 12 (the
activations go along). The step is the one that rounds the points best: four levels fit 127 steps almost exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from waterfill.base import native
from waterfill.codecs.contract import MemoryForm, PointForm, get_codec

LIMITS = {8: 127, 16: 2047}  # largest table entry and activation
EXACT_WORDS = 512  # products of 2047 x 2047 that surely fit a 32-bit sum
STEPS_TRIED = 512
MOST_STEP = 1.25  # times the least that reaches the outermost point


@dataclass(frozen=True, eq=False)
class IntegerGrid:
    """points ~ units * step."""

    units: npt.NDArray[np.int16]  # [n, p]
    step: float
    precision: int  # 8 or 16 bits, of table entries and activations


@lru_cache(maxsize=4096)
def integer_grid(codec: PointForm) -> IntegerGrid:
    """The integer form of a codec's points."""
    precision = codec.precision
    if codec.direct:
        return IntegerGrid(codec.array.astype(np.int16), 1.0, precision)
    points = codec.array.astype(np.float64)
    steps = float(np.abs(points).max()) / LIMITS[precision] * _stretches()
    if points.size > 1024:  # many points round equally well with any step
        steps = steps[:1]
    rounded = np.rint(points / steps[:, None, None])
    errors = np.square(rounded * steps[:, None, None] - points).sum((1, 2))
    best = int(errors.argmin())
    return IntegerGrid(rounded[best].astype(np.int16), float(steps[best]), precision)


def _stretches() -> npt.NDArray[np.float64]:
    """Even from 1 to MOST_STEP, each half counted from its own end."""
    each, i = (MOST_STEP - 1) / (STEPS_TRIED - 1), np.arange(STEPS_TRIED)
    return np.where(i < STEPS_TRIED // 2, 1 + each * i, MOST_STEP - each * (STEPS_TRIED - 1 - i))


def register_table(codec: PointForm, isa: str = "") -> bool:
    """Whether the table fits vector registers, of every instruction set or of `isa` in particular."""
    if codec.direct:
        return True
    if codec.precision == 16:
        return codec.p == 1 and codec.n <= 256
    return codec.n <= 256 and (codec.p <= 2 or (isa == "avx512vbmi" and codec.p == 4))


def native_table(codec: MemoryForm, isa: str) -> tuple[float, int]:
    """(step, address) of the library's table of a codec; kept for the life of the process."""
    return _native_table(codec.name, isa)


@lru_cache(maxsize=4096)
def _native_table(codec_name: str, isa: str) -> tuple[float, int]:
    library = native.library()
    assert library is not None
    return get_codec(codec_name).memory.new_table(library, library.isas[isa])


def new_point_table(codec: PointForm, library: native.Native, isa: int) -> tuple[float, int]:
    """(step, address) of a new table of points."""
    grid, points = integer_grid(codec), np.ascontiguousarray(codec.array)
    units = np.ascontiguousarray(grid.units)
    return grid.step, library.table_new(isa, precision=grid.precision, units=units, points=points)
