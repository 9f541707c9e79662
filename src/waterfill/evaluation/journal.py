"""Scores on disk, window by window, so that an interrupted evaluation continues where it was.

One file per evaluation, whose name says what was evaluated on what. A record is a header, the scores as float64, and a
checksum; what a kill has cut off is dropped at the next start.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_HEADER = struct.Struct("<IIII")  # window, columns, targets, CRC-32 of the scores


class Journal:
    """Scores of windows, float64 [columns, targets]; `columns` is what is expected of each."""

    def __init__(self, path: Path, columns: int) -> None:
        self.path, self._columns = path, columns

    def read(self) -> Iterator[tuple[int, Tensor]]:
        """(window, scores) of every whole record; a damaged one and all after it are removed from the file."""
        if not self.path.exists():
            return
        data, at = self.path.read_bytes(), 0
        while at + _HEADER.size <= len(data):
            window, columns, targets, checksum = _HEADER.unpack_from(data, at)
            end = at + _HEADER.size + 8 * columns * targets
            payload = data[at + _HEADER.size : end]
            if columns != self._columns or end > len(data) or zlib.crc32(payload) != checksum:
                break
            yield window, torch.from_numpy(np.frombuffer(payload, np.float64).reshape(columns, targets).copy())
            at = end
        if at < len(data):
            os.truncate(self.path, at)

    def add(self, window: int, scores: Tensor) -> None:
        """Append the scores of a window."""
        payload = scores.contiguous().numpy().tobytes()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(_HEADER.pack(window, *scores.shape, zlib.crc32(payload)) + payload)

    def remove(self) -> None:
        """Forget everything."""
        self.path.unlink(missing_ok=True)
