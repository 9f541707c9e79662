"""`rate_distortion.py`: bytes on disk against the KL that is measured, of the example model packed and loaded.

At each rate the trellis artifact is planned, packed and loaded, then the allotted fixed-rate one of at most the same
bytes. Sensitivities are measured once, on text of the held-out text's kind.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import waterfill
from benchmarks.shared.models import Measured, divergences, measure_sensitivity, open_model, split_windows, spread
from benchmarks.shared.report import EXAMPLE_MODEL, BenchmarkReport, held_out_text
from waterfill.planning.plan import Plan

CONTEXT = 512
BITS, QUICK_BITS = (2.5, 3.0, 3.25, 4.0, 5.0), (3.0,)
BEYOND = (1.12, 1.25)  # the fixed-rate curve has to reach as low as the last trellis artifact: with so many more bytes
WINDOWS, QUICK_WINDOWS = 60, 3
PROBE, QUICK_PROBE = 64, 4
RATIO_GOAL, SAVED_GOAL, PREDICTION_GOAL = 0.70, 0.09, 0.10
COLUMNS = ["bits", "trellis bytes", "trellis KL", "stderr", "predicted / measured"]
COLUMNS += ["fixed bytes", "fixed KL", "stderr of fixed", "fixed predicted / measured", "KL ratio", "bytes saved"]


@dataclass(frozen=True)
class MeasuredArtifact:
    """One that was packed, loaded and measured."""

    plan: Plan
    size_bytes: int  # of its weight files
    measured: Measured

    @property
    def prediction(self) -> float:
        """Over the measured KL."""
        return self.plan.predicted.kl / self.measured.kl


def measure_model(report: BenchmarkReport, quick: bool) -> None:
    subject = open_model(EXAMPLE_MODEL)
    held_out, probe = split_windows(subject.tokenizer, held_out_text(report), CONTEXT)
    held_out = spread(held_out[:WINDOWS], QUICK_WINDOWS if quick else WINDOWS)
    sensitivity = measure_sensitivity(subject, "text", QUICK_PROBE if quick else PROBE, CONTEXT, probe)
    bits = QUICK_BITS if quick else BITS
    coded = [waterfill.plan(EXAMPLE_MODEL, bits=b, purpose="storage", sensitivity=sensitivity) for b in bits]
    sizes = [plan.size_bytes for plan in coded]
    sizes += [round(sizes[-1] * factor) for factor in BEYOND]
    fixed = [waterfill.plan(EXAMPLE_MODEL, size=s, purpose="memory", sensitivity=sensitivity) for s in sizes]
    with tempfile.TemporaryDirectory() as folder:
        packed = [(plan, pack(plan, Path(folder) / str(i))) for i, plan in enumerate([*coded, *fixed])]
        models = [waterfill.load(path, dtype=subject.model.dtype) for _, path in packed]
        losses = divergences(subject.model, models, held_out)
        artifacts = [
            MeasuredArtifact(plan, weight_bytes(path), loss) for (plan, path), loss in zip(packed, losses, strict=True)
        ]
    report.note(
        f"{len(held_out)} windows of {CONTEXT} tokens, packed models as they run; bytes are of the weight files"
    )
    report_model(report, bits, artifacts[: len(bits)], artifacts[len(bits) :])


def pack(plan: Plan, path: Path) -> Path:
    waterfill.pack(EXAMPLE_MODEL, path, plan=plan)
    return path


def weight_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors*"))


def report_model(
    report: BenchmarkReport, bits: Sequence[float], coded: Sequence[MeasuredArtifact], fixed: Sequence[MeasuredArtifact]
) -> None:
    rows, ratios, saved = [], [], []
    for rate, trellis, grids in zip(bits, coded, fixed, strict=False):
        ratios.append(trellis.measured.kl / grids.measured.kl)
        equal = bytes_at(fixed, trellis.measured.kl)
        saved.append(None if equal is None else 1 - trellis.size_bytes / equal)
        row = [rate, trellis.size_bytes, trellis.measured.kl, trellis.measured.stderr, trellis.prediction]
        row += [grids.size_bytes, grids.measured.kl, grids.measured.stderr, grids.prediction, ratios[-1], saved[-1]]
        rows.append(row)
    for grids in fixed[len(bits) :]:
        figures = [grids.size_bytes, grids.measured.kl, grids.measured.stderr, grids.prediction]
        rows.append([*[None] * 5, *figures, None, None])
    report.table("bytes on disk against KL, nats per token", COLUMNS, rows, key="model")
    for rate, ratio, share, trellis in zip(bits, ratios, saved, coded, strict=True):
        report.criterion(f"model_kl_over_fixed_rate_{rate:g}_bits", ratio, f"<= {RATIO_GOAL}", ratio <= RATIO_GOAL)
        name = f"model_bytes_saved_at_equal_kl_{rate:g}_bits"
        report.criterion(name, share, f">= {SAVED_GOAL}", share is not None and share >= SAVED_GOAL)
        off = abs(trellis.prediction - 1)
        report.criterion(f"model_prediction_off_{rate:g}_bits", off, f"<= {PREDICTION_GOAL}", off <= PREDICTION_GOAL)


def bytes_at(curve: Sequence[MeasuredArtifact], kl: float) -> float | None:
    """Bytes at which the curve has that KL, log KL being taken as linear in bytes between points; None outside it."""
    points = sorted((point.measured.kl, point.size_bytes) for point in curve)
    kls, sizes = np.array(points).T
    return float(np.interp(np.log(kl), np.log(kls), sizes)) if kls[0] <= kl <= kls[-1] else None
