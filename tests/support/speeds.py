"""A machine that is stated, not measured: grids are quickest, what is entropy-coded slowest to decode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from waterfill.planning.speed import CodecSpeed, Speeds, Timing, timed_codecs

NS = 1e-9
KINDS = {
    "higgs": CodecSpeed(0.05 * NS, 0.1 * NS),
    "bitshift": CodecSpeed(0.1 * NS, 0.2 * NS),
    "trellis": CodecSpeed(0.08 * NS, 1.0 * NS),
    "levels": CodecSpeed(0.08 * NS, 0.1 * NS),
}


def stated(names: Sequence[str], progress: Any = None) -> tuple[dict[str, CodecSpeed], float]:
    """What stands for `codec_speeds.measure` in all tests."""
    return {name: KINDS[name.partition("-")[0]] for name in names}, 1.0


def stated_speeds(names: Sequence[str], **machine: Any) -> Speeds:
    """Of these codecs."""
    about = {"machine": "a stated machine", "isa": "scalar", "threads": 1, **machine}
    return Speeds(codecs=stated(timed_codecs(names))[0], **about)


def timing(names: Sequence[str], storage_bytes_per_s: float | None = None) -> Timing:
    """Streamed from storage of this speed, or in memory."""
    return Timing(stated_speeds(names), storage_bytes_per_s)
