"""What is read when it is asked for: the same numbers wherever they come from, and a cache that keeps its bounds."""

from __future__ import annotations

import numpy as np
import pytest

from waterfill.base.errors import ArtifactError
from waterfill.running.streaming import Storage, StreamedMatrix
from waterfill.running.streaming.first_reading import read_first
from waterfill.running.streaming.kept import Kept
from waterfill.running.streaming.meter import Meter
from waterfill.running.streaming.on_demand import OnDemand
from waterfill.running.streaming.residency import Residency

NOTHING = Residency((), (), 1.0)


def on_demand(storage: Storage, cache_bytes: int = 0, residency: Residency = NOTHING) -> tuple[OnDemand, Meter]:
    meter = Meter()
    return OnDemand(storage, Kept(residency), cache_bytes=cache_bytes, meter=meter), meter


@pytest.mark.parametrize("form", ["nothing", "coded", "decoded"])
def test_rows_are_the_same_whatever_is_kept(matrices: list[StreamedMatrix], storage: Storage, form: str) -> None:
    for matrix in matrices:
        chunks = matrix.chunks
        kept = Kept(Residency(chunks * (form == "coded"), chunks * (form == "decoded"), 1.0))
        for data in read_first(storage, [matrix], kept.residency.kept, verify=False):
            kept.put(data, lent=True)
        meter = Meter()
        reader = OnDemand(storage, kept, cache_bytes=0, meter=meter)
        whole = matrix.whole(verify=True).rows(np.arange(matrix.shape[0]))
        ids = np.array([matrix.shape[0] - 1, 0, 5, 0, matrix.shape[0] // 2])
        assert np.array_equal(reader.rows(matrix, ids), whole[ids])
        assert np.array_equal(reader.dense(matrix), whole)
        assert (meter.direct_bytes == 0) == (form != "nothing")
        assert reader.rows(matrix, ids[:0]).shape == (0, matrix.shape[1])


def test_rows_that_there_are_not_are_refused(matrices: list[StreamedMatrix], storage: Storage) -> None:
    reader, _ = on_demand(storage)
    rows = matrices[0].shape[0]
    for wrong in (-1, rows):
        with pytest.raises(IndexError, match=f"outside a matrix of {rows} rows"):
            reader.rows(matrices[0], np.array([0, wrong]))


def test_only_the_parts_that_rows_lie_in_are_read(matrices: list[StreamedMatrix], storage: Storage) -> None:
    matrix = max(matrices, key=lambda matrix: len(matrix.sums))
    reader, meter = on_demand(storage)
    rows = [0, 1, matrix.shape[0] - 1]
    reader.rows(matrix, np.array(rows))
    assert meter.direct_bytes == sum(part.region.size_bytes for part in {matrix.part(row) for row in rows})
    assert meter.direct_bytes < matrix.coded_bytes or len(matrix.sums) == 1  # a whole stream of the trellis
    assert meter.waiting_s > 0
    assert len(reader) == 0, "parts do not stay"


def test_the_chunks_used_last_stay(matrices: list[StreamedMatrix], storage: Storage) -> None:
    chunks = [chunk for matrix in matrices for chunk in matrix.chunks][:6]
    sizes = [chunk.region.size_bytes for chunk in chunks]
    reader, meter = on_demand(storage, cache_bytes=sum(sizes[:3]))
    for chunk in (*chunks[:3], chunks[0]):
        reader.chunk(chunk)
    assert meter.direct_bytes == sum(sizes[:3]), "the fourth was there"
    assert reader.nbytes == sum(sizes[:3])
    reader.chunk(chunks[3])
    assert chunks[3] in reader
    assert chunks[0] in reader
    assert chunks[1] not in reader, "it was used longest ago"
    assert reader.nbytes <= sum(sizes[:3])
    assert 0 < reader.shed(1) < sum(sizes)
    reader.shed(1 << 40)
    assert (len(reader), reader.nbytes, reader.shed(1)) == (0, 0, 0)


def test_the_very_last_chunk_stays_whatever_it_takes(matrices: list[StreamedMatrix], storage: Storage) -> None:
    """A product may take it once without waiting, and then for good."""
    chunks = matrices[0].chunks
    reader, _ = on_demand(storage)
    for chunk in chunks:
        first = reader.chunk(chunk)
        assert reader.chunk(chunk) is first
        assert len(reader) == 1
    assert reader.nbytes == chunks[-1].region.size_bytes


def test_damage_is_found_and_nothing_damaged_stays(matrices: list[StreamedMatrix], storage: Storage) -> None:
    reader, meter = on_demand(storage, cache_bytes=1 << 20)
    matrix = matrices[0]
    reader.read(matrix.chunks[0])
    matrix.sums[0] ^= np.uint64(1)  # as if the file had changed since then
    with pytest.raises(ArtifactError, match=rf"{matrix.name}' is not what it was when it was first read"):
        reader.chunk(matrix.chunks[0])
    assert len(reader) == 0
    matrix.sums[0] ^= np.uint64(1)
    assert reader.chunk(matrix.chunks[0]).nbytes == matrix.chunks[0].region.size_bytes
    assert meter.direct_bytes == 2 * matrix.chunks[0].region.size_bytes
