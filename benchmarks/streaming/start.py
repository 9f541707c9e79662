"""`streaming.py`: what a process takes before weights do; one token of the example model from the command line."""

from __future__ import annotations

import sys

from benchmarks.shared.limits import LimitError, Limits, run_limited
from benchmarks.shared.report import median_spread
from benchmarks.streaming.runs import StreamingBench

ENGINES = ("native", "transformers")
TIMES, QUICK_TIMES = 5, 1
TIMEOUT_S = 300.0


def measure_start(bench: StreamingBench) -> None:
    """Seconds from the shell to the end of a text of one token, and the memory of the process."""
    artifact, report = bench.store.example(), bench.report
    rows = []
    for engine in ENGINES[:1] if bench.quick else ENGINES:
        command = [sys.executable, "-m", "waterfill", "generate", str(artifact.path), "--prompt", "def", "--engine"]
        command += [engine, "--max-new-tokens", "1", "--json"]
        runs = [
            run_limited(command, Limits(), timeout_s=TIMEOUT_S) for _ in range(QUICK_TIMES if bench.quick else TIMES)
        ]
        if any(run.status for run in runs):
            raise LimitError(f"waterfill generate --engine {engine}: {runs[0].stderr.strip().splitlines()[-1]}")
        seconds, spread_s = median_spread([run.elapsed_s for run in runs])
        peak, anonymous = (max(getattr(run.peaks, kind) for run in runs) for kind in ("resident", "anonymous"))
        rows.append([engine, seconds, spread_s, peak / 1e6, anonymous / 1e6])
    columns = ["engine", "s", "±", "peak MB", "of it anonymous MB"]
    report.table(
        f"one token of the example model ({artifact.size_bytes / 1e6:.1f} MB), started from the shell",
        columns,
        rows,
        key="start",
    )
