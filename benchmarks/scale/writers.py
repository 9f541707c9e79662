"""Own text from codes of a model beside own text from the original: what it takes, and what is measured on it.

codes, by the engine ──────────┬──► sequences ──► sensitivities, a plan, its trial ──► predicted KL
the original, by transformers ─┘                                 └──► what the other's plan loses by them
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.shared.report import BenchmarkReport
from waterfill.files.architecture import Architecture, describe
from waterfill.files.checkpoint import Checkpoint, open_checkpoint
from waterfill.planning.ancestral import Writer
from waterfill.planning.budget import Budget
from waterfill.planning.disturbance import Disturbance
from waterfill.planning.measuring import measure_checkpoint, measured_tokens
from waterfill.planning.options import ProbeOptions
from waterfill.planning.plan import Plan
from waterfill.planning.planner import make_plan
from waterfill.planning.sensitivity import Sensitivity
from waterfill.studies.own_text import OwnText

BITS = 4.0
SEQUENCES, QUICK_SEQUENCES = 24, 8


@dataclass(frozen=True)
class _Subject:
    checkpoint: Checkpoint
    architecture: Architecture
    options: ProbeOptions

    def plan(self, measured: Sensitivity) -> Plan:
        """By what was measured."""
        return make_plan("", self.architecture, measured, Budget(bits=BITS))

    def noise(self, measured: Sensitivity) -> Disturbance:
        """Of that plan."""
        return Disturbance.of(self.plan(measured).tensors)

    def measured_on(self, write: Writer | None) -> tuple[float, Sensitivity]:
        """Seconds that writing took, and what was measured on the text."""
        start_s = time.perf_counter()
        tokens = measured_tokens(self.checkpoint, self.architecture, None, self.options, write=write)
        seconds = time.perf_counter() - start_s

        def written(numbers: Any, *_: Any, **__: Any) -> torch.Tensor:
            """The same again."""
            return tokens[list(numbers)]

        return seconds, measure_checkpoint(
            self.checkpoint, self.architecture, None, self.options, write=written, planned=self.noise
        )


def measure_writers(report: BenchmarkReport, models: list[Path], quick: bool) -> None:
    """A row for each of them, by checkpoint."""
    rows = []
    for model in models:
        checkpoint = open_checkpoint(model)
        options: ProbeOptions = {"sequences": QUICK_SEQUENCES if quick else SEQUENCES, "cache": False}
        subject = _Subject(checkpoint, describe(checkpoint), options)
        with OwnText(checkpoint, subject.architecture) as text:
            found = {"codes": subject.measured_on(text.sample), "the original": subject.measured_on(None)}
        for name, (seconds, measured) in found.items():
            other = next(one for key, (_, one) in found.items() if key != name)
            excess = subject.noise(other).predicted(measured) / subject.noise(measured).predicted(measured) - 1
            predicted = subject.plan(measured).predicted
            share = f"{predicted.sampling_error / predicted.kl:.1%}"
            figures = round(measured.nll, 3), round(predicted.kl, 5), share, round(100 * excess, 2)
            rows.append([model.name, name, round(seconds, 1), *figures])
    columns = ["checkpoint", "own text from", "s to write", "nll", "predicted KL", "±", "excess loss by the other's %"]
    report.table(f"own text, {BITS:g} bits", columns, rows, key="writers")
