"""Counts what a streamed model reads, waits for and computes, from one `reset` to the next."""

from __future__ import annotations

import time

import numpy as np

from waterfill.base import native
from waterfill.running.streaming.summary import Summary


class Meter:
    """Whoever reads or multiplies adds to it."""

    def __init__(self) -> None:
        self.nanoseconds = np.zeros(2, np.int64)  # of all threads: decoding, multiplying
        self.reset()

    def reset(self) -> None:
        """Count from nothing."""
        self.nanoseconds[:] = 0
        self.waiting_s, self.passes, self.direct_bytes = 0.0, 0, 0  # passes that have ended, bytes not read ahead
        self.started_s = self.ended_s = time.perf_counter()

    def waited(self, start_s: float) -> None:
        """The computation has waited for storage since `start_s` of `time.perf_counter`."""
        self.waiting_s += time.perf_counter() - start_s

    def multiplied(self) -> None:
        """A product has just ended."""
        self.ended_s = time.perf_counter()

    def summary(self, *, form: str, amid_pass: bool, ahead_bytes: int, kept_bytes: int, cached_bytes: int) -> Summary:
        """What was counted, up to the last product; a pass that has begun is one."""
        threads = native.threads()
        return Summary(
            form=form,
            passes=self.passes + amid_pass,
            elapsed_s=self.ended_s - self.started_s,
            bytes_read=self.direct_bytes + ahead_bytes,
            waiting_s=self.waiting_s,
            decode_s=float(self.nanoseconds[0]) / 1e9 / threads,
            multiply_s=float(self.nanoseconds[1]) / 1e9 / threads,
            kept_bytes=kept_bytes,
            cached_bytes=cached_bytes,
        )
