"""Rounds of measurements on a machine that others use too: a round that they disturb is repeated.

    one_round() ──► {what: {figure: value}} ──undisturbed──► Series: {what: {figure: [a value a round]}}

Two threads that wait for each other lose milliseconds to a third, so a little other work spoils a figure altogether.
Linux says how much there was; elsewhere every round counts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.shared.report import BenchmarkReport

QUIET = 0.1  # processors that others may use in a round that counts
COARSE_S = 0.02  # processor times are counted in hundredths of a second

Round = Mapping[str, Mapping[str, float]]
Series = Mapping[str, Mapping[str, list[float]]]

own_processes: set[int] = set()  # children, whose work is no disturbance


@dataclass(frozen=True)
class Effort:
    """How many rounds, and for how long disturbed ones are repeated before they have to do."""

    rounds: int
    patience_s: float


def undisturbed(report: BenchmarkReport, what: str, effort: Effort, one_round: Callable[[], Round]) -> Series:
    """Rounds, after one to warm up: the least disturbed ones of all that were tried."""
    one_round()
    count = effort.rounds
    tried: list[tuple[float, Round]] = []
    wasted_s = 0.0
    while len(tried) < count or (wasted_s < effort.patience_s and sum(others <= QUIET for others, _ in tried) < count):
        before = _other_seconds()
        figures = one_round()
        after = _other_seconds()
        elapsed_s, others_s = after[0] - before[0], max(after[1] - before[1] - COARSE_S, 0)
        tried.append((others_s / elapsed_s, figures))
        wasted_s += elapsed_s if others_s > QUIET * elapsed_s else 0
    tried.sort(key=lambda pair: pair[0])  # stable: equal ones stay in order
    worst = tried[count - 1][0]
    if worst > QUIET:
        report.note(f"{what}: disturbed, others used up to {worst:.2f} processors in {count} of {len(tried)} rounds")
    kept = [figures for _, figures in tried[:count]]
    report.results.setdefault("rounds", {})[what] = {"tried": len(tried), "kept": count, "others_processors": worst}
    return {
        name: {figure: [figures[name][figure] for figures in kept] for figure in series}
        for name, series in kept[0].items()
    }


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def _other_seconds() -> tuple[float, float]:
    """(now, processor time since the start that was neither this process's nor its children's), seconds.

    What the host took from a virtual machine counts as others' work.
    """
    try:
        fields = [int(field) for field in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]]
    except (OSError, ValueError):
        return time.perf_counter(), 0.0
    user, nice, system, _, _, irq, softirq, steal = fields
    ticks = user + nice + system + irq + softirq + steal - sum(map(_ticks, own_processes))
    return time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK") - sum(os.times()[:2])


def _ticks(process: int) -> int:
    """Processor time of a process; none once it has ended."""
    try:
        after_name = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(after_name[11]) + int(after_name[12])
