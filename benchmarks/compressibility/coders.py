"""Lossless coders of quantised weights, as installed: what they really make of bytes, decoded again and compared.

Two kinds: coders of bytes get what a format stores (packed codes); coders of symbols get one code per byte, since they
know nothing of fields. Sizes count tables, sizes of pieces and states. A coder that is not installed is left out.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import util

import numpy as np
import numpy.typing as npt

from waterfill.codecs.entropy import from_counts, lanes_for, rans

HUFF0_PIECE = 1 << 17  # the most that Huff0 codes at once
RANS_PIECE = 1 << 18
PIECE_BYTES = 4  # where a piece ends

Symbols = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Coder:
    """`size` is given packed bytes, or one symbol per byte, and returns coded bytes."""

    name: str
    packed: bool
    size: Callable[[Symbols], int]


@cache
def installed() -> Mapping[str, Coder]:
    """By name, in the order of columns."""
    found = []
    if util.find_spec("zipnn_core"):
        found.append(Coder("Huff0", False, huff0_bytes))
    found.append(Coder("rANS", False, rans_bytes))
    if util.find_spec("zstandard"):
        found += [Coder(f"zstd -{level}", True, lambda data, level=level: zstd_bytes(data, level)) for level in (1, 19)]
    if util.find_spec("lz4"):
        found.append(Coder("lz4", True, lz4_bytes))
    return {coder.name: coder for coder in found}


def rans_bytes(symbols: Symbols) -> int:
    """waterfill's rANS: one 12-bit table, streams of 2^18 symbols."""
    counts = np.bincount(symbols).astype(np.int64)
    table, size = from_counts(counts), -(-len(counts) * 12 // 8)
    for first in range(0, len(symbols), RANS_PIECE):
        piece = symbols[first : first + RANS_PIECE]
        lanes = lanes_for(len(piece))
        padded = np.concatenate([piece, np.full(-len(piece) % lanes, counts.argmax(), np.uint8)])
        coded = rans.encode(padded, lanes, table)
        check(rans.decode(coded, lanes, table, len(padded))[: len(piece)], piece, "rANS")
        size += len(coded) + PIECE_BYTES
    return size


class Huff0:
    """The Huffman coder inside zstd, as zipnn's extension module carries and exports it."""

    def __init__(self) -> None:
        spec = util.find_spec("zipnn_core")
        assert spec is not None
        self._library = ctypes.CDLL(str(spec.origin))
        size_t, pointer = ctypes.c_size_t, ctypes.c_void_p
        for function in (self._library.HUF_compress, self._library.HUF_decompress):
            function.restype, function.argtypes = size_t, [pointer, size_t, pointer, size_t]

    def compress(self, piece: Symbols) -> Symbols | None:
        """Up to 2^17 symbols; None where they are all the same or would not become shorter."""
        room = np.empty(2 * len(piece) + 1024, np.uint8)
        size = self._library.HUF_compress(room.ctypes.data, len(room), piece.ctypes.data, len(piece))
        return room[:size].copy() if 1 < size < len(piece) else None

    def decompress(self, coded: Symbols, out: Symbols) -> None:
        """Fills `out`."""
        if self._library.HUF_decompress(out.ctypes.data, len(out), coded.ctypes.data, len(coded)) != len(out):
            raise ValueError("Huff0 did not decompress")


def huff0_bytes(symbols: Symbols) -> int:
    coder, size = Huff0(), 0
    for first in range(0, len(symbols), HUFF0_PIECE):
        piece = np.ascontiguousarray(symbols[first : first + HUFF0_PIECE])
        coded = coder.compress(piece)
        if coded is None:
            size += PIECE_BYTES + (1 if (piece == piece[0]).all() else len(piece))
            continue
        out = np.empty_like(piece)
        coder.decompress(coded, out)
        check(out, piece, "Huff0")
        size += PIECE_BYTES + len(coded)
    return size


def zstd_bytes(data: Symbols, level: int) -> int:
    import zstandard

    coded = zstandard.ZstdCompressor(level=level).compress(data.tobytes())
    check(np.frombuffer(zstandard.ZstdDecompressor().decompress(coded), np.uint8), data, "zstd")
    return len(coded)


def lz4_bytes(data: Symbols) -> int:
    import lz4.frame

    coded = lz4.frame.compress(data.tobytes())
    check(np.frombuffer(lz4.frame.decompress(coded), np.uint8), data, "lz4")
    return len(coded)


def check(found: Symbols, expected: Symbols, who: str) -> None:
    if not np.array_equal(found, expected):
        raise ValueError(f"{who} gives back something else")


def entropy_bits(symbols: Symbols) -> float:
    """Of all symbols together, taken as independent, with their own frequencies."""
    counts = np.bincount(symbols)
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / len(symbols))).sum())
