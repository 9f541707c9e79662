"""Chunks read ahead of whoever multiplies them: threads that read, a bounded ring of memory, one consumer.

    sequence: chunk 0, 1, … n-1, 0, 1, …   ──threads──►  slots  ──take──►  consumer  ──give_back──►  slots

Reading goes around and around, from the end of one token into the beginning of the next. A consumer that asks for
another chunk than the next one (a layer left out, an answer broken off) makes the threads begin again from there. What
goes wrong while reading is raised by `take` of the chunk that it happened to.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from waterfill.base.errors import WaterfillError
from waterfill.running.streaming.chunks import Chunk, ChunkData, StreamedMatrix
from waterfill.running.streaming.storage import BLOCK_BYTES, Slot, Storage, make_slots

SLOTS = 8  # of the ring: one that is multiplied, four that are read, three in between


class _Read:
    """One chunk on its way: `data` or `error` when `slot` is filled."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self.data: npt.NDArray[np.uint8] | None = None
        self.error: BaseException | None = None

    @property
    def done(self) -> bool:
        return self.data is not None or self.error is not None


class ReadAhead:
    """The reading side of a streamed model. One thread at a time may consume.

    Args:
        sequence: what is read, around and around.
        slots: how many chunks the ring holds.
        slot_bytes: the largest chunk that any sequence will have.
        threads: how many read.
    """

    def __init__(
        self, storage: Storage, sequence: Sequence[Chunk], *, slots: int, slot_bytes: int, threads: int = 1
    ) -> None:
        self.storage = storage
        self._lock = threading.RLock()  # whoever holds it may be the one that collects the model, and closes this
        self._filled, self._emptied = threading.Condition(self._lock), threading.Condition(self._lock)
        self._sequence: tuple[Chunk, ...] = ()
        self._places: dict[Chunk, int] = {}
        self._free = make_slots(slots, slot_bytes)
        for slot in self._free:
            slot.bytes[::BLOCK_BYTES] = 0  # in memory from now on: a limit is looked at before the last is used
        self.nbytes = sum(slot.nbytes for slot in self._free)
        self._reads: dict[int, _Read] = {}  # by position
        self._next_read = self._next_take = self._epoch = 0
        self._closed = False
        self.bytes_read = 0
        self.reading_s = 0.0  # of all threads
        self.set_sequence(sequence)
        self._threads = [
            threading.Thread(target=_run, args=(self,), name="waterfill-read", daemon=True) for _ in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def set_sequence(self, sequence: Sequence[Chunk]) -> None:
        """Read these chunks from now on, beginning with the first."""
        with self._lock:
            self._restart(0)
            self._sequence = tuple(sequence)
            self._places = {chunk: place for place, chunk in enumerate(self._sequence)}

    def __contains__(self, chunk: Chunk) -> bool:
        return chunk in self._places

    def take(self, chunk: Chunk, *, wait: bool = True) -> tuple[ChunkData, Slot] | None:
        """The chunk's bytes, unchecked, as soon as they are there; without `wait` None if they are not. Hand the slot
        to `give_back` when done with them.

        Raises what reading raised: ArtifactError, mostly.
        """
        with self._lock:
            if self._closed:
                raise WaterfillError("this streamed model was closed; load it again")
            count = len(self._sequence)
            if self._sequence[self._next_take % count] is not chunk:
                self._restart(self._places[chunk])
            position = self._next_take
            while (read := self._reads.get(position)) is None or not read.done:
                if not wait:
                    return None
                self._filled.wait()
                if self._closed:
                    raise WaterfillError("this streamed model was closed while it was running; load it again")
            del self._reads[position]
            self._next_take += 1
            if read.error is not None:
                self._free.append(read.slot)
                self._restart(position % count)  # so that the same call may be tried again
                raise read.error
            assert read.data is not None
            return ChunkData(chunk, read.data, unchecked=True), read.slot

    def give_back(self, slot: Slot) -> None:
        """The slot's memory may be written again."""
        with self._lock:
            self._free.append(slot)
            self._emptied.notify()

    def close(self) -> None:
        """Stop the threads; returns when they have ended, unless it is one of them that calls."""
        with self._lock:
            self._closed = True
            self._filled.notify_all()
            self._emptied.notify_all()
        if threading.current_thread() not in self._threads:
            for thread in self._threads:
                thread.join()

    def _restart(self, place: int) -> None:
        """Forget what was read ahead, and read on from a place of the sequence."""
        self._epoch += 1
        self._free += [read.slot for read in self._reads.values() if read.done]
        self._reads = {}
        self._next_read = self._next_take = place
        self._emptied.notify_all()

    def read_one(self) -> bool:
        """What a reading thread does, again and again; False when it is to end."""
        with self._lock:
            while not self._closed and not (self._free and self._sequence):
                self._emptied.wait()
            if self._closed:
                return False
            position, epoch = self._next_read, self._epoch
            self._next_read += 1
            chunk = self._sequence[position % len(self._sequence)]
            read = self._reads[position] = _Read(self._free.pop())
        start = time.perf_counter()
        data, error = None, None
        try:
            data = self.storage.read_into(chunk.region, read.slot)
        except BaseException as raised:  # it is the consumer's
            error = raised
        elapsed = time.perf_counter() - start
        with self._lock:
            self.bytes_read += chunk.region.size_bytes
            self.reading_s += elapsed
            if epoch == self._epoch:
                read.data, read.error = data, error
                self._filled.notify()
            else:
                self._free.append(read.slot)
                self._emptied.notify()
        return True


def _run(ahead: ReadAhead) -> None:
    while ahead.read_one():
        pass


def ring_bytes(matrices: Iterable[StreamedMatrix], slots: int = SLOTS) -> int:
    """Of a ring of so many slots for chunks of these."""
    return slots * max(chunk.region.size_bytes for matrix in matrices for chunk in matrix.chunks)
