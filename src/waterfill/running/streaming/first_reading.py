"""The first reading of a model's matrices: what is to be kept, or all of it, compared with its digests.

matrix ──chunk by chunk, and the bytes between them──► checksums of the parts, digest ──► chunks that are wanted
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import Any

from waterfill.base.errors import ArtifactError
from waterfill.base.progress import Step
from waterfill.files.artifact.format import hasher
from waterfill.running.streaming.chunks import Chunk, ChunkData, StreamedMatrix
from waterfill.running.streaming.storage import Region, Slot, Storage, make_slots

CHECKED_BYTES = 1 << 20  # read at a time between chunks


def read_first(
    storage: Storage,
    matrices: Sequence[StreamedMatrix],
    wanted: Container[Chunk],
    *,
    verify: bool,
    progress: Step | None = None,
) -> Iterator[ChunkData]:
    """Chunks that are wanted, one by one, as they were stored. Their memory is lent: the next one is read into it.

    Args:
        verify: read everything, and compare every matrix with its digest.
        progress: told how many bytes have been read, of how many.

    Raises:
        ArtifactError: a matrix is not what was packed, or cannot be read.
    """
    every = [chunk for matrix in matrices for chunk in matrix.chunks]
    total = sum(c.region.size_bytes for c in every if verify or c in wanted)
    (slot,) = make_slots(1, max(chunk.region.size_bytes for chunk in every))
    done = 0
    for matrix in matrices:
        read = _verified(storage, matrix, slot) if verify else _plain(storage, matrix, slot, wanted)
        for data in read:
            if data.chunk in wanted:
                yield data
            done += len(data.data)
            if progress is not None:
                progress(done, total)


def _plain(storage: Storage, matrix: StreamedMatrix, slot: Slot, wanted: Container[Chunk]) -> Iterator[ChunkData]:
    for chunk in matrix.chunks:
        if chunk in wanted:
            yield _read(storage, chunk, slot)


def _verified(storage: Storage, matrix: StreamedMatrix, slot: Slot) -> Iterator[ChunkData]:
    """All chunks of a matrix; then its digest is known."""
    digest, at = hasher(), 0
    for chunk in matrix.chunks:
        data = _read(storage, chunk, slot)
        start = chunk.region.offset_bytes - matrix.offset_bytes
        _hash(storage, matrix, digest, at, start)
        digest.update(data.data.data)
        at = start + len(data.data)
        yield data
    _hash(storage, matrix, digest, at, matrix.buffer.size_bytes)
    if digest.hexdigest() != matrix.buffer.digest:
        raise ArtifactError(
            f"{matrix.file}: tensor {matrix.name!r} at byte {matrix.offset_bytes} does not match its "
            "digest; fetch the artifact again, or pack again"
        )


def _read(storage: Storage, chunk: Chunk, slot: Slot) -> ChunkData:
    data = storage.read_into(chunk.region, slot)
    chunk.matrix.check(chunk, data)
    return ChunkData(chunk, data)


def _hash(storage: Storage, matrix: StreamedMatrix, digest: Any, start: int, stop: int) -> None:
    """Bytes of a buffer that belong to no chunk: the index, the padding."""
    for at in range(start, stop, CHECKED_BYTES):
        size = min(CHECKED_BYTES, stop - at)
        digest.update(storage.read(Region(matrix.file, matrix.offset_bytes + at, size)))
