"""Bytes of an entropy-coded matrix: how many are promised, and how many are not of symbols."""

from __future__ import annotations

import math
from functools import lru_cache

from waterfill.codecs.contract import Shape
from waterfill.codecs.entropy import lanes_for
from waterfill.codecs.hadamard import groups
from waterfill.codecs.trellis import bitstream

TYPICAL_SCALE_BITS = 5
SHAPES = 1 << 12  # of matrices, whose thousands of streams are counted once


def stream_bytes(shape: Shape, rate: float) -> int:
    """Bytes of the buffer: an even number, not above the rate but for a stream's least size."""
    return max(int(rate * math.prod(shape) / 16 + 1e-6) * 2, least_bytes(shape))


@lru_cache(maxsize=SHAPES)
def least_bytes(shape: Shape) -> int:
    """A size that surely suffices: side information and a hundredth of a bit per weight."""
    count = streams(shape)
    bits = {rows: side_bits(rows, shape[1]) + 8 * 24 + 0.05 * rows * shape[1] for rows in set(count)}
    return 2 * math.ceil((sum(map(bits.__getitem__, count)) / 8 + 4 * len(count)) / 2)


@lru_cache(maxsize=SHAPES)
def side_bits_of(shape: Shape) -> int:
    """Bits of a matrix that are not symbols, typically, and of its index."""
    count = streams(shape)
    bits = {rows: side_bits(rows, shape[1]) for rows in set(count)}
    return sum(map(bits.__getitem__, count)) + 8 * 4 * len(count)


def side_bits(rows: int, width: int) -> int:
    """Bits of a stream that are not symbols, typically."""
    scales = TYPICAL_SCALE_BITS * rows * len(groups(width))
    return 8 * (bitstream.HEADER_BYTES + 4) + scales + 16 * lanes_for(rows * width)


def streams(shape: Shape) -> list[int]:
    """Rows of each stream."""
    rows, each = shape[0], bitstream.stream_rows(shape[1])
    return [min(each, rows - first) for first in range(0, rows, each)]
