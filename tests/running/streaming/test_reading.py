"""Reading regions of files, reading ahead, and what is worth keeping in memory."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from waterfill.base import process
from waterfill.base.errors import ArtifactError, WaterfillError
from waterfill.running.streaming.ahead import ReadAhead
from waterfill.running.streaming.residency import Speeds, choose_residency
from waterfill.running.streaming.storage import BLOCK_BYTES, Region, Slot, Storage, make_slots, read_at

SIZE = 300_777


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reading") / "file"
    path.write_bytes(np.random.default_rng(0).integers(0, 256, SIZE, np.uint8).tobytes())
    return path


@pytest.fixture(params=[True, False], ids=["direct", "cached"])
def storage(request: pytest.FixtureRequest) -> Iterator[Storage]:
    opened = Storage(direct=request.param)
    yield opened
    opened.close()


@given(st.integers(0, SIZE - 1), st.integers(0, SIZE), st.booleans())
def test_any_region_is_read(file: Path, offset: int, size: int, direct: bool) -> None:
    size = min(size, SIZE - offset)
    storage = Storage(direct=direct, read_bytes=1 << 13)
    assert storage.read(Region(file, offset, size)) == file.read_bytes()[offset : offset + size]
    storage.close()


@given(data=st.data())
def test_short_reads_are_gone_on_with(file: Path, data: st.DataObject) -> None:
    def short(descriptor: int, memory: memoryview, offset: int) -> int:
        return read_at(descriptor, memory[: max(4096, data.draw(st.integers(1, len(memory))))], offset)

    storage = Storage(read_at=short)
    assert storage.read(Region(file, 12_345, 60_000)) == file.read_bytes()[12_345:72_345]
    storage.close()


def test_files_that_end_early_are_named(file: Path, storage: Storage) -> None:
    with pytest.raises(ArtifactError, match=rf"{file}: it ends 1000 bytes early, inside the 5000 bytes at byte"):
        storage.read(Region(file, SIZE - 4000, 5000))
    with pytest.raises(ArtifactError, match="ends 10 bytes early"):
        storage.read(Region(file, SIZE + 9000, 10))


def test_failing_reads_are_named(file: Path, storage: Storage) -> None:
    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    storage.read_at = fail
    with pytest.raises(ArtifactError, match=rf"{file}: cannot read 10 bytes at byte 5 \(Input/output error\); check"):
        storage.read(Region(file, 5, 10))
    with pytest.raises(ArtifactError, match="cannot read"):
        storage.read(Region(file.with_name("absent"), 0, 10))


def test_where_direct_reads_are_refused_ordinary_ones_do(file: Path) -> None:
    direct: list[int] = []

    def refuse(descriptor: int, memory: memoryview, offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0):
            direct.append(descriptor)
            raise OSError(errno.EINVAL, "refused")
        return read_at(descriptor, memory, offset)

    storage = Storage(read_at=refuse)
    for _ in range(2):
        assert storage.read(Region(file, 100, 5000)) == file.read_bytes()[100:5100]
    assert len(direct) <= 1, "it is not asked again"
    assert not storage.direct
    storage.close()


# ---------------------------------------------------------------------------------------------------------- read ahead


class Piece:
    """As much of a chunk as reading ahead looks at."""

    def __init__(self, file: Path, number: int, size: int = 12_000) -> None:
        self.region = Region(file, number * size, size)


@pytest.fixture
def pieces(file: Path) -> list[Any]:
    return [Piece(file, number) for number in range(20)]


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def ahead(request: pytest.FixtureRequest, pieces: list[Any]) -> Iterator[ReadAhead]:
    storage = Storage()
    opened = ReadAhead(storage, pieces, slots=4, slot_bytes=12_000, threads=request.param)
    yield opened
    opened.close()
    storage.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "waterfill-read"]


def expect(ahead: ReadAhead, piece: Any) -> None:
    data, slot = ahead.take(piece)
    region = piece.region
    assert data.data.tobytes() == region.file.read_bytes()[region.offset_bytes :][: region.size_bytes]
    ahead.give_back(slot)


def test_chunks_come_in_order_again_and_again(ahead: ReadAhead, pieces: list[Any]) -> None:
    for _ in range(3):
        for piece in pieces:
            expect(ahead, piece)


@given(order=st.lists(st.integers(0, 19), min_size=1, max_size=12))
def test_any_order_is_served(file: Path, order: list[int]) -> None:
    pieces: list[Any] = [Piece(file, number) for number in range(20)]
    storage = Storage()
    ahead = ReadAhead(storage, pieces, slots=3, slot_bytes=12_000, threads=2)
    for number in order:
        expect(ahead, pieces[number])
    ahead.set_sequence(pieces[::-2])
    for piece in pieces[::-2]:
        expect(ahead, piece)
    ahead.close()
    storage.close()


def test_the_ring_is_bounded(ahead: ReadAhead, pieces: list[Any]) -> None:
    for _ in range(200):
        if ahead.bytes_read >= 4 * 12_000:
            break
        time.sleep(0.01)
    time.sleep(0.05)
    assert ahead.bytes_read == 4 * 12_000, "four slots are full, and nobody takes"


def test_what_is_not_there_yet_need_not_be_waited_for(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[Any] = [Piece(file, number) for number in range(3)]
    storage, gate = Storage(), threading.Event()
    hold(monkeypatch, storage, gate)
    ahead = ReadAhead(storage, pieces, slots=2, slot_bytes=12_000)
    assert ahead.take(pieces[0], wait=False) is None
    gate.set()
    expect(ahead, pieces[0])
    found = None
    for _ in range(1000):
        if (found := ahead.take(pieces[1], wait=False)) is not None:
            break
        time.sleep(0.01)
    assert found is not None
    ahead.give_back(found[1])
    expect(ahead, pieces[2])
    ahead.close()
    storage.close()


def hold(monkeypatch: pytest.MonkeyPatch, storage: Storage, gate: threading.Event) -> None:
    """Reading waits at a gate."""
    read = storage.read_into

    def held(region: Region, slot: Slot) -> Any:
        gate.wait(10)
        return read(region, slot)

    monkeypatch.setattr(storage, "read_into", held)


def test_what_goes_wrong_is_raised_where_it_happened(
    ahead: ReadAhead, pieces: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, bad = ahead.storage.read_into, {pieces[7].region}

    def refuse(region: Region, slot: Slot) -> Any:
        if region in bad:
            raise ArtifactError("unreadable")
        return read(region, slot)

    monkeypatch.setattr(ahead.storage, "read_into", refuse)
    for _ in range(2):
        for piece in pieces[:7]:
            expect(ahead, piece)
        with pytest.raises(ArtifactError, match="unreadable"):
            ahead.take(pieces[7])
    bad.clear()
    for piece in pieces:
        expect(ahead, piece)


def test_closing_wakes_whoever_waits(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    piece: Any = Piece(file, 0)
    storage = Storage()
    hold(monkeypatch, storage, gate)
    ahead = ReadAhead(storage, [piece], slots=2, slot_bytes=12_000)
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            ahead.take(piece)
        except WaterfillError as error:
            errors.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    closing = threading.Thread(target=ahead.close)
    closing.start()
    waiting.join(5)
    assert not waiting.is_alive()
    assert "closed" in str(errors[0])
    gate.set()
    closing.join(5)
    assert not closing.is_alive()
    storage.close()


def test_slots_hold_any_region_of_their_size() -> None:
    for size in (0, 1, 4095, 4096, 4097, 100_000):
        assert Slot(size).nbytes >= size + 4095 - 4095 * (size % 4096 == 0)


@pytest.mark.parametrize("size", [1, 4096, 100_000, 2_088_960, 2_100_000])
def test_slots_side_by_side_begin_on_blocks_and_keep_apart(size: int) -> None:
    slots = make_slots(3, size)
    for number, slot in enumerate(slots):
        assert slot.nbytes == Slot(size).nbytes
        assert slot.bytes.ctypes.data % BLOCK_BYTES == 0
        slot.bytes[:] = number
    assert [set(np.unique(slot.bytes).tolist()) for slot in slots] == [{0}, {1}, {2}]


# ----------------------------------------------------------------------------------------------- what is kept in memory


class KeptChunk:
    """As much of a chunk as the choice looks at: 3 bits per weight."""

    region, weights, decoded_bytes = Region(Path("f"), 0, 375_000), 1_000_000, 1_000_000


def some_chunks(count: int) -> list[Any]:
    return [KeptChunk() for _ in range(count)]


SLOW_STORAGE = Speeds(0.2e9, 3e9, 30e9)
SLOW_DECODER = Speeds(20e9, 1e9, 30e9)


def test_slow_storage_keeps_codes_and_a_slow_decoder_levels() -> None:
    chunks = some_chunks(100)
    budget = 12_000_000
    stored, decoded = choose_residency(chunks, budget, SLOW_STORAGE), choose_residency(chunks, budget, SLOW_DECODER)
    assert (len(stored.coded), len(stored.decoded)) == (32, 0)
    assert (len(decoded.coded), len(decoded.decoded)) == (0, 12)
    assert stored.expected_s == pytest.approx(68 * 375_000 / 0.2e9)
    assert decoded.expected_s == pytest.approx(88e6 / 1e9 + 100e6 / 30e9)


@given(st.integers(0, 60_000_000), st.floats(0.05e9, 5e9), st.floats(0.1e9, 10e9))
def test_the_budget_is_kept_and_more_of_it_is_never_slower(budget: int, read: float, decode: float) -> None:
    chunks, speeds = some_chunks(40), Speeds(read, decode, 20e9)
    found = choose_residency(chunks, budget, speeds)
    used = sum(c.region.size_bytes for c in found.coded) + sum(c.decoded_bytes for c in found.decoded)
    assert used <= budget
    assert not set(found.coded) & set(found.decoded)
    assert found.expected_s <= 1.02 * choose_residency(chunks, 0, speeds).expected_s
    assert choose_residency(chunks, 2 * budget, speeds).expected_s <= 1.03 * found.expected_s
    everything = choose_residency(chunks, 40_000_000, speeds)
    assert everything.expected_s <= 1.03 * 40e6 / 20e9 or everything.expected_s <= 1.02 * found.expected_s


def test_what_is_kept_is_spread_over_the_pass() -> None:
    chunks = some_chunks(90)
    kept = choose_residency(chunks, 30 * 375_000, SLOW_STORAGE).kept
    places = [place for place, one in enumerate(chunks) if one in kept]
    assert len(places) == 30
    assert max(np.diff([-1, *places, 90])) <= 4


# -------------------------------------------------------------------------------------------------- memory that is free


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_tightest_limit_counts(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    assert process.free_bytes(proc, groups) == float("inf")
    write(proc / "meminfo", "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    assert process.free_bytes(proc, groups) == 8000 * 1024
    write(proc / "self/cgroup", "0::/a/b\n")
    write(groups / "a/b/memory.max", "max\n")
    write(groups / "a/b/memory.current", "1000\n")
    write(groups / "a/b/memory.stat", "inactive_file 0\n")
    write(groups / "a/memory.max", "5000000\n")
    write(groups / "a/memory.current", "2000000\n")
    write(groups / "a/memory.stat", "anon 1\ninactive_file 500000\n")
    assert process.free_bytes(proc, groups) == 3_500_000, "of version 2, an outer group's; files' pages can go"
    write(proc / "self/cgroup", "4:cpu:/\n7:memory:/job\n")
    write(groups / "memory/job/memory.limit_in_bytes", "3000000")
    write(groups / "memory/job/memory.usage_in_bytes", "2900000")
    write(groups / "memory/job/memory.stat", "total_inactive_file 400000\n")
    assert process.free_bytes(proc, groups) == 500_000, "of version 1"
    write(groups / "memory/job/memory.limit_in_bytes", str(2**63 - 4096))
    assert process.free_bytes(proc, groups) == 8000 * 1024, "no limit"


def test_this_process_has_memory() -> None:
    assert 0 < process.resident_bytes() <= process.peak_bytes() + (1 << 20)
    assert process.free_bytes() > 0
    process.release()
