"""Each stage of a streamed pass by itself: what reading, decoding and computing take when nothing else is done."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from waterfill.running.streaming.chunks import StreamedMatrix
from waterfill.running.streaming.streamer import Streamer
from waterfill.running.streaming.view import Activations, View


def measure_stages(streamer: Streamer, token: Callable[[], object]) -> dict[str, float]:
    """Seconds of one pass with one token, which `token` runs: `read_s` reads what is not kept, `decode_s` decodes it,
    `compute_s` is all else, products with decoded weights and the model's own code."""
    decode_s = multiply_s = 0.0
    read_s = streamer.read_alone()
    for matrix in streamer.sequence:
        decode, multiply = _work(streamer, matrix)
        decode_s, multiply_s = decode_s + decode, multiply_s + multiply
    return {"read_s": read_s, "decode_s": decode_s, "compute_s": multiply_s + _other(streamer, token)}


def _work(streamer: Streamer, matrix: StreamedMatrix) -> tuple[float, float]:
    """(seconds of decoding what is not kept decoded, seconds of multiplying everything when it is decoded)."""
    y, nanoseconds = View.of_array(np.empty((1, matrix.shape[0]), np.float32)), np.zeros(2, np.int64)
    decode_s = multiply_s = 0.0
    with Activations(View.of_array(np.ones((1, matrix.shape[1]), np.float32))) as x:
        x.prepared(matrix.codec)
        for chunk in matrix.chunks:
            data = streamer.held(chunk)
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
    """The model's own code for a token: products are not computed."""
    times = []
    with streamer.without_weights():
        for _ in range(5):
            start = time.perf_counter()
            token()
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]
