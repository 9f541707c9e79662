"""Bit fields of one width, one behind the other, in little-endian bit order."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def pack_fields(values: npt.NDArray[Any], bits: int) -> bytes:
    """Numbers below 2^bits to bytes; none for 0 bits."""
    if bits == 0:
        return b""
    places = np.arange(bits, dtype=np.uint16)
    return np.packbits(values.astype(np.uint16)[:, None] >> places & 1, bitorder="little").tobytes()


def unpack_fields(data: bytes | memoryview, count: int, bits: int) -> npt.NDArray[np.int64]:
    """The inverse: `count` numbers of `bits` bits, at least 1."""
    flat = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little", count=count * bits)
    return flat.reshape(count, bits).astype(np.int64) @ (1 << np.arange(bits, dtype=np.int64))
