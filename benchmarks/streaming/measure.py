"""Each stage of a streamed pass by itself: what reading, decoding and computing take when nothing else is done."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from unittest import mock

import numpy as np

from waterfill.running.streaming import Activations, StreamedMatrix, Streamer, View
from waterfill.running.streaming.ahead import ReadAhead

ALONE_S = 1.0  # of reading alone


def measure_stages(streamer: Streamer, token: Callable[[], object], *, alone_s: float = ALONE_S) -> dict[str, float]:
    """Seconds of one pass with one token, which `token` runs: `read_s` reads what is not kept, `decode_s` decodes it,
    `compute_s` is all else, products with decoded weights and the model's own code."""
    decode_s = multiply_s = 0.0
    read_s = _read_alone(streamer, alone_s)
    for matrix in streamer.sequence:
        decode, multiply = _work(streamer, matrix)
        decode_s, multiply_s = decode_s + decode, multiply_s + multiply
    return {"read_s": read_s, "decode_s": decode_s, "compute_s": multiply_s + _other(streamer, token)}


def _read_alone(streamer: Streamer, alone_s: float) -> float:
    """Of as many passes as there is time for, or one, with a ring like the streamer's; that one is full, and waits."""
    chunks = streamer.streamed
    if not chunks:
        return 0.0
    largest = max(chunk.region.size_bytes for chunk in chunks)
    sizes = {"slots": streamer.tuning.slots, "slot_bytes": largest, "threads": streamer.threads}
    with closing(ReadAhead(streamer.storage, chunks, **sizes)) as ahead:

        def read_through() -> None:
            for chunk in chunks:
                taken = ahead.take(chunk)
                assert taken is not None
                ahead.give_back(taken[1])

        read_through()  # fills the ring, as the pass before a pass does
        start, passes = time.perf_counter(), 0
        while not passes or time.perf_counter() - start < alone_s:
            read_through()
            passes += 1
        return (time.perf_counter() - start) / passes


def _work(streamer: Streamer, matrix: StreamedMatrix) -> tuple[float, float]:
    """(seconds of decoding what is not kept decoded, seconds of multiplying everything when it is decoded)."""
    y, nanoseconds = View.of_array(np.empty((1, matrix.shape[0]), np.float32)), np.zeros(2, np.int64)
    decode_s = multiply_s = 0.0
    with Activations(View.of_array(np.ones((1, matrix.shape[1]), np.float32))) as x:
        x.prepared(matrix.codec)
        for chunk in matrix.chunks:
            data = streamer.kept.get(chunk) or streamer.on_demand.read(chunk)
            nanoseconds[:] = 0
            start = time.perf_counter()
            data.multiply(x, y, nanoseconds)
            elapsed = time.perf_counter() - start
            if not data.arranged:
                decode_s += elapsed * float(nanoseconds[0]) / max(1, int(nanoseconds.sum()))
                data = data.arrange()
            start = time.perf_counter()
            data.multiply(x, y, nanoseconds)
            multiply_s += time.perf_counter() - start
    return decode_s, multiply_s


def _other(streamer: Streamer, token: Callable[[], object]) -> float:
    """The model's own code for a token: products are zero and cost nothing."""
    times = []
    with mock.patch.object(streamer, "products", _nothing):
        for _ in range(5):
            start = time.perf_counter()
            token()
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _nothing(matrices: Sequence[StreamedMatrix], x: View, ys: Sequence[View]) -> None:
    for y in ys:
        ctypes.memset(y.address, 0, y.tokens * y.width * y.item_bytes)
