"""What a token loses by how many come before it, and how sequences differ: why a probe's sequences are as they are.

own text of 512 tokens ──► KL of a packed model, token by token ──► mean by place, and over what shorter ones see
                       └─► alpha of each sequence ──► predicted KL beside that measured on the same sequence
"""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

import waterfill
from benchmarks.shared.report import BenchmarkReport
from waterfill.files.architecture import describe
from waterfill.files.checkpoint import open_checkpoint
from waterfill.files.model_calls import read
from waterfill.files.original import load_checkpoint
from waterfill.planning.loss import Coefficients
from waterfill.planning.measuring import measured_tokens
from waterfill.planning.menu import planned_kl
from waterfill.planning.options import ProbeOptions
from waterfill.planning.probe import lead_of
from waterfill.studies.own_text import OwnText

BITS = 4.0
LENGTH, SEQUENCES, QUICK_SEQUENCES = 512, 16, 4
PLACES = (0, 16, 64, 128, 256, 384, 511)
LENGTHS = (96, 128, 160, 192, 256, 384, 512)


def measure_positions(report: BenchmarkReport, models: list[Path], quick: bool) -> None:
    """Tables of each checkpoint, and how well predictions follow from sequence to sequence."""
    places, lengths = [], []
    for model in models:
        kl, predicted = _losses(model, QUICK_SEQUENCES if quick else SEQUENCES)
        whole = kl.mean()
        for first, last in pairwise(PLACES):
            places.append([model.name, f"{first} to {last - 1}", round(float(kl[:, first:last].mean() / whole), 3)])
        for length in LENGTHS:
            for lead in (0, lead_of(length)):
                seen = kl[:, lead : length - 1].mean(1)
                spread = float(seen.std(ddof=1) / seen.mean())
                lengths.append([model.name, length, lead, round(float(seen.mean() / whole), 3), round(spread, 3)])
        correlation = float(np.corrcoef(kl.mean(1), predicted)[0, 1])
        report.criterion(f"{model.name}_correlation_by_sequence", round(correlation, 3), "> 0", correlation > 0)
    report.table("KL by place in the sequence", ["checkpoint", "tokens", "over the mean"], places, key="places")
    columns = ["checkpoint", "length", "of it context", "mean over that of 512", "spread between sequences"]
    report.table("what a probe's sequence sees", columns, lengths, key="lengths")


def _losses(model: Path, sequences: int) -> tuple[Any, Any]:
    """KL of a packed model on own text, `[sequences, 511]`; and what each sequence alone predicts, `[sequences]`."""
    checkpoint = open_checkpoint(model)
    architecture = describe(checkpoint)
    options: ProbeOptions = {"sequences": sequences, "length": LENGTH}
    measured = waterfill.sensitivity(model, **options)
    with OwnText(checkpoint, architecture) as own:
        tokens = measured_tokens(checkpoint, architecture, None, options, write=own.sample)
    plan = waterfill.plan(model, bits=BITS, sensitivity=measured)
    original, rows = load_checkpoint(checkpoint), []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        waterfill.pack(model, Path(folder) / "packed", plan=plan)
        packed = waterfill.load(Path(folder) / "packed", dtype=original.dtype)
        for sequence in tokens:
            p, q = (read(m, sequence[None])[0, :-1].float().log_softmax(-1) for m in (original, packed))
            rows.append((p.exp() * (p - q)).sum(-1).numpy())
    assert measured.samples is not None
    predicted = [
        sum(
            planned_kl(t, Coefficients(measured.samples[t.name].alpha[k], measured.samples[t.name].beta[k]), t.rho)
            for t in plan.tensors
        )
        for k in range(sequences)
    ]
    return np.array(rows), np.array(predicted)
