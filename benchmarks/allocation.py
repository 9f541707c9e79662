"""The allocator: time, memory, distance to an integer-programming solver, unused budget, and published predictions.

Two models. Llama-3.1-8B: 224 matrices with published sensitivities (skipped where their file is absent). A mixture of
experts: 25,000 matrices of one shape, with log-normal sensitivities over three decades, and with equal ones. Menus have
43 choices. Times count everything between menus and allocation; the menus are made beforehand.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from benchmarks.shared.report import REPOSITORY, BenchmarkReport, parse_arguments
from waterfill.planning.allocate import Allocation, Choice, allocate, relax, smallest

Menus = list[list[Choice]]

# t² of Gaussian grids, {p: {n: t²}}: exact integrals for p = 1, Monte Carlo above, of the grids that the authors of the
# HIGGS paper published. Their rate is log2(n)/p bits per weight, and 16 bits of scale per 1024 weights.
PUBLISHED_T2 = {
    1: {4: 0.11748, 8: 0.034548, 9: 0.027853, 16: 0.009501, 19: 0.006848, 32: 0.002505}
    | {64: 0.000644, 128: 0.000163, 256: 0.0000411},
    2: {16: 0.10767, 64: 0.029620, 88: 0.021903, 256: 0.007753, 361: 0.005526, 1024: 0.002040, 4096: 0.000589},
    3: {64: 0.10120, 512: 0.027062, 830: 0.019723, 4096: 0.006903, 6600: 0.005037},
    4: {256: 0.09592, 4096: 0.025540, 7800: 0.018434},
    6: {4096: 0.09142},
}
SCALE_BITS = 16 / 1024

# Llama-3.1-8B on WikiText-2: measured in full precision, and what the linear model predicts with all grids to p = 6.
FULL_PRECISION_PPL = 5.607
REFERENCE_PPL = {3.25: 6.45, 4.0: 5.93}
BUDGETS_BITS = (2.5, 3.0, 3.25, 3.5, 4.0, 4.25, 5.0, 6.0)


def main() -> None:
    arguments = parse_arguments(__doc__)
    report = BenchmarkReport("allocation: multiple-choice knapsack over tensors")
    unused = measure_experts(report, quick=arguments.quick)
    llama = published_sensitivities()
    if llama is None:
        report.note("no llama-3.1-8b-alphas.json (set WATERFILL_TEST_DATA to a folder that holds data/): skipped")
    else:
        unused += measure_llama(report, *llama, quick=arguments.quick)
    report.criterion("unused_share_of_budget", max(unused), "<= 0.001", max(unused) <= 1e-3)
    report.save(arguments.json)


def measure_llama(report: BenchmarkReport, alphas: list[float], weights: list[int], *, quick: bool) -> list[float]:
    """Time, agreement with HiGHS and predicted perplexity at every budget; returns the unused shares."""
    menus = make_menus(alphas, weights)
    rows, deviations, times, unused = [], [], [], []
    for bits in BUDGETS_BITS[::3] if quick else BUDGETS_BITS:
        budget = int(sum(weights) * bits / 8)
        found, elapsed_s = timed(menus, budget)
        solver_loss, solver_s = solve_milp(menus, budget)
        times.append(elapsed_s)
        deviations.append((found.loss - solver_loss) / solver_loss)
        unused.append(1 - found.size_bytes / budget)
        rows.append([bits, found.loss, solver_loss, deviations[-1], found.exact, unused[-1], elapsed_s, solver_s])
    columns = ["bits", "PPL rise", "milp", "deviation", "exact", "unused", "time s", "milp s"]
    report.table("Llama-3.1-8B, 224 x 43", columns, rows, key="llama_3_1_8b")
    report.criterion("time_s_224_tensors", max(times), "< 2", max(times) < 2)
    report.criterion("relative_excess_over_milp", max(deviations), "<= 1e-6", max(deviations) <= 1e-6)
    for bits, reference in REFERENCE_PPL.items():
        ppl = FULL_PRECISION_PPL + allocate(menus, int(sum(weights) * bits / 8)).loss
        report.criterion(f"predicted_ppl_{bits}_bits", ppl, f"{reference} ± 0.05", abs(ppl - reference) <= 0.05)
    return unused


def measure_experts(report: BenchmarkReport, *, quick: bool) -> list[float]:
    """Time and memory on a mixture of experts, for two kinds of sensitivities; returns the unused shares."""
    tensors, weights = 25_000, 2048 * 768
    alphas = np.exp(np.random.default_rng(0).normal(scale=math.log(1000) / 6, size=tensors)) / tensors
    rows, times, unused = [], [], []
    # Equal sensitivities are the hardest case: every tensor competes for the last byte.
    for name, sensitivities in {"log-normal": alphas, "all equal": np.full(tensors, 1 / tensors)}.items():
        menus = make_menus(sensitivities.tolist(), [weights] * tensors)
        for bits in (3.25,) if quick else (2.5, 3.25, 4.0, 5.0):
            budget = int(tensors * weights * bits / 8)
            found, elapsed_s = timed(menus, budget)
            _, relax_s = timed(menus, budget, lambda *task: relax(*task).allocation)
            _, smallest_s = timed(menus, found.loss, smallest)
            times.append(max(elapsed_s, smallest_s))
            unused.append(1 - found.size_bytes / budget)
            distance = (found.loss - found.bound) / found.loss
            rows.append([name, bits, found.exact, distance, unused[-1], elapsed_s, relax_s, smallest_s])
    columns = ["sensitivities", "bits", "exact", "distance to bound", "unused", "allocate s", "relax s", "smallest s"]
    report.table("mixture of experts, 25,000 x 43", columns, rows, key="experts")
    report.criterion("time_s_25000_tensors", max(times), "< 30", max(times) < 30)
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    report.criterion("peak_resident_bytes_with_imports", peak_bytes, "< 1.5e9", peak_bytes < 1.5e9)
    return unused


def timed(menus: Menus, limit: float, solve: Callable[..., Allocation] = allocate) -> tuple[Allocation, float]:
    """The allocation and the seconds that it took."""
    start = time.perf_counter()
    found = solve(menus, limit)
    return found, time.perf_counter() - start


def published_sensitivities() -> tuple[list[float], list[int]] | None:
    """(α clipped at zero, number of weights) of every matrix of Llama-3.1-8B, where the file is at hand."""
    root = Path(os.environ.get("WATERFILL_TEST_DATA", REPOSITORY.parent / "shared"))
    path = root / "data" / "llama-3.1-8b-alphas.json"
    if not path.is_file():
        return None
    tensors = json.loads(path.read_text("utf-8"))["tensors"].values()
    return [max(0.0, t["alpha"]) for t in tensors], [math.prod(t["shape"]) for t in tensors]


def menu_points() -> list[tuple[float, float]]:
    """43 points (bits per weight, t²): the 25 published, and one between neighbours of equal p ≤ 3, log-linearly."""
    points = []
    for p, grids in PUBLISHED_T2.items():
        published = [(math.log2(n) / p + SCALE_BITS, t2) for n, t2 in grids.items()]
        points += published
        if p <= 3:
            points += [((a + c) / 2, math.sqrt(b * d)) for (a, b), (c, d) in itertools.pairwise(published)]
    return sorted(points)


def make_menus(alphas: list[float], weights: list[int]) -> Menus:
    points = menu_points()
    return [
        [Choice(math.ceil(bits * count / 8), alpha * t2) for bits, t2 in points]
        for alpha, count in zip(alphas, weights, strict=True)
    ]


def solve_milp(menus: Menus, budget_bytes: int) -> tuple[float, float]:
    """(loss, seconds) of HiGHS with a relative gap of 1e-7."""
    tensors, length = len(menus), len(menus[0])
    size = np.array([choice.size_bytes for menu in menus for choice in menu], dtype=np.float64)
    loss = np.array([choice.loss for menu in menus for choice in menu])
    one_each = csr_array((np.ones(len(loss)), (np.repeat(np.arange(tensors), length), np.arange(len(loss)))))
    # The solver's tolerances are 1e-6, absolute: below a byte in kB, and below 1e-7 of the loss in these units.
    units = 100 / loss.reshape(tensors, length).min(axis=1).sum()
    within = LinearConstraint(size[None] / 1e3, -np.inf, budget_bytes / 1e3)
    start = time.perf_counter()
    result = milp(
        loss * units,
        constraints=[LinearConstraint(one_each, 1, 1), within],
        integrality=np.ones(len(loss)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-7, "time_limit": 300},
    )
    picks = result.x.reshape(tensors, length).argmax(axis=1)
    return math.fsum(menu[k].loss for menu, k in zip(menus, picks, strict=True)), time.perf_counter() - start


if __name__ == "__main__":
    main()
