"""One stream: rows of a matrix as entropy-coded levels, self-contained (docs/format.md).

    8 bytes     flags, symbols - 1, symbol of j = 0, bits of a scale code; unit (F32)
    scales      bit fields, one per row and group: 0 for a group of zeros, else unit * 2^((code - 1) / 8), as F16
    table       of the symbols: a parameter (4 bytes), or 12-bit frequencies; then, where flagged, I8 levels
    raw bits    the low bits of every j, where rates are so high that they are noise
    symbols     rANS: states of the lanes, words

`native/src/bitstream.cpp` reads the same.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from waterfill.codecs.entropy import (
    PRECISION_BITS,
    DamagedError,
    code_length_bits,
    encode,
    from_counts,
    gaussian,
    gaussian_parameter,
    lanes_for,
    rans,
)
from waterfill.codecs.entropy.fields import pack_fields, unpack_fields
from waterfill.codecs.hadamard import groups
from waterfill.codecs.trellis.code import indices, levels, offset

STREAM_WEIGHTS = 1 << 18
MOST_SYMBOLS = 256
HEADER = struct.Struct("<BBBBf")
HEADER_BYTES = HEADER.size
WITH_TABLE, WITH_LEVELS = 1, 2
MOST_SCALE_BITS = 8
MOST_LEVEL_SYMBOLS = 16  # beyond, levels are as good as centroids
MOST_RAW_BITS = 6
RAW_SPACING = 0.16  # standard deviations: levels nearer than this have low bits that are noise
BOUNDS = {False: (-32, 31), True: (-512, 511)}  # of j, by whether levels are wide

# 2^(k/8) as float32, written out: a power function may differ in its last bit.
_EIGHTHS = np.array(
    [1.0, 1.09050773, 1.18920712, 1.29683955, 1.41421356, 1.54221083, 1.68179283, 1.83400809], np.float32
)

Floats = npt.NDArray[np.float32]


def stream_rows(width: int) -> int:
    """Rows of every stream but the last: about 2^18 weights, and a multiple of four rows."""
    return 4 * max(1, STREAM_WEIGHTS // (4 * width))


def bounds(states: int, wide: bool) -> tuple[int, int]:
    """Least and largest j. With one state levels are symmetric, and -128 has no counterpart."""
    least, most = BOUNDS[wide]
    return (least if states > 1 else -most), most


def padded(weights: int) -> int:
    """Symbols of a stream: a multiple of its lanes."""
    lanes = lanes_for(weights)
    return -(-weights // lanes) * lanes


def scale_values(codes: npt.NDArray[Any], unit: float) -> npt.NDArray[np.float16]:
    """Scale codes -> scales."""
    octave, eighth = np.divmod(np.maximum(codes.astype(np.int64), 1) - 1, 8)
    scale = np.float32(unit) * _EIGHTHS[eighth] * np.ldexp(np.float32(1), octave).astype(np.float32)
    with np.errstate(over="ignore"):
        return np.where(codes > 0, scale, np.float32(0)).astype(np.float16)


class CodedLevels(NamedTuple):
    """A stream but for its unit and scales, which follow from it."""

    flags: int
    symbols: int
    center: int
    tables: bytes
    payload: bytes  # raw bits, states and words
    values: npt.NDArray[np.float64]  # of every symbol that was coded, what the decoder multiplies with the scale


def code(
    x: Floats, path: npt.NDArray[np.int16], states: int, wide: bool, spacing: float, *, as_levels: bool = False
) -> CodedLevels:
    """Code levels that were found for x.

    Args:
        x: the targets, `[count]`, any unit.
        path: levels, `[count]`; a multiple of the lanes.
        spacing: distance of levels 4j + 1 and 4 (j + 1) + 1 in standard deviations; how many bits of wide levels are
            left raw depends on it.
        as_levels: levels stand for themselves, whatever their centroids are: what came after them relies on it.
    """
    count, lanes = len(path), lanes_for(len(path))
    j = indices(path, states)
    raw_bits = 0
    while wide and spacing * 2**raw_bits < RAW_SPACING / 2 and raw_bits < MOST_RAW_BITS:
        raw_bits += 1
    low, high = min(int(j.min()) >> raw_bits, 0), max(int(j.max()) >> raw_bits, 0)
    while high - low + 1 > MOST_SYMBOLS:
        raw_bits += 1
        low, high = low >> 1, high >> 1
    symbols, center = high - low + 1, -low
    coded = ((j >> raw_bits) + center).astype(np.uint8)
    counts = np.bincount(coded, minlength=symbols).astype(np.int64)

    values, with_levels = path.astype(np.float64), b""
    if symbols <= MOST_LEVEL_SYMBOLS and not wide and not as_levels:
        mean, sign = centroids(x, path, coded, symbols, states)
        table = np.rint(mean * (127 / max(float(np.abs(mean).max()), 1e-30))).astype(np.int8)
        better = sign * table.astype(np.float64)[coded]
        # In bits, what the distortion that it saves would cost.
        if count * (_log_distortion(x, values) - _log_distortion(x, better)) / (2 * np.log(2)) > 8 * symbols:
            with_levels, values = table.tobytes(), better

    parameter = gaussian_parameter(float(np.mean((4.0 * (coded.astype(np.float64) - center) + offset(states)) ** 2)))
    frequencies = from_counts(counts)
    explicit = pack_fields(frequencies[:symbols].astype(np.int64) & 4095, PRECISION_BITS)
    try:
        ideal = gaussian(parameter, symbols, center, offset(states))
        with_table = code_length_bits(counts, frequencies) + 8 * len(explicit) < code_length_bits(counts, ideal) + 32
    except ValueError:  # nothing like a Gaussian
        with_table = True
    tables = explicit if with_table else struct.pack("<I", parameter)
    raw = pack_fields(j & ((1 << raw_bits) - 1), raw_bits)
    return CodedLevels(
        flags=WITH_TABLE * with_table | WITH_LEVELS * bool(with_levels) | raw_bits << 4,
        symbols=symbols,
        center=center,
        tables=tables + with_levels,
        payload=raw + encode(coded, lanes, frequencies if with_table else ideal),
        values=values,
    )


def write(coded: CodedLevels, unit: float, scale_codes: npt.NDArray[Any], scale_bits: int) -> bytes:
    """The stream's bytes."""
    head = HEADER.pack(coded.flags, coded.symbols - 1, coded.center, scale_bits, unit)
    return head + pack_fields(scale_codes.reshape(-1), scale_bits) + coded.tables + coded.payload


def read(
    data: bytes | memoryview, rows: int, width: int, states: int, wide: bool
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float16]]:
    """A stream's levels `[rows, width]` and scales `[rows, groups]`: the reference that native decoding must equal.

    Raises:
        DamagedError: it is no stream of such rows.
    """
    source = _ByteReader(memoryview(data))
    flags, symbols, center, scale_bits, unit = HEADER.unpack(source.take(HEADER_BYTES))
    symbols, raw_bits = symbols + 1, flags >> 4
    with_table, with_levels = bool(flags & WITH_TABLE), bool(flags & WITH_LEVELS)
    least, most = bounds(states, wide)
    sound = (
        not flags & 12
        and scale_bits <= MOST_SCALE_BITS
        and center < symbols
        and 0 <= unit < 65504
        and raw_bits <= (MOST_RAW_BITS if wide else 0)
        and not (with_levels and (symbols > MOST_LEVEL_SYMBOLS or wide))
        and center << raw_bits <= -least
        and ((symbols - center) << raw_bits) - 1 <= most
    )
    if not sound:
        raise DamagedError("the head of a stream is damaged")
    parts = len(groups(width))
    packed_scales = source.take(-(-rows * parts * scale_bits // 8))
    codes = unpack_fields(packed_scales, rows * parts, scale_bits) if scale_bits else np.ones(rows * parts, np.int64)
    scales = scale_values(codes, unit).reshape(rows, parts)
    if not np.isfinite(scales).all():
        raise DamagedError("a scale is infinite")
    if with_table:
        frequencies = np.zeros(256, np.uint16)
        frequencies[:symbols] = unpack_fields(source.take(-(-symbols * 12 // 8)), symbols, PRECISION_BITS)
        if symbols == 1:
            frequencies[0] = 1 << PRECISION_BITS
    else:
        (parameter,) = struct.unpack("<I", source.take(4))
        try:
            frequencies = gaussian(parameter, symbols, center, offset(states))
        except ValueError as error:
            raise DamagedError("the table of a stream is damaged") from error
    table = np.frombuffer(source.take(symbols), np.int8) if with_levels else None
    if table is not None and table.min() < -127:
        raise DamagedError("a level has no counterpart of the other sign")
    count, lanes = padded(rows * width), lanes_for(rows * width)
    low = unpack_fields(source.take(-(-count * raw_bits // 8)), count, raw_bits) if raw_bits else 0
    coded = rans.decode_reference(source.rest(), lanes, frequencies, count)
    j = ((coded.astype(np.int64) - center) << raw_bits) + low
    values = levels(j, states, lanes)
    if table is not None:
        sign = np.where(values & 2, -1, 1) if states > 1 else 1
        values = sign * table.astype(np.int64)[coded]
    return values[: rows * width].reshape(rows, width), scales


class _ByteReader:
    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 0

    def take(self, count: int) -> memoryview:
        if len(self._data) - self._at < count:
            raise DamagedError("a stream ends early")
        self._at += count
        return self._data[self._at - count : self._at]

    def rest(self) -> memoryview:
        return self.take(len(self._data) - self._at)


def centroids(
    x: Floats, path: npt.NDArray[np.int16], coded: npt.NDArray[Any], symbols: int, states: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """(mean of the x that got each symbol, both unions counted together; sign of each level's union)."""
    sign = np.where(path & 2, -1.0, 1.0) if states > 1 else np.ones(len(path))
    count = np.bincount(coded, minlength=symbols)
    return np.bincount(coded, sign * x, minlength=symbols) / np.maximum(count, 1), sign


def _log_distortion(x: Floats, values: npt.NDArray[np.float64]) -> float:
    """Log of the distortion that the best multiple of `values` leaves, as a share of the power of x."""
    inner, power, own = float(x @ values), float(values @ values), float(x.astype(np.float64) @ x)
    return float(np.log(max(1 - inner * inner / (power * own), 1e-12))) if power and own else 0.0
