"""The fast estimator of sensitivities against the one that it replaces, on the same inputs.

`fisher` (a backward pass gives every α and β) and `perturb` (the HIGGS paper's: one matrix at a time, four noise
levels, a line through the origin) are run in turn on parts of one text. Reported: how well their α and β agree, the
ratio of their times, and for β a check that needs no second estimator: scaling q by 1 + ε is scaling k by 1 + ε.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from benchmarks.shared.models import OpenedModel, open_model, split_windows, spread
from benchmarks.shared.report import EXAMPLE_MODEL, BenchmarkReport, held_out_text, parse_arguments
from waterfill.planning.loss import Coefficients
from waterfill.planning.sensitivity import Method, measure

PART = 2  # sequences per run; a standard error needs two


@dataclass(frozen=True)
class ProbeRun:
    """One estimator on one part of the probe."""

    tensors: dict[str, Coefficients]
    elapsed_s: float


def main() -> None:
    arguments = parse_arguments(__doc__)
    context, parts = (128, 2) if arguments.quick else (512, 4)
    report = BenchmarkReport("sensitivities: fisher against perturb")
    subject = open_model(EXAMPLE_MODEL)
    _, probe = split_windows(subject.tokenizer, held_out_text(report), context)
    tokens = spread(probe, PART * parts).split(PART)
    runs: dict[Method, list[ProbeRun]] = {"fisher": [], "perturb": []}
    for seed, part in enumerate(tokens):  # interleaved, so that a busy machine slows both
        for method, done in runs.items():
            done.append(run(subject, part, method, seed))
    report.note(f"{len(tokens)} runs of {PART} sequences of {context} tokens with each estimator")
    report_agreement(report, runs["fisher"], runs["perturb"])
    report_shared_scales(report, average(runs["fisher"], "beta"))
    ratio = statistics.median(
        slow.elapsed_s / fast.elapsed_s for fast, slow in zip(runs["fisher"], runs["perturb"], strict=True)
    )
    report.criterion("perturb_time_over_fisher_time", ratio, ">= 10", ratio >= 10)
    report.save(arguments.json)


def run(subject: OpenedModel, tokens: Tensor, method: Method, seed: int) -> ProbeRun:
    start = time.perf_counter()
    found = measure(subject.model, subject.architecture.matrices, tokens, method=method, seed=seed)
    return ProbeRun(dict(found.tensors), time.perf_counter() - start)


def average(runs: Sequence[ProbeRun], coefficient: str) -> dict[str, float]:
    """α or β of every matrix, averaged over runs."""
    return {name: statistics.fmean(getattr(run.tensors[name], coefficient) for run in runs) for name in runs[0].tensors}


def report_agreement(report: BenchmarkReport, fisher: Sequence[ProbeRun], perturb: Sequence[ProbeRun]) -> None:
    columns = {(c, m): average(runs, c) for c in ("alpha", "beta") for m, runs in (("f", fisher), ("p", perturb))}
    names = list(columns["alpha", "f"])
    rows = [[name, *(columns[c, m][name] for c in ("alpha", "beta") for m in ("f", "p"))] for name in names]
    report.table("α and β", ["matrix", "α fisher", "α perturb", "β fisher", "β perturb"], rows, key="coefficients")
    for coefficient in ("alpha", "beta"):
        fast, slow = (np.array([columns[coefficient, m][name] for name in names]) for m in ("f", "p"))
        correlation, median = log_correlation(fast, slow), float(np.median(fast / slow))
        report.results[f"agreement_{coefficient}"] = {"log_correlation": correlation, "median_ratio": median}
        if coefficient == "alpha":
            report.criterion("log_correlation_alpha", correlation, ">= 0.99", correlation >= 0.99)
            report.criterion("median_ratio_alpha", median, "0.9 to 1.1", 0.9 <= median <= 1.1)
        else:
            report.note(f"beta: correlation of logarithms {correlation:.4f}, median ratio {median:.3f}")


def log_correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(np.log(a), np.log(b))[0, 1])


def report_shared_scales(report: BenchmarkReport, beta: dict[str, float]) -> None:
    """Scores depend on the product of q and k only, so each layer's two must have the same β."""
    pairs = [(beta[name], beta[name.replace("q_proj", "k_proj")]) for name in beta if name.endswith("q_proj")]
    worst = max(abs(q / k - 1) for q, k in pairs)
    report.results["beta_q_over_k_worst_deviation"] = worst
    report.note(f"beta of q over beta of k: within {worst:.2g} of 1 in every layer")


if __name__ == "__main__":
    main()
