"""What the kernels' integers cost: KL from the original model with integer and with exact activations and points."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import waterfill
from benchmarks.shared.models import measure_sensitivity, open_model, split_windows
from benchmarks.shared.report import EXAMPLE_MODEL, BenchmarkReport, held_out_text
from waterfill.base.native import FLOAT_ACTIVATIONS
from waterfill.evaluation import divergence

CONTEXT = 512
CODECS = ("higgs-p2-n16", "higgs-p2-n64", "higgs-p1-n16", "higgs-p2-n256")
ALLOTTED_BITS = (2.0, 3.0, 4.0)
GOAL = 0.02  # relative change of KL


def measure_accuracy(report: BenchmarkReport, *, quick: bool) -> None:
    """The example model with one codec for all matrices, and with bits allotted."""
    windows, codecs = (2, CODECS[::3]) if quick else (24, CODECS)
    subject = open_model(EXAMPLE_MODEL)
    held_out, probe = split_windows(subject.tokenizer, held_out_text(report), CONTEXT)
    ids = held_out[:windows].flatten()
    sensitivity = measure_sensitivity(subject, "text", 2 if quick else 16, CONTEXT, probe)
    plans = {codec: {"bits": 16.0, "uniform": True, "codecs": (codec,)} for codec in codecs}
    if not quick:
        plans |= {f"allotted, {bits:g} bits": {"bits": bits} for bits in ALLOTTED_BITS}
    rows = []
    for name, options in plans.items():
        with tempfile.TemporaryDirectory() as folder:
            waterfill.pack(EXAMPLE_MODEL, Path(folder) / "packed", sensitivity=sensitivity, **options)
            model = waterfill.load(Path(folder) / "packed", dtype=torch.float32)
        kl = {}
        for kind in ("integer", "float"):
            with activations(kind):
                kl[kind] = divergence(subject.model, model, ids, context=CONTEXT)
        change = kl["integer"].kl / kl["float"].kl - 1
        rows.append([name, kl["float"].kl, kl["float"].kl_stderr, kl["integer"].kl, change])
        label = name.replace(", ", "_").replace(" ", "_")
        report.criterion(f"kl_change_by_integers_{label}", change, f"|x| < {GOAL}", abs(change) < GOAL)
    columns = ["codecs", "KL, exact", "stderr", "KL, integers", "relative change"]
    report.table(f"integer activations, {windows} windows of {CONTEXT} tokens", columns, rows, key="accuracy")


@contextmanager
def activations(kind: str) -> Iterator[None]:
    """Calls of the kernels meanwhile keep activations as floats, or make integers of them."""
    before = os.environ.get(FLOAT_ACTIVATIONS)
    os.environ[FLOAT_ACTIVATIONS] = kind
    try:
        yield
    finally:
        if before is None:
            del os.environ[FLOAT_ACTIVATIONS]
        else:
            os.environ[FLOAT_ACTIVATIONS] = before
