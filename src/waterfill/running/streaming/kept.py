"""What stays in memory of the matrices that every pass multiplies, and yields when something else needs the memory.

read once ──put──► coded or decoded ──shed──► given up ──take_back──► as before
"""

from __future__ import annotations

from collections.abc import Callable

from waterfill.running.streaming.chunks import Chunk, ChunkData
from waterfill.running.streaming.residency import Residency


class Kept:
    """Chunks in memory, each in the form that a residency says. For one thread at a time.

    Those that are kept last are given up first, and taken back last.
    """

    def __init__(self, residency: Residency) -> None:
        self.residency = residency
        self._decoded = frozenset(residency.decoded)
        self._held: dict[Chunk, ChunkData] = {}
        self._given_up: list[Chunk] = []  # the last one first to come back

    def __contains__(self, chunk: Chunk) -> bool:
        return chunk in self._held

    def __len__(self) -> int:
        return len(self._held)

    def get(self, chunk: Chunk) -> ChunkData | None:
        """None for a chunk that is not in memory now."""
        return self._held.get(chunk)

    @property
    def whole(self) -> bool:
        """Whether nothing has been given up, or all of it is back."""
        return not self._given_up

    @property
    def nbytes(self) -> int:
        return sum(data.nbytes for data in self._held.values())

    def put(self, data: ChunkData, *, lent: bool = False) -> None:
        """Keep a chunk as it was read, or decoded. Memory that was `lent` is copied: it will be written again."""
        chunk = data.chunk
        self._held[chunk] = data.arrange() if chunk in self._decoded else data.copy() if lent else data

    def shed(self, size_bytes: int) -> int:
        """Give up chunks that take so much, or all of them; returns how many."""
        count = 0
        while size_bytes > 0 and self._held:
            chunk, data = self._held.popitem()
            size_bytes -= data.nbytes
            self._given_up.append(chunk)
            count += 1
        return count

    def take_back(self, size_bytes: int, read: Callable[[Chunk], ChunkData]) -> int:
        """Keep again what was given up, as far as it fits into so much; returns how many chunks came back."""
        count = 0
        while self._given_up:
            chunk = self._given_up[-1]
            size_bytes -= chunk.decoded_bytes if chunk in self._decoded else chunk.region.size_bytes
            if size_bytes < 0:
                break
            self.put(read(chunk))
            self._given_up.pop()
            count += 1
        return count
