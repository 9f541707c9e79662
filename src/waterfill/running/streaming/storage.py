"""Reading regions of files as fast as storage gives them, and without filling the page cache.

Direct reads where the file system takes them: whole blocks, into memory that begins on one, in huge pages if possible.
Where it refuses, ordinary ones, after which the kernel is told to forget the pages.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from waterfill.base.errors import ArtifactError

BLOCK_BYTES = 4096  # offsets, sizes and addresses of direct reads are multiples of it
READ_BYTES = 1 << 20  # of one call, unless something else is measured to be faster
HUGE_BYTES = 2 << 20  # of a huge page

ReadAt = Callable[[int, memoryview, int], int]  # descriptor, memory, offset -> bytes that were read

_log = logging.getLogger("waterfill.streaming")


class Region(NamedTuple):
    """Bytes of a file."""

    file: Path
    offset_bytes: int
    size_bytes: int


class Slot:
    """Memory for one region of up to `size_bytes`, with room for the blocks that it begins and ends in: `memory`, which
    begins on a page, or else its own."""

    def __init__(self, size_bytes: int, memory: memoryview | None = None) -> None:
        self.memory = memoryview(mmap.mmap(-1, slot_bytes(size_bytes))) if memory is None else memory
        self.bytes = np.frombuffer(self.memory, np.uint8)

    @property
    def nbytes(self) -> int:
        return len(self.bytes)


def slot_bytes(size_bytes: int) -> int:
    return _round_up(size_bytes) + BLOCK_BYTES


def make_slots(count: int, size_bytes: int) -> list[Slot]:
    """Slots side by side, in huge pages where the system has them.

    A direct read into scattered pages of 4 KiB has a piece for each, and a disk's queue has room for few such reads:
    for a single one in a virtual machine's.
    """
    each = slot_bytes(size_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        mapping = mmap.mmap(-1, _round_up(count * each, HUGE_BYTES) + HUGE_BYTES, flags)
        start = -np.frombuffer(mapping, np.uint8).ctypes.data % HUGE_BYTES
        mapping.madvise(mmap.MADV_DONTFORK)  # a child's copies would be written to while disks write to ours
        with contextlib.suppress(OSError):  # a kernel without them
            mapping.madvise(mmap.MADV_HUGEPAGE)
    else:
        mapping, start = mmap.mmap(-1, count * each), 0
    memory = memoryview(mapping)[start:]
    return [Slot(size_bytes, memory[i * each : (i + 1) * each]) for i in range(count)]


def read_at(descriptor: int, memory: memoryview, offset: int) -> int:
    """The system's positioned read: how many bytes it put into memory.

    Raises:
        OSError: it cannot be read.
    """
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [memory], offset)
    data = os.pread(descriptor, len(memory), offset)
    memory[: len(data)] = data
    return len(data)


class Storage:
    """Open files, read by any number of threads at a time.

    Args:
        direct: past the page cache, where the file system takes that.
        read_bytes: of one call.
        read_at: the call; another one stands for a disk that fails.
    """

    def __init__(self, *, direct: bool = True, read_bytes: int = READ_BYTES, read_at: ReadAt = read_at) -> None:
        self.direct = direct and hasattr(os, "O_DIRECT")
        self.read_bytes, self.read_at = read_bytes, read_at
        self._files: dict[tuple[Path, bool], int] = {}

    def read(self, region: Region) -> bytes:
        """A small region, as bytes of its own."""
        return bytes(self.read_into(region, Slot(region.size_bytes)))

    def read_into(self, region: Region, slot: Slot) -> npt.NDArray[np.uint8]:
        """The region, as a view of the slot's memory.

        Raises:
            ArtifactError: the file ends early or cannot be read; names file and offset.
        """
        start = region.offset_bytes // BLOCK_BYTES * BLOCK_BYTES
        lead = region.offset_bytes - start
        want = lead + region.size_bytes
        try:
            got = self._fill(region.file, start, slot, want)
        except OSError as error:
            raise ArtifactError(
                f"{region.file}: cannot read {region.size_bytes} bytes at byte {region.offset_bytes} "
                f"({error.strerror or error}); check the disk, or fetch the artifact again"
            ) from error
        if got < want:
            raise ArtifactError(
                f"{region.file}: it ends {min(want - got, region.size_bytes)} bytes early, inside the "
                f"{region.size_bytes} bytes at byte {region.offset_bytes}; fetch the artifact again, or pack again"
            )
        return slot.bytes[lead:want]

    def _fill(self, file: Path, start: int, slot: Slot, want: int) -> int:
        if self.direct:
            try:
                return self._read(self._open(file, direct=True), start, slot, _round_up(want), want)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOTTY):
                    raise
                self.direct = False
                _log.info("%s: its file system refuses direct reads; reading through the page cache", file)
        descriptor = self._open(file, direct=False)
        got = self._read(descriptor, start, slot, want, want)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, start, want, os.POSIX_FADV_DONTNEED)
        return got

    def _read(self, descriptor: int, start: int, slot: Slot, size: int, want: int) -> int:
        """Reads until `want` bytes are there or the file ends; a short read in the middle of a file is gone on with."""
        memory, at = slot.memory, 0
        while at < want:
            begin = at - at % BLOCK_BYTES
            got = self.read_at(descriptor, memory[begin : min(begin + self.read_bytes, size)], start + begin)
            if begin + got <= at:
                break
            at = begin + got
        return at

    def _open(self, file: Path, *, direct: bool) -> int:
        descriptor = self._files.get((file, direct))
        if descriptor is None:
            flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | (getattr(os, "O_DIRECT", 0) if direct else 0)
            descriptor = self._files.setdefault((file, direct), os.open(file, flags | getattr(os, "O_BINARY", 0)))
        return descriptor

    def close(self) -> None:
        """Close all files; nothing may be reading from them."""
        while self._files:
            os.close(self._files.popitem()[1])


def _round_up(size_bytes: int, unit: int = BLOCK_BYTES) -> int:
    return -(-size_bytes // unit) * unit
