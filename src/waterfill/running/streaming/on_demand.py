"""What is read when it is asked for: rows of embeddings, experts that the router picked, whole matrices.

asked ──► kept? ──► cache, the chunks used last ──► storage
"""

from __future__ import annotations

import time
from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from waterfill.running.streaming.chunks import Chunk, ChunkData, StreamedMatrix
from waterfill.running.streaming.kept import Kept
from waterfill.running.streaming.meter import Meter
from waterfill.running.streaming.storage import Slot, Storage


class OnDemand:
    """Chunks that nobody reads ahead. For one thread at a time.

    Args:
        kept: what is in memory anyway.
        cache_bytes: what the chunks that were used last may take; the very last one stays whatever it takes.
        meter: told what is read, and how long that is waited for.

    Raises:
        ArtifactError: from every method: the file cannot be read or is not what it was.
    """

    def __init__(self, storage: Storage, kept: Kept, *, cache_bytes: int, meter: Meter) -> None:
        self._storage, self._kept, self._meter = storage, kept, meter
        self._cache_bytes = cache_bytes
        self._cache: OrderedDict[Chunk, ChunkData] = OrderedDict()
        self.nbytes = 0  # of the cache

    def __contains__(self, chunk: Chunk) -> bool:
        """Whether it is in the cache."""
        return chunk in self._cache

    def __len__(self) -> int:
        return len(self._cache)

    def read(self, chunk: Chunk) -> ChunkData:
        """From storage, into memory of its own, compared with what it was when it was first read."""
        start = time.perf_counter()
        data = self._storage.read_into(chunk.region, Slot(chunk.region.size_bytes))
        chunk.matrix.check(chunk, data)
        self._meter.waited(start)
        self._meter.direct_bytes += len(data)
        return ChunkData(chunk, data)

    def chunk(self, chunk: Chunk) -> ChunkData:
        """A chunk to be multiplied or looked into; it stays in the cache for the next time."""
        held = self._kept.get(chunk) or self._cache.get(chunk)
        if held is None:
            held = self._cache[chunk] = self.read(chunk)
            self.nbytes += held.nbytes
            while len(self._cache) > 1 and self.nbytes > self._cache_bytes:
                self._forget()
        elif chunk in self._cache:
            self._cache.move_to_end(chunk)
        return held

    def rows(self, matrix: StreamedMatrix, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Rows of W by number: `[count]` -> `[count, in]`; reads the parts that they lie in. IndexError outside."""
        wanted, place = np.unique(ids, return_inverse=True)
        if len(wanted) and not 0 <= wanted[0] <= wanted[-1] < matrix.shape[0]:
            raise IndexError(f"row {wanted[0]} or {wanted[-1]} is outside a matrix of {matrix.shape[0]} rows")
        rows = np.empty((len(wanted), matrix.shape[1]), np.float32)
        parts = wanted // matrix.part_rows
        for part in np.unique(parts).tolist():
            here = parts == part
            rows[here] = self._part(matrix, part * matrix.part_rows).rows(wanted[here])
        return rows[place]

    def dense(self, matrix: StreamedMatrix) -> npt.NDArray[np.float32]:
        """W itself, `[out, in]`."""
        return np.concatenate([self.chunk(chunk).rows(chunk.numbers) for chunk in matrix.chunks])

    def shed(self, size_bytes: int) -> int:
        """Forget chunks that take so much, or all of them; returns how many bytes that gave back."""
        freed = 0
        while freed < size_bytes and self._cache:
            freed += self._forget()
        return freed

    def _forget(self) -> int:
        """Drop the chunk that was used longest ago; how many bytes that gives back."""
        size: int = self._cache.popitem(last=False)[1].nbytes
        self.nbytes -= size
        return size

    def _part(self, matrix: StreamedMatrix, row: int) -> ChunkData:
        """The part that holds a row, from the chunk it lies in if that is kept."""
        part = matrix.part(row)
        for chunk in matrix.chunks:
            if chunk.first_part <= part.first_part < chunk.last_part:
                kept = self._kept.get(chunk)
                if kept is not None and kept.arranged:
                    return kept
                if kept is not None:
                    start = part.region.offset_bytes - chunk.region.offset_bytes
                    return ChunkData(part, kept.data[start : start + part.region.size_bytes])
        return self.read(part)
