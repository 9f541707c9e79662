"""Plans for shapes without weights: seconds and memory of making, writing and reading them."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import get_args

from benchmarks.scale.models import KIMI_1T, LLAMA_405B, Config, simulate
from benchmarks.scale.sensitivities import draw_sensitivity
from benchmarks.shared.limits import process_memory
from benchmarks.shared.report import BenchmarkReport
from waterfill.planning.budget import Budget
from waterfill.planning.menu import Purpose
from waterfill.planning.plan import Plan
from waterfill.planning.planner import Request, make_plan

CONFIGS: dict[str, Config] = {"Llama-3.1-405B": LLAMA_405B, "1T mixture of experts": KIMI_1T}
QUICK_LAYERS = 3
BITS, QUICK_BITS = (2.5, 3.0, 4.0), (3.0,)
SIZE_BITS = 3.25  # --size: all weight files, in bits per weight of the matrices
PLAN_GOAL_S = 60.0
COLUMNS = ["model", "for", "budget", "plan s", "CPU s", "peak MB", "of it before MB", "write s", "read s", "plan MB"]
COLUMNS += ["bits", "KL"]


@dataclass(frozen=True)
class Made:
    """One plan, and what it took."""

    plan_s: float
    cpu_s: float
    peak_bytes: int  # resident, VmHWM
    before_bytes: int  # of the process with inventory and sensitivities
    write_s: float
    read_s: float
    json_bytes: int
    bits: float
    kl: float
    certificate: str

    def figures(self) -> list[object]:
        memory = (round(size / 1e6) for size in (self.peak_bytes, self.before_bytes))
        times = (round(self.write_s, 2), round(self.read_s, 2), round(self.json_bytes / 1e6, 1))
        return [round(self.plan_s, 2), round(self.cpu_s, 2), *memory, *times, self.bits, self.kl]


def measure_simulated(report: BenchmarkReport, quick: bool) -> None:
    """A row per plan, and the slowest one of each model as a criterion."""
    configs = {name: replace(c, layers=QUICK_LAYERS) if quick else c for name, c in CONFIGS.items()}
    shapes = {name: simulate(config) for name, config in configs.items()}
    counts = [[name, len(s.matrices), len(s.kept), round(s.weights / 1e9, 1)] for name, s in shapes.items()]
    report.table("simulated models", ["model", "matrices", "kept", "billion weights"], counts, key="simulated_models")
    rows, certificates = [], []
    for name, config in configs.items():
        slowest = 0.0
        for purpose, budget in product(get_args(Purpose), _budgets(shapes[name].weights, quick)):
            made = alone(config, purpose, budget)
            rows.append([name, purpose, _words(budget), *made.figures()])
            certificates.append([name, purpose, _words(budget), made.certificate])
            slowest = max(slowest, made.plan_s)
        label = name.lower().replace(" ", "_")
        report.criterion(f"most_plan_s_{label}", slowest, f"< {PLAN_GOAL_S:g}", slowest < PLAN_GOAL_S)
    report.table("plans, each made in a process of its own", COLUMNS, rows, key="simulated_plans")
    report.table("how good they are", [*COLUMNS[:3], "certificate"], certificates, key="simulated_certificates")


def _budgets(weights: int, quick: bool) -> list[Budget]:
    bits = QUICK_BITS if quick else BITS
    return [*(Budget(bits=rate) for rate in bits), Budget(size_bytes=int(SIZE_BITS * weights / 8))]


def _words(budget: Budget) -> str:
    return f"{budget.bits:g} bits" if budget.size_bytes is None else f"{budget.size_bytes / 1e9:.4g} GB"


def alone(config: Config, purpose: Purpose, budget: Budget) -> Made:
    """`make` in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(make, config, purpose, budget).result()


def make(config: Config, purpose: Purpose, budget: Budget) -> Made:
    """Make a plan, write it and read it again."""
    shapes = simulate(config)
    sensitivity = draw_sensitivity(config, shapes)
    before_bytes, cpu, start = process_memory("self")["VmRSS"], time.process_time(), time.perf_counter()
    plan = make_plan("simulated", shapes, sensitivity, budget, Request(purpose=purpose))
    plan_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    peak_bytes = process_memory("self")["VmHWM"]
    with tempfile.TemporaryDirectory() as folder:
        file, start = Path(folder) / "plan.json", time.perf_counter()
        json_bytes = file.write_text(plan.to_json(), "utf-8")
        write_s, start = time.perf_counter() - start, time.perf_counter()
        if Plan.load(file) != plan:
            raise SystemExit("a plan is not read as it was written")
        read_s = time.perf_counter() - start
    sizes = (peak_bytes, before_bytes)
    return Made(plan_s, cpu_s, *sizes, write_s, read_s, json_bytes, plan.bits, plan.predicted.kl, plan.optimal)
