"""Symbol frequencies of 12 bits: how probabilities are rounded, and the table that a Gaussian needs no header for.

Everything here is in integers or in a fixed order of float64 operations on counts, since encoder and decoder must agree
to the bit on every machine; `native/src/bitstream.cpp` repeats what a decoder needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

PRECISION_BITS = 12
TOTAL = 1 << PRECISION_BITS
MOST_SYMBOLS = 256

Frequencies = npt.NDArray[np.uint16]  # [256], sums to 4096
Counts = npt.NDArray[np.int64]  # [symbols]


def from_counts(counts: Counts) -> Frequencies:
    """Frequencies with the shortest code for these counts; a symbol that occurs gets at least 1.

    Raises:
        ValueError: there are more than 256 symbols, or none that occurs.
    """
    total = int(counts.sum())
    if len(counts) > MOST_SYMBOLS or total <= 0:
        raise ValueError(f"{len(counts)} symbols with a sum of counts of {total} have no table")
    used = np.flatnonzero(counts)
    weight = counts[used].astype(np.float64)
    frequencies = np.maximum(1, np.floor(weight * (TOTAL / total))).astype(np.int64)
    while True:  # the best change of each kind, until none is left to make
        missing = TOTAL - int(frequencies.sum())
        gain = weight * np.log2((frequencies + 1) / frequencies)
        loss = np.where(frequencies > 1, weight * np.log2(frequencies / np.maximum(frequencies - 1, 1)), np.inf)
        up, down = int(gain.argmax()), int(loss.argmin())
        if missing > 0:
            frequencies[up] += 1
        elif missing < 0:
            frequencies[down] -= 1
        elif gain[up] > loss[down]:
            frequencies[up] += 1
            frequencies[down] -= 1
        else:
            break
    table = np.zeros(MOST_SYMBOLS, np.uint16)
    table[used] = frequencies
    return table


def code_length_bits(counts: Counts, frequencies: Frequencies) -> float:
    """Bits that an ideal coder with this table takes for these counts; infinite where a symbol has no frequency."""
    used = counts > 0
    chosen = frequencies[: len(counts)][used].astype(np.float64)
    if not chosen.all():
        return math.inf
    return float((counts[used] * (PRECISION_BITS - np.log2(chosen))).sum())


@lru_cache(maxsize=1024)
def _gaussian(parameter: int, symbols: int, center: int, offset: int) -> tuple[int, ...]:
    def product(a: int, b: int) -> int:
        return a * b >> 32

    c2 = product(parameter, parameter)
    c4 = product(c2, c2)
    c8 = product(c4, c4)

    def power(n: int) -> int:
        value = 1 << 32
        for _ in range(n // 8):
            value = product(value, c8)
        for _ in range(n % 8):
            value = product(value, parameter)
        return value

    def weights(p: int, count: int) -> list[int]:
        value, ratio, c32, out = power(p * p), power(8 * p + 16), power(32), []
        for _ in range(count):  # (p + 4)^2 - p^2 = 8p + 16
            out.append(value)
            value, ratio = product(value, ratio), product(ratio, c32)
        return out

    weight = [*reversed(weights(4 - offset, center)), *weights(offset, symbols - center)]
    total = sum(weight)
    share = [1 + ((w * (TOTAL - symbols) + total // 2) // total if total else 0) for w in weight]
    largest = max(range(symbols), key=lambda s: share[s])
    share[largest] += TOTAL - sum(share)
    if share[largest] < 0:  # many symbols of nearly the same probability, all rounded up
        raise ValueError(f"{symbols} symbols have no table with parameter {parameter}")
    return tuple(share)


def gaussian(parameter: int, symbols: int, center: int, offset: int) -> Frequencies:
    """Frequencies of levels p = 4 (symbol - center) + offset whose probability is (parameter / 2^32)^(p^2).

    Raises:
        ValueError: it is so flat that rounding leaves the likeliest nothing, as in no code of a Gaussian.
    """
    table = np.zeros(MOST_SYMBOLS, np.uint16)
    table[:symbols] = _gaussian(parameter, symbols, center, offset)
    return table


def gaussian_parameter(mean_square: float) -> int:
    """The parameter of a Gaussian whose levels have that mean square: exp(-1 / (2 mean_square)) in 32-bit fractions."""
    return min(max(round(math.exp(-0.5 / max(mean_square, 1e-9)) * 2**32), 0), 2**32 - 1)


def alias_slots(frequencies: Sequence[int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The alias method's division of the 4096 slots: symbol of each slot, and its number among the symbol's slots.

    Buckets below the average are filled up, in order, from the first symbol that has more than its bucket holds.
    """
    bits = max(4, (max((s for s in range(len(frequencies)) if frequencies[s]), default=0)).bit_length())
    buckets, capacity = 1 << bits, TOTAL >> bits
    left = [int(frequencies[b]) for b in range(buckets)]
    own, alias = [capacity] * buckets, list(range(buckets))
    small = [b for b in range(buckets) if left[b] < capacity]
    large = [b for b in range(buckets) if left[b] >= capacity]
    following = 0
    for s in small:  # grows meanwhile
        a = large[following]
        own[s], alias[s] = left[s], a
        left[a] -= capacity - left[s]
        if left[a] < capacity:
            small.append(a)
            following += 1
    symbol, number, given = np.empty(TOTAL, np.int64), np.empty(TOTAL, np.int64), [0] * buckets
    for b in range(buckets):
        for s, start, stop in ((b, 0, own[b]), (alias[b], own[b], capacity)):
            symbol[b * capacity + start : b * capacity + stop] = s
            number[b * capacity + start : b * capacity + stop] = np.arange(given[s], given[s] + stop - start)
            given[s] += stop - start
    return symbol, number
