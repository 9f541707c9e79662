"""Chunks in memory: each in its form, given up when memory is short, and the same ones taken back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from waterfill.running.streaming import StreamedMatrix
from waterfill.running.streaming.chunks import ChunkData
from waterfill.running.streaming.first_reading import read_first
from waterfill.running.streaming.kept import Kept
from waterfill.running.streaming.residency import Residency
from waterfill.running.streaming.storage import Region, Storage


class Piece:
    """As much of a chunk as keeping looks at."""

    def __init__(self, number: int) -> None:
        self.region, self.decoded_bytes = Region(Path("f"), 100 * number, 100), 260


@dataclass(frozen=True)
class Data:
    """As much of a chunk's bytes."""

    chunk: Any
    nbytes: int = 100
    copied: bool = False

    def copy(self) -> Data:
        return replace(self, copied=True)

    def arrange(self) -> Data:
        return replace(self, nbytes=260)


PIECES: list[Any] = [Piece(number) for number in range(6)]
CODED, DECODED = PIECES[:3], PIECES[3:5]


@pytest.fixture
def kept() -> Kept:
    made = Kept(Residency(tuple(CODED), tuple(DECODED), 1.0))
    for piece in [*CODED, *DECODED]:
        made.put(Data(piece))  # type: ignore[arg-type]
    return made


def in_memory(kept: Kept) -> list[int]:
    return [number for number, piece in enumerate(PIECES) if piece in kept]


def read(piece: Any) -> Any:
    return Data(piece)


def test_each_chunk_has_the_form_of_the_residency(kept: Kept) -> None:
    assert in_memory(kept) == [0, 1, 2, 3, 4]
    assert [kept.get(piece).nbytes for piece in PIECES[:5]] == [100, 100, 100, 260, 260]  # type: ignore[union-attr]
    assert kept.get(PIECES[5]) is None
    assert (len(kept), kept.nbytes) == (5, 820)


def test_only_lent_memory_is_copied() -> None:
    kept = Kept(Residency(tuple(CODED), (), 1.0))
    for piece, lent in zip(CODED, (True, False), strict=False):
        kept.put(Data(piece), lent=lent)  # type: ignore[arg-type]
        assert kept.get(piece).copied == lent  # type: ignore[union-attr]


@pytest.mark.parametrize(("size", "left"), [(0, 5), (1, 4), (260, 4), (261, 3), (520, 3), (521, 2), (10_000, 0)])
def test_as_many_are_given_up_as_it_takes(kept: Kept, size: int, left: int) -> None:
    assert kept.shed(size) == 5 - left
    assert in_memory(kept) == list(range(left))
    assert kept.shed(0) == 0


@pytest.mark.parametrize(
    ("room", "back"), [(0, 1), (99, 1), (100, 2), (200, 3), (459, 3), (460, 4), (719, 4), (720, 5)]
)
def test_they_come_back_as_far_as_they_fit(kept: Kept, room: int, back: int) -> None:
    kept.shed(620)
    assert in_memory(kept) == [0, 1]
    kept.shed(1)
    assert kept.take_back(room, read) == back - 1
    assert in_memory(kept) == list(range(back))
    assert kept.take_back(10_000, read) == 5 - back
    assert (kept.nbytes, kept.take_back(10_000, read)) == (820, 0)


def test_what_cannot_be_read_again_is_asked_for_the_next_time(kept: Kept) -> None:
    kept.shed(10_000)

    def fail(_: Any) -> Any:
        raise OSError("unplugged")

    with pytest.raises(OSError, match="unplugged"):
        kept.take_back(10_000, fail)
    assert kept.take_back(10_000, read) == 5


def test_kept_bytes_are_those_of_the_file(matrices: list[StreamedMatrix], storage: Storage) -> None:
    """Though all were read into the same memory."""
    chunks = [chunk for matrix in matrices for chunk in matrix.chunks]
    coded, decoded = chunks[0::3], chunks[1::3]
    kept = Kept(Residency(tuple(coded), tuple(decoded), 1.0))
    for data in read_first(storage, matrices, kept.residency.kept, verify=False):
        kept.put(data, lent=True)
    assert len(kept) == len(coded) + len(decoded) > 4
    for chunk in coded + decoded:
        data = kept.get(chunk)
        assert data is not None
        whole = np.frombuffer(storage.read(chunk.region), np.uint8)
        assert np.array_equal(data.rows(chunk.numbers), ChunkData(chunk, whole).rows(chunk.numbers))
