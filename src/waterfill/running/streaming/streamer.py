"""The weights of a model that does not fit in memory as levels, and the one product that everything goes through.

    storage ──ReadAhead, in `Order`──► coded chunks ──┐
    `Kept` chunks, coded or decoded ──────────────────┼─► decoded and multiplied part by part, in the cache ──► y
    storage ──`OnDemand`──► rows, experts ────────────┘

Where all codes are in memory, nothing is read until something else needs that memory.

There is no ring of decoded weights between decoder and product: a part is multiplied by the thread that decoded it,
while it is in its cache. Decoding ahead would cost memory and traffic, and fill only the little time in which the
model's own code runs.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Sequence
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from waterfill.base import process
from waterfill.base.errors import WaterfillError
from waterfill.base.progress import Step
from waterfill.running.streaming.ahead import ReadAhead, ring_bytes
from waterfill.running.streaming.calibration import calibrate
from waterfill.running.streaming.chunks import Chunk, StreamedMatrix, decoding_bytes
from waterfill.running.streaming.first_reading import read_first
from waterfill.running.streaming.kept import Kept
from waterfill.running.streaming.meter import Meter
from waterfill.running.streaming.on_demand import OnDemand
from waterfill.running.streaming.order import Order
from waterfill.running.streaming.products import Held, Product, Products
from waterfill.running.streaming.residency import keep_coded
from waterfill.running.streaming.storage import Slot, Storage
from waterfill.running.streaming.summary import Summary
from waterfill.running.streaming.tuning import USUAL, Tuning
from waterfill.running.streaming.view import Activations, View

_log = logging.getLogger("waterfill.streaming")


class Streamer:
    """All streamed matrices of one model.

    `kept` has what is in memory, `on_demand` what is read when it is asked for; the streamer reads the rest ahead, says
    in which order, and lets `kept` yield where memory is short.

    Args:
        storage: where they are read from; closed with the streamer.
        sequence: those that every pass multiplies, in the order of execution.
        others: those that are read when they are asked for: rows of embeddings, experts.
        spare_bytes: memory for whatever is kept.
        limit_bytes: resident memory that the process is to stay below.
        in_memory: whether all codes are kept, which `spare_bytes` has room for.
        verify: compare every matrix with its digest first.
        progress: told how many bytes have been read, of how many, while what is kept or verified is read.
        tuning: sizes and times; those that the matrices were made with.

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
        in_memory: bool = False,
        verify: bool,
        progress: Step | None = None,
        tuning: Tuning = USUAL,
    ) -> None:
        self.storage, self.limit_bytes, self.tuning = storage, limit_bytes, tuning
        self._order, self._meter = Order(sequence), Meter()
        self._lock = threading.RLock()  # passes are one at a time: they share the ring
        self._warned, self._in_memory = False, in_memory
        self._matrices = matrices = (*sequence, *others)
        self._ring_bytes, self._decoding_bytes = ring_bytes(matrices, tuning.slots), decoding_bytes(matrices)
        chunks, beside = ([chunk for matrix in some for chunk in matrix.chunks] for some in (sequence, others))
        self.speeds, self.threads = calibrate(
            storage,
            chunks or beside,
            reading_s=None if in_memory else tuning.reading_s,
            working_s=tuning.working_s,
        )
        # Experts come first: how often each is used is not known, but all of them cannot be read for every token.
        cache_bytes = int(tuning.cache_share * spare_bytes) if _has_experts(others) and not in_memory else 0
        if in_memory:
            residency = keep_coded(chunks, beside, spare_bytes, self.speeds)
        else:
            residency = tuning.choose_residency(chunks, spare_bytes - cache_bytes, self.speeds)
        self.kept = Kept(residency)
        self.on_demand = OnDemand(storage, self.kept, cache_bytes=cache_bytes, meter=self._meter)
        for data in read_first(storage, matrices, self.kept.residency.kept, verify=verify, progress=progress):
            self.kept.put(data, lent=True)
        self._meter.reset()
        self._ahead: ReadAhead | None = None
        self._close = weakref.finalize(self, _close, None, storage)
        self._follow()
        _log.info("%s", self.line)

    def __reduce__(self) -> NoReturn:
        raise WaterfillError("a streamed model cannot be copied or pickled; load its artifact once more instead")

    # ------------------------------------------------------------------------------------------- what is computed

    def product(self, matrix: StreamedMatrix, x: View, y: View) -> None:
        """Write x W^T: x `[tokens, in]`, y `[tokens, out]`.

        Raises:
            ArtifactError: a chunk is damaged.
        """
        self.products([matrix], x, [y])

    def products(self, matrices: Sequence[StreamedMatrix], x: View, ys: Sequence[View]) -> None:
        """`product` with each of several matrices, for which x is rotated and rounded once per codec. Their y have one
        dtype."""
        for matrix, y in zip(matrices, ys, strict=True):
            if (y.width, x.width) != matrix.shape or y.tokens != x.tokens:
                raise ValueError(f"{matrix.name} multiplies x [t, {matrix.shape[1]}] into y [t, {matrix.shape[0]}]")
        if not x.tokens:
            return
        with self._lock, Activations(x) as shared:
            for matrix in matrices:
                self._begin(matrix)
            products = [
                Product(chunk, shared, y) for matrix, y in zip(matrices, ys, strict=True) for chunk in matrix.chunks
            ]
            Products(products, self._take, self._give_back).run(self._meter.nanoseconds)
            self._meter.multiplied()

    def rows(self, matrix: StreamedMatrix, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Rows of W by number: `[count]` -> `[count, in]`; reads the parts that they lie in. IndexError outside."""
        with self._lock:
            return self.on_demand.rows(matrix, ids)

    def dense(self, matrix: StreamedMatrix) -> npt.NDArray[np.float32]:
        """W itself, `[out, in]`."""
        with self._lock:
            return self.on_demand.dense(matrix)

    def _take(self, chunk: Chunk, wait: bool) -> Held | None:
        """What `Products` asks for. A chunk that nothing reads ahead is there once it was waited for: one at a time."""
        if self._ahead is not None and chunk in self._ahead:
            start = time.perf_counter()
            taken = self._ahead.take(chunk, wait=wait)
            self._meter.waited(start)
            return taken
        held = self.kept.get(chunk)
        if held is None and (wait or chunk in self.on_demand):
            held = self.on_demand.chunk(chunk)
        return None if held is None else (held, None)

    def _give_back(self, slot: Slot) -> None:
        assert self._ahead is not None
        self._ahead.give_back(slot)

    # -------------------------------------------------------------------------------------------- order and memory

    @property
    def sequence(self) -> tuple[StreamedMatrix, ...]:
        """The matrices of a pass, in order."""
        return self._order.matrices

    @property
    def streamed(self) -> list[Chunk]:
        """Chunks of a pass that are read ahead, in order: all that are not kept."""
        return [chunk for matrix in self._order.matrices for chunk in matrix.chunks if chunk not in self.kept]

    def _begin(self, matrix: StreamedMatrix) -> None:
        """Note what is multiplied; at the first matrix of a pass, see to order and memory."""
        if self._order.ends_pass(matrix):
            self._meter.passes += 1
            if self._order.learn(self._is_read_ahead):
                self._follow()
            self._look_at_memory()
        self._order.note(matrix)

    def _is_read_ahead(self, matrix: StreamedMatrix) -> bool:
        return self._ahead is not None and any(chunk in self._ahead for chunk in matrix.chunks)

    def _follow(self) -> None:
        """Read ahead what a pass streams, beginning with its first chunk."""
        if self._ahead is None and not self.streamed:
            return
        if self._ahead is None:
            slot = max(chunk.region.size_bytes for matrix in self._order.matrices for chunk in matrix.chunks)
            self._ahead = ReadAhead(
                self.storage, self.streamed, slots=self.tuning.slots, slot_bytes=slot, threads=self.threads
            )
            self._close.detach()
            self._close = weakref.finalize(self, _close, self._ahead, self.storage)
        else:
            self._ahead.set_sequence(self.streamed)

    def _look_at_memory(self) -> None:
        excess = process.resident_bytes() + self._decoding_bytes - self.limit_bytes
        if excess > 0 and (self.kept or self.on_demand):
            self._shed(excess)
        elif excess > 0 and not self._warned:
            self._warned = True
            _log.warning("%.0f MB above the limit, with no weights kept: the text has become too long", excess / 1e6)

    @property
    def firm_bytes(self) -> int:
        """What the process takes in a pass beyond what it has now, once all kept weights are given up: mostly less than
        nothing."""
        with self._lock:
            kept = self.kept.nbytes + self.on_demand.nbytes
        return self._decoding_bytes + (self._ring_bytes if self._ahead is None else 0) - kept

    def make_way(self, size_bytes: int) -> None:
        """Before a pass that takes so much more memory: give up kept chunks for it, or take back what was given up."""
        spare_bytes = self.limit_bytes - process.resident_bytes() - self._decoding_bytes - size_bytes
        with self._lock:
            if spare_bytes < 0:
                self._shed(-spare_bytes)
            elif taken := self.kept.take_back(spare_bytes, self.on_demand.read):
                _log.info("memory is free again: %d chunks are kept as before", taken)
                self._follow()

    def _shed(self, excess_bytes: int) -> None:
        """Give up kept chunks, since something else (a long context, mostly) has grown."""
        excess_bytes -= self.on_demand.shed(excess_bytes)
        if excess_bytes > 0 and self._in_memory and self._ahead is None:
            excess_bytes += self._ring_bytes  # which what is given up is read into from now on
        given_up = self.kept.shed(excess_bytes)
        process.release()
        if given_up:
            _log.info("memory is short: %d kept chunks are streamed from now on", given_up)
            self._follow()

    def close(self) -> None:
        """Stop reading; the model cannot be run any more."""
        self._close()

    # ------------------------------------------------------------------------------------------- what is reported

    @property
    def line(self) -> str:
        """One sentence: what was measured, what limits, what to expect."""
        return self._line_in_memory() if self._in_memory else self._line_of_storage()

    def _line_in_memory(self) -> str:
        s, residency = self.speeds, self.kept.residency
        every = [chunk for matrix in self._matrices for chunk in matrix.chunks]
        levels = set(residency.decoded)
        decode_s = s.work_s((c for m in self._order.matrices for c in m.chunks if c not in levels), ())
        return (
            f"codes in memory: {self.kept.nbytes / 1e6:.0f} MB for weights that take "
            f"{sum(chunk.decoded_bytes for chunk in every) / 1e6:.0f} MB as levels; decode "
            f"{s.decode_weights_per_s / 1e9:.2f} G weights/s, which adds {1e3 * decode_s:.0f} ms to every token: "
            f"{1 / max(residency.expected_s, 1e-9):.1f} tok/s expected"
        )

    def _line_of_storage(self) -> str:
        s, expected_s = self.speeds, self.kept.residency.expected_s
        coded = sum(matrix.coded_bytes for matrix in self._order.matrices)
        limit = "storage" if s.read_s(self.streamed) >= 0.99 * expected_s else "decode"
        return (
            f"storage {s.read_bytes_per_s / 1e9:.2f} GB/s ({self.threads} x {self.storage.read_bytes >> 20} MiB), "
            f"decode {s.decode_weights_per_s / 1e9:.2f} G weights/s: "
            f"{limit}-bound, {1 / max(expected_s, 1e-9):.1f} tok/s expected; {self.kept.nbytes / 1e6:.0f} MB of "
            f"memory for {coded / 1e6:.0f} MB of weights"
        )

    def summary(self) -> Summary:
        """What was read and computed since the last `reset`."""
        return self._meter.summary(
            form="codes" if self._in_memory and self.kept.whole else "storage",
            amid_pass=self._order.amid_pass,
            ahead_bytes=0 if self._ahead is None else self._ahead.bytes_read,
            kept_bytes=self.kept.nbytes,
            cached_bytes=self.on_demand.nbytes,
        )

    def reset(self) -> None:
        """Begin a new summary."""
        self._meter.reset()
        self._order.forget_pass()
        if self._ahead is not None:
            self._ahead.bytes_read, self._ahead.reading_s = 0, 0.0


def _has_experts(others: Sequence[StreamedMatrix]) -> bool:
    return any(matrix.name.rpartition(".")[2].isdecimal() for matrix in others)


def _close(ahead: ReadAhead | None, storage: Storage) -> None:
    if ahead is not None:
        ahead.close()
    storage.close()
