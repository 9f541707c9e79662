"""How fast this machine reads, decodes and multiplies a model's own chunks: about a second of measuring."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from waterfill.running.streaming.chunks import Chunk, ChunkData
from waterfill.running.streaming.residency import Speeds
from waterfill.running.streaming.storage import READ_BYTES, Region, Slot, Storage, make_slots
from waterfill.running.streaming.view import Activations, View

READING_S = 0.2  # for each way
WORKING_S = 0.2
WAYS = ((4, 2 * READ_BYTES), (4, READ_BYTES), (2, READ_BYTES))  # threads that read, how much at a time
ENOUGH = 1.2  # times as fast as decoding
WORTH = 1.1  # a way that comes later has to be so much faster


def calibrate(
    storage: Storage, chunks: Sequence[Chunk], *, reading_s: float | None = READING_S, working_s: float = WORKING_S
) -> tuple[Speeds, int]:
    """Speeds, and how many threads had best read; sets how much `storage` reads with one call.

    Args:
        reading_s: seconds of reading in each way; once at least. None where nothing is to be read.
        working_s: seconds of decoding and multiplying; once at least.
    """
    largest = max(chunk.region.size_bytes for chunk in chunks)
    slots = make_slots(1 if reading_s is None else max(threads for threads, _ in WAYS), largest)
    chunk = max(chunks, key=lambda chunk: chunk.region.size_bytes)
    decode, multiply = _working_speeds(ChunkData(chunk, storage.read_into(chunk.region, slots[0])), working_s)
    if reading_s is None:
        return Speeds(math.inf, decode, multiply), WAYS[0][0]
    enough = ENOUGH * largest * decode / chunk.weights  # faster would only take time from decoding
    following = itertools.cycle([chunk.region for chunk in chunks])
    read_bytes_per_s, threads = fastest_reading(storage, following, slots, reading_s, enough)
    return Speeds(read_bytes_per_s, decode, multiply), threads


def fastest_reading(
    storage: Storage, following: Iterator[Region], slots: Sequence[Slot], seconds: float, enough: float = math.inf
) -> tuple[float, int]:
    """Bytes per second in the fastest of WAYS, or the first that is `enough`, and how many threads read so; sets how
    much `storage` reads with one call.

    Args:
        following: what is read, without end.
        slots: of which each thread has one.
        seconds: in each way; once at least.
    """
    best, read_bytes_per_s = WAYS[0], 0.0
    for threads, storage.read_bytes in WAYS:
        speed = _reading_speed(storage, following, slots[:threads], seconds)
        if speed > WORTH * read_bytes_per_s:
            best, read_bytes_per_s = (threads, storage.read_bytes), speed
        if read_bytes_per_s > enough:
            break
    threads, storage.read_bytes = best
    return read_bytes_per_s, threads


def _reading_speed(storage: Storage, following: Iterator[Region], slots: Sequence[Slot], seconds: float) -> float:
    start, size = time.perf_counter(), 0
    with ThreadPoolExecutor(len(slots)) as pool:
        while (elapsed := time.perf_counter() - start) < seconds or not size:
            regions = [next(following) for _ in slots]
            list(pool.map(storage.read_into, regions, slots))
            size += sum(region.size_bytes for region in regions)
    return size / elapsed


def _working_speeds(data: ChunkData, seconds: float) -> tuple[float, float]:
    """Weights per second, decoded and multiplied with one token. Other programs only slow rounds down: most of them do
    not count."""
    rows, width = data.chunk.matrix.shape
    y, nanoseconds = View.of_array(np.empty((1, rows), np.float32)), np.zeros(2, np.int64)
    with Activations(View.of_array(np.ones((1, width), np.float32))) as x:
        data.multiply(x, y, nanoseconds)  # tables, memory
        nanoseconds[:] = 0
        start, rounds = time.perf_counter(), list[float]()
        while time.perf_counter() - start < seconds or not rounds:
            begin = time.perf_counter()
            data.multiply(x, y, nanoseconds)
            rounds.append(time.perf_counter() - begin)
    speed = data.chunk.weights / sorted(rounds)[len(rounds) // 4]
    decoding = nanoseconds[0] / nanoseconds.sum() if nanoseconds.sum() else 0.9  # the reference does not say
    return speed / max(decoding, 1e-3), speed / max(1 - decoding, 1e-3)
