"""Interleaved rANS (Duda, arXiv 1311.2540): symbols to bytes and back, by the native library or by the reference here.

Symbol i belongs to lane i mod lanes. Each lane is a coder with a state x in [2^16, 2^32); all share one sequence of
16-bit words. A lane's state before its last symbol was coded is 2^16, which is what a decoder has to end with.

    bytes: the states, 4 bytes each, then the words, all little-endian
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from waterfill.base import native
from waterfill.codecs.entropy.tables import PRECISION_BITS, TOTAL, Frequencies, alias_slots

LEAST_STATE = 1 << 16
MOST_LANES = 32
LANE_SYMBOLS = 4096  # a lane costs two bytes: streams of fewer symbols have fewer lanes

Symbols = npt.NDArray[np.uint8]


class DamagedError(ValueError):
    """Bytes that no encoder wrote."""


def lanes_for(symbols: int) -> int:
    """Lanes of a stream of so many symbols: a power of two up to 32."""
    lanes = MOST_LANES
    while lanes > 1 and symbols < lanes * LANE_SYMBOLS:
        lanes //= 2
    return lanes


def encode(symbols: Symbols, lanes: int, frequencies: Frequencies) -> bytes:
    """Symbols, a multiple of `lanes`, to bytes.

    Raises:
        ValueError: one of them has no frequency.
    """
    library = native.library()
    symbols = np.ascontiguousarray(symbols)
    if library is None:
        return _encode(symbols, lanes, frequencies)
    out = np.empty(4 * lanes + 2 * len(symbols), np.uint8)
    size = library.rans_encode(symbols, out, lanes=lanes, frequencies=frequencies)
    if size is None:
        raise ValueError("a symbol has no frequency, or the table does not sum to 4096")
    return out[:size].tobytes()


def decode(data: bytes | memoryview, lanes: int, frequencies: Frequencies, count: int) -> Symbols:
    """`count` symbols, a multiple of `lanes`.

    Raises:
        DamagedError: `data` is not exactly what they were encoded to.
    """
    isa = native.isa()
    if isa is None:
        return decode_reference(data, lanes, frequencies, count)
    library = native.library()
    assert library is not None
    source, out = np.frombuffer(data, np.uint8), np.empty(count, np.uint8)
    if not library.rans_decode(library.isas[isa], source, out, lanes=lanes, frequencies=frequencies):
        raise DamagedError("the coded symbols are damaged")
    return out


def _encode(symbols: Symbols, lanes: int, frequencies: Frequencies) -> bytes:
    """All lanes of a step at once, from the last step to the first."""
    symbol, number = alias_slots(frequencies.tolist())
    freq = frequencies.astype(np.int64)
    start = np.concatenate([[0], np.cumsum(freq)[:-1]])
    slot_of = np.empty(TOTAL, np.int64)
    slot_of[start[symbol] + number] = np.arange(TOTAL)
    if not freq[symbols].all():
        raise ValueError("a symbol has no frequency")
    x = np.full(lanes, LEAST_STATE, np.int64)
    words: list[npt.NDArray[np.int64]] = []
    for step in symbols.reshape(-1, lanes)[::-1]:
        f = freq[step]
        full = x >= f << (32 - PRECISION_BITS)
        words.append(x[full][::-1] & 0xFFFF)  # a decoder reads a step's words in the order of its lanes
        x = np.where(full, x >> 16, x)
        x = (x // f << PRECISION_BITS) + slot_of[start[step] + x % f]
    tail = np.concatenate([*words, np.empty(0, np.int64)])[::-1]
    return x.astype("<u4").tobytes() + tail.astype("<u2").tobytes()


def decode_reference(data: bytes | memoryview, lanes: int, frequencies: Frequencies, count: int) -> Symbols:
    """`decode` in numpy: the definition that the native decoders are tested against."""
    if int(frequencies.astype(np.int64).sum()) != TOTAL or len(data) < 4 * lanes or (len(data) - 4 * lanes) % 2:
        raise DamagedError("the table or the length of the coded symbols is damaged")
    symbol, number = alias_slots(frequencies.tolist())
    freq = frequencies.astype(np.int64)
    x = np.frombuffer(data, "<u4", lanes).astype(np.int64)
    words = np.frombuffer(data, "<u2", offset=4 * lanes).astype(np.int64)
    if (x < LEAST_STATE).any():
        raise DamagedError("a state is damaged")
    out, at = np.empty((count // lanes, lanes), np.uint8), 0
    for step in out:
        slot = x & (TOTAL - 1)
        step[:] = symbol[slot]
        x = freq[symbol[slot]] * (x >> PRECISION_BITS) + number[slot]
        low = x < LEAST_STATE
        taken = int(low.sum())
        if at + taken > len(words):
            raise DamagedError("the coded symbols end early")
        x[low] = x[low] << 16 | words[at : at + taken]
        at += taken
    if at != len(words) or (x != LEAST_STATE).any():
        raise DamagedError("the coded symbols do not end where they should")
    return out.reshape(-1)
