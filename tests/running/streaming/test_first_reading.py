"""The first reading: no more than is wanted, or everything and compared with its digests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from waterfill.base.errors import ArtifactError
from waterfill.running.streaming import Storage, StreamedMatrix
from waterfill.running.streaming.first_reading import read_first
from waterfill.running.streaming.storage import Region, Slot


class Noting(Storage):
    """Storage that notes what is read."""

    def __init__(self) -> None:
        super().__init__()
        self.regions: list[Region] = []

    def read_into(self, region: Region, slot: Slot) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        self.regions.append(region)
        return super().read_into(region, slot)  # type: ignore[return-value]


@pytest.fixture
def storage() -> Noting:
    return Noting()


@pytest.mark.parametrize("verify", [False, True])
def test_wanted_chunks_come_and_progress_ends_at_its_total(
    matrices: list[StreamedMatrix], storage: Noting, verify: bool
) -> None:
    chunks = [chunk for matrix in matrices for chunk in matrix.chunks]
    wanted, told = set(chunks[::4]), list[tuple[int, int]]()
    storage.regions.clear()
    for data in read_first(storage, matrices, wanted, verify=verify, progress=lambda *done: told.append(done)):
        start = data.chunk.region.offset_bytes
        assert data.data.tobytes() == data.chunk.region.file.read_bytes()[start : start + len(data.data)]
        wanted.remove(data.chunk)
    assert not wanted
    read = chunks if verify else chunks[::4]
    total = sum(chunk.region.size_bytes for chunk in read)
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    seen = [region for region in storage.regions if region in {chunk.region for chunk in chunks}]
    assert seen == [chunk.region for chunk in read]
    if verify:
        assert sum(region.size_bytes for region in storage.regions) == sum(m.buffer.size_bytes for m in matrices)
    storage.close()


def test_nothing_wanted_is_nothing_read(matrices: list[StreamedMatrix], storage: Noting) -> None:
    storage.regions.clear()
    assert list(read_first(storage, matrices, (), verify=False)) == []
    assert storage.regions == []
    storage.close()


def test_a_byte_that_differs_is_a_matrix_named(
    matrices: list[StreamedMatrix], storage: Noting, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = matrices[-1]
    whole, place = storage.read_at, last.offset_bytes + last.buffer.size_bytes - 1

    def spoilt(descriptor: int, memory: memoryview, offset: int) -> int:
        count = whole(descriptor, memory, offset)
        if offset <= place < offset + count:
            memory[place - offset] ^= 1
        return count

    monkeypatch.setattr(storage, "read_at", spoilt)
    firsts = {matrix.chunks[0] for matrix in matrices}
    reading = read_first(storage, matrices, firsts, verify=True)
    assert [next(reading).chunk.matrix for _ in firsts] == matrices, "up to the end of the last one"
    with pytest.raises(ArtifactError, match=rf"tensor '{last.name}' at byte {last.offset_bytes} does not match its"):
        next(reading)
    storage.close()


def test_files_are_named_that_cannot_be_read(matrices: list[StreamedMatrix], storage: Noting, tmp_path: Path) -> None:
    matrix = matrices[0]
    matrix.file = tmp_path / "absent"
    with pytest.raises(ArtifactError, match="absent: cannot read"):
        list(read_first(storage, [matrix], matrix.chunks, verify=False))
    storage.close()
