"""Blocks of rows that a packed matrix is read and decoded by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Parts:
    """How a matrix is cut into blocks of rows that are read and decoded one by one.

    The buffer `key` is cut, and all others, which are small, stay in memory. Where rows have no fixed number of bytes,
    the buffer begins with the end of every part, counted from the buffer's first byte: 4 bytes each, little-endian.
    """

    key: str
    rows: int  # of each part but the last; a multiple of 4
    row_bytes: int  # in the buffer; 0: no fixed number

    def index_bytes(self, rows: int) -> int:
        """Bytes that the ends of the parts of so many rows take at the beginning of the buffer."""
        return 0 if self.row_bytes else 4 * -(-rows // self.rows)

    def bounds(self, rows: int, index: bytes) -> npt.NDArray[np.int64]:
        """Where in the buffer each part of so many rows begins, and the last one ends, given the first `index_bytes` of
        it. Of a damaged index anything: fewer bounds, in any order, beyond the buffer."""
        if self.row_bytes:
            return np.minimum(np.arange(-(-rows // self.rows) + 1) * self.rows, rows) * self.row_bytes
        return np.concatenate([[self.index_bytes(rows)], np.frombuffer(index, "<u4").astype(np.int64)])

    def alone(self, ends: npt.NDArray[np.uint32], data: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Consecutive parts as the whole buffer of a smaller matrix, given their bytes and where each ends in them."""
        if self.row_bytes:
            return data.copy()
        return np.concatenate([(ends + 4 * len(ends)).astype("<u4").view(np.uint8), data])
