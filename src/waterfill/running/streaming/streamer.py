"""The weights of a model that does not fit in memory: who holds what, and the one product that everything goes through.

    storage ──ReadAhead──► coded chunks ──┐
    kept chunks, coded or decoded ────────┴─► decoded and multiplied part by part, in the cache ──► y

There is no ring of decoded weights between decoder and product: a part is multiplied by the thread that decoded it,
while it is in its cache. Decoding ahead would cost memory and traffic, and fill only the little time in which the
model's own code runs.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from waterfill.base import native, process
from waterfill.base.errors import ArtifactError, WaterfillError
from waterfill.base.progress import Step
from waterfill.files.artifact.format import hasher
from waterfill.running.streaming.ahead import ReadAhead
from waterfill.running.streaming.calibration import calibrate
from waterfill.running.streaming.chunks import Chunk, ChunkData, StreamedMatrix
from waterfill.running.streaming.products import Held, Product, Products
from waterfill.running.streaming.residency import choose
from waterfill.running.streaming.storage import Region, Slot, Storage, make_slots
from waterfill.running.streaming.summary import Summary
from waterfill.running.streaming.view import Activations, View

SLOTS = 8  # of the ring: one that is multiplied, four that are read, three in between
CHECKED_BYTES = 1 << 20  # read at a time where digests are compared
ALONE_S = 1.0  # of reading alone
CACHE_SHARE = 0.9  # of what is left over, for experts


_log = logging.getLogger("waterfill.streaming")


class Streamer:
    """All streamed matrices of one model.

    Args:
        storage: where they are read from; closed with the streamer.
        sequence: those that every pass multiplies, in the order of execution.
        others: those that are read when they are asked for: rows of embeddings, experts.
        spare_bytes: memory for whatever is kept.
        limit_bytes: resident memory that the process is to stay below.
        verify: compare every matrix with its digest first.
        progress: told how many bytes have been read, of how many, while what is kept or verified is read.

    Raises:
        ArtifactError: a matrix is not what was packed.
    """

    def __init__(
        self,
        storage: Storage,
        sequence: Sequence[StreamedMatrix],
        others: Sequence[StreamedMatrix],
        *,
        spare_bytes: int,
        limit_bytes: int,
        verify: bool,
        progress: Step | None = None,
    ) -> None:
        self._storage, self._limit_bytes = storage, limit_bytes
        self._matrices = (*sequence, *others)
        self._order: list[StreamedMatrix] = list(sequence)
        self._seen: dict[StreamedMatrix, None] = {}  # in this pass, in order
        self._idle = self._warned = False
        self._lock = threading.RLock()  # passes are one at a time: they share the ring
        chunks = [chunk for matrix in sequence for chunk in matrix.chunks]
        self.speeds, self.threads = calibrate(storage, chunks or [c for m in others for c in m.chunks])
        # Experts come first: how often each is used is not known, but all of them cannot be read for every token.
        self._cache_bytes = int(CACHE_SHARE * spare_bytes) if _has_experts(others) else 0
        self.residency = choose(chunks, spare_bytes - self._cache_bytes, self.speeds)
        self._cache: OrderedDict[Chunk, ChunkData] = OrderedDict()
        self._cached_bytes = 0
        self._kept: dict[Chunk, ChunkData] = {}
        self._given_up: list[Chunk] = []  # that were kept once
        self._fill(verify, progress)
        self._waiting_s, self._nanoseconds, self._passes, self._direct_bytes = 0.0, np.zeros(2, np.int64), 0, 0
        self._started_s = self._ended_s = time.perf_counter()
        self._ahead: ReadAhead | None = None
        self._close = weakref.finalize(self, _close, None, storage)
        if self._streamed():
            self._follow()
        _log.info("%s", self.line)

    # ------------------------------------------------------------------------------------------- what is computed

    def __reduce__(self) -> NoReturn:
        raise WaterfillError("a streamed model cannot be copied or pickled; load its artifact once more instead")

    def product(self, matrix: StreamedMatrix, x: View, y: View) -> None:
        """Write x W^T: x `[tokens, in]`, y `[tokens, out]`. Raises ArtifactError for a chunk that is damaged."""
        self.products([matrix], x, [y])

    def products(self, matrices: Sequence[StreamedMatrix], x: View, ys: Sequence[View]) -> None:
        """`product` with each of several matrices, for which x is rotated and rounded once per codec. Their y have one
        dtype."""
        for matrix, y in zip(matrices, ys, strict=True):
            if (y.width, x.width) != matrix.shape or y.tokens != x.tokens:
                raise ValueError(f"{matrix.name} multiplies x [t, {matrix.shape[1]}] into y [t, {matrix.shape[0]}]")
            if self._idle:
                y.clear()
        if self._idle or not x.tokens:
            return
        with self._lock, Activations(x) as shared:
            for matrix in matrices:
                self._begin(matrix)
            products = [
                Product(chunk, shared, y) for matrix, y in zip(matrices, ys, strict=True) for chunk in matrix.chunks
            ]
            Products(products, self._take, self._give_back).run(self._nanoseconds)
            self._ended_s = time.perf_counter()

    def rows(self, matrix: StreamedMatrix, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Rows of W by number: `[count]` -> `[count, in]`; reads the parts that they lie in."""
        wanted, place = np.unique(ids, return_inverse=True)
        if len(wanted) and not 0 <= wanted[0] <= wanted[-1] < matrix.shape[0]:
            raise IndexError(f"row {wanted[0]} or {wanted[-1]} is outside a matrix of {matrix.shape[0]} rows")
        found = np.empty((len(wanted), matrix.shape[1]), np.float32)
        parts = wanted // matrix.part_rows
        with self._lock:
            for part in np.unique(parts).tolist():
                here = parts == part
                found[here] = self._part(matrix, part * matrix.part_rows).rows(wanted[here])
        return found[place]

    def dense(self, matrix: StreamedMatrix) -> npt.NDArray[np.float32]:
        """W itself, `[out, in]`."""
        with self._lock:
            return np.concatenate([self._on_demand(chunk).rows(chunk.numbers) for chunk in matrix.chunks])

    def _take(self, chunk: Chunk, wait: bool) -> Held | None:
        """What `Products` asks for. A chunk that nothing reads ahead is there once it was waited for: one at a time."""
        kept = self._kept.get(chunk)
        if kept is None and (self._ahead is None or chunk not in self._ahead):
            if not wait and chunk not in self._cache:
                return None
            kept = self._on_demand(chunk)
        if kept is not None:
            return kept, None
        assert self._ahead is not None
        start = time.perf_counter()
        taken = self._ahead.take(chunk, wait=wait)
        self._waiting_s += time.perf_counter() - start
        return taken

    def _give_back(self, slot: Slot) -> None:
        assert self._ahead is not None
        self._ahead.give_back(slot)

    def _on_demand(self, chunk: Chunk) -> ChunkData:
        """A chunk that is not in the sequence: the ones used last stay in memory, as many as fit."""
        kept = self._kept.get(chunk) or self._cache.get(chunk)
        if kept is None:
            kept = self._cache[chunk] = self._read(chunk)
            self._cached_bytes += kept.nbytes
            while len(self._cache) > 1 and self._cached_bytes > self._cache_bytes:
                self._forget()
        elif chunk in self._cache:
            self._cache.move_to_end(chunk)
        return kept

    def _forget(self) -> int:
        """Drop the chunk that was used longest ago; how many bytes that gives back."""
        size: int = self._cache.popitem(last=False)[1].nbytes
        self._cached_bytes -= size
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
        return self._read(part)

    def _read(self, chunk: Chunk) -> ChunkData:
        start = time.perf_counter()
        data = self._storage.read_into(chunk.region, Slot(chunk.region.size_bytes))
        chunk.matrix.check(chunk, data)
        self._waiting_s += time.perf_counter() - start
        self._direct_bytes += len(data)
        return ChunkData(chunk, data)

    # ----------------------------------------------------------------------------------------------- what is held

    def _fill(self, verify: bool, progress: Step | None) -> None:
        """Load what is kept; with `verify`, read everything and compare it with its digests."""
        kept, decoded = self.residency.kept, set(self.residency.decoded)
        total = sum(m.coded_bytes for m in self._matrices) if verify else sum(c.region.size_bytes for c in kept)
        (slot,) = make_slots(1, max(chunk.region.size_bytes for matrix in self._matrices for chunk in matrix.chunks))
        done = 0
        for matrix in self._matrices:
            digest = hasher() if verify else None
            at = 0
            for chunk in matrix.chunks:
                if digest is None and chunk not in kept:
                    continue
                data = self._storage.read_into(chunk.region, slot)
                matrix.check(chunk, data)
                if digest is not None:
                    self._hash(matrix, digest, at, chunk.region.offset_bytes - matrix.offset_bytes)
                    digest.update(data.data)
                    at = chunk.region.offset_bytes - matrix.offset_bytes + len(data)
                if chunk in kept:
                    held = ChunkData(chunk, data)
                    self._kept[chunk] = held.arrange() if chunk in decoded else held.copy()
                done += len(data)
                if progress is not None:
                    progress(done, total)
            if digest is not None:
                self._hash(matrix, digest, at, matrix.buffer.size_bytes)
                if digest.hexdigest() != matrix.buffer.digest:
                    raise ArtifactError(
                        f"{matrix.file}: tensor {matrix.name!r} at byte {matrix.offset_bytes} does not match its "
                        "digest; fetch the artifact again, or pack again"
                    )

    def _hash(self, matrix: StreamedMatrix, digest: object, start: int, stop: int) -> None:
        """Bytes of a buffer that belong to no chunk: the index, the padding."""
        for at in range(start, stop, CHECKED_BYTES):
            size = min(CHECKED_BYTES, stop - at)
            digest.update(self._storage.read(Region(matrix.file, matrix.offset_bytes + at, size)))  # type: ignore[attr-defined]

    def _begin(self, matrix: StreamedMatrix) -> None:
        """Note what is multiplied; at the first matrix of a pass, see to order and memory."""
        if matrix not in self._seen:
            self._seen[matrix] = None
            return
        self._passes += 1
        streamed = [m for m in self._seen if self._ahead is not None and any(c in self._ahead for c in m.chunks)]
        if streamed and [m for m in self._order if m in set(streamed)] != streamed:
            self._order = streamed + [m for m in self._order if m not in set(streamed)]
            self._follow()
        self._seen = {matrix: None}
        excess = process.resident_bytes() - self._limit_bytes
        if excess > 0 and (self._kept or self._cache):
            self._shed(excess)
        elif excess > 0 and not self._warned:
            self._warned = True
            _log.warning("%.0f MB above the limit, with no weights kept: the text has become too long", excess / 1e6)

    @property
    def firm_bytes(self) -> int:
        """What the process takes beyond what it has once all kept weights are given up: mostly less than nothing."""
        with self._lock:
            kept = sum(data.nbytes for data in self._kept.values()) + self._cached_bytes
        return (ring_bytes(self._matrices) if self._ahead is None else 0) - kept

    def make_room(self, size_bytes: int) -> None:
        """Before a pass that takes so much more memory: give up kept chunks for it, or take back what was given up."""
        room = self._limit_bytes - process.resident_bytes() - size_bytes
        with self._lock:
            if room < 0:
                self._shed(-room)
            elif self._given_up:
                self._take_back(room)

    def _shed(self, excess: int) -> None:
        """Give up kept chunks, since something else (a long context, mostly) has grown."""
        while excess > 0 and self._cache:
            excess -= self._forget()
        freed: list[Chunk] = []
        while excess > 0 and self._kept:
            chunk, data = self._kept.popitem()
            excess -= data.nbytes
            freed.append(chunk)
        process.release()
        if freed:
            _log.info("memory is short: %d kept chunks are streamed from now on", len(freed))
            self._given_up += freed
            self._follow()

    def _take_back(self, room: int) -> None:
        """Keep chunks again, in the form that they were kept in."""
        decoded, taken = set(self.residency.decoded), 0
        while self._given_up:
            chunk = self._given_up[-1]
            room -= chunk.decoded_bytes if chunk in decoded else chunk.region.size_bytes
            if room < 0:
                break
            data = self._read(chunk)
            self._kept[self._given_up.pop()] = data.arrange() if chunk in decoded else data
            taken += 1
        if taken:
            _log.info("memory is free again: %d chunks are kept as before", taken)
            self._follow()

    def _follow(self) -> None:
        chunks = self._streamed()
        if self._ahead is None:
            slot = max(chunk.region.size_bytes for matrix in self._order for chunk in matrix.chunks)
            self._ahead = ReadAhead(self._storage, chunks, slots=SLOTS, slot_bytes=slot, threads=self.threads)
            self._close.detach()
            self._close = weakref.finalize(self, _close, self._ahead, self._storage)
        else:
            self._ahead.set_sequence(chunks)

    def close(self) -> None:
        """Stop reading; the model cannot be run any more."""
        self._close()

    # ------------------------------------------------------------------------------------------- what is measured

    @property
    def sequence(self) -> tuple[StreamedMatrix, ...]:
        """The matrices of a pass, in order."""
        return tuple(self._order)

    def held(self, chunk: Chunk) -> ChunkData:
        """A chunk in memory, read now if it is not kept."""
        return self._kept.get(chunk) or self._read(chunk)

    def read_alone(self) -> float:
        """Seconds of a pass that only reads: of as many as a second has, or one."""
        with self._lock:
            self._follow()
            self._read_through()  # fills the ring, as the pass before a pass does
            start, passes = time.perf_counter(), 0
            while not passes or time.perf_counter() - start < ALONE_S:
                self._read_through()
                passes += 1
            return (time.perf_counter() - start) / passes

    def _read_through(self) -> None:
        for chunk in self._streamed():
            assert self._ahead is not None
            taken = self._ahead.take(chunk)
            assert taken is not None
            self._give_back(taken[1])

    @contextmanager
    def without_weights(self) -> Iterator[None]:
        """Products are zero and cost nothing meanwhile."""
        self._idle = True
        try:
            yield
        finally:
            self._idle = False

    # ------------------------------------------------------------------------------------------- what is reported

    @property
    def line(self) -> str:
        """One sentence: what was measured, what limits, what to expect."""
        s, kept = self.speeds, sum(data.nbytes for data in self._kept.values())
        coded = sum(m.coded_bytes for m in self._order)
        limit = "storage" if s.read_s(self._streamed()) >= 0.99 * self.residency.expected_s else "decode"
        return (
            f"storage {s.read_bytes_per_s / 1e9:.2f} GB/s ({self.threads} x {self._storage.read_bytes >> 20} MiB), "
            f"decode {s.decode_weights_per_s / 1e9:.2f} G weights/s: "
            f"{limit}-bound, {1 / max(self.residency.expected_s, 1e-9):.1f} tok/s expected; {kept / 1e6:.0f} MB of "
            f"memory for {coded / 1e6:.0f} MB of weights"
        )

    def _streamed(self) -> list[Chunk]:
        return [c for m in self._order for c in m.chunks if c not in self._kept]

    def summary(self) -> Summary:
        """What was read and computed since the last `reset`."""
        read = self._direct_bytes + (0 if self._ahead is None else self._ahead.bytes_read)
        elapsed = self._ended_s - self._started_s
        threads = native.threads()
        return Summary(
            passes=self._passes + bool(self._seen),
            elapsed_s=elapsed,
            bytes_read=read,
            waiting_s=self._waiting_s,
            decode_s=float(self._nanoseconds[0]) / 1e9 / threads,
            multiply_s=float(self._nanoseconds[1]) / 1e9 / threads,
            kept_bytes=sum(data.nbytes for data in self._kept.values()),
            cached_bytes=self._cached_bytes,
        )

    def reset(self) -> None:
        """Begin a new summary."""
        self._waiting_s, self._passes, self._direct_bytes = 0.0, 0, 0
        self._nanoseconds[:] = 0
        self._seen = {}
        self._started_s = self._ended_s = time.perf_counter()
        if self._ahead is not None:
            self._ahead.bytes_read, self._ahead.reading_s = 0, 0.0


def ring_bytes(matrices: Iterable[StreamedMatrix]) -> int:
    """Of the slots that chunks of these are read into."""
    return SLOTS * max(chunk.region.size_bytes for matrix in matrices for chunk in matrix.chunks)


def _has_experts(others: Sequence[StreamedMatrix]) -> bool:
    return any(matrix.name.rpartition(".")[2].isdecimal() for matrix in others)


def _close(ahead: ReadAhead | None, storage: Storage) -> None:
    if ahead is not None:
        ahead.close()
    storage.close()
