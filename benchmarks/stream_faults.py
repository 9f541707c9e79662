"""`streaming.py`: what a streamed run does when reading fails, files are damaged, or it is interrupted."""

from __future__ import annotations

from stream_runs import Bench


def measure_faults(bench: Bench) -> None:
    bench.report.note("faults: not measured yet")
