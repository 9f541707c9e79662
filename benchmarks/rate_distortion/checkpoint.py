"""`rate_distortion.py`: time and peak memory of packing and loading a whole checkpoint, each in a fresh process.

Random weights in the shapes of Llama-3.2-1B, one plan to store (entropy-coded) and one to run from (fixed rate), at the
same bits and from the same sensitivities.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

import waterfill
from benchmarks.footprint import Footprint, figures, measure, nothing
from benchmarks.shared.make_checkpoint import LLAMA_3_2_1B, TINY, make_checkpoint
from benchmarks.shared.report import BenchmarkReport

BITS = 4.0
PURPOSES = ("storage", "memory")
PROBE = {"sequences": 2, "length": 64}  # sensitivities do not matter here
QUICK_PROBE = {"sequences": 2, "length": 16}
# A twentieth of TINY: most of the time of a quick run is what processes take to start.
QUICK_SHAPES = TINY | {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}


def measure_checkpoint(report: BenchmarkReport, quick: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        model = make_checkpoint(home / "model", QUICK_SHAPES if quick else LLAMA_3_2_1B)
        plans = {purpose: home / f"{purpose}.json" for purpose in PURPOSES}
        measured = measure(plan, model, plans, QUICK_PROBE if quick else PROBE)
        rows = [row(None, "import waterfill", None, measure(nothing)), row(None, "plan", None, measured)]
        for purpose, file in list(plans.items())[: 1 if quick else None]:
            out = home / purpose
            packed = measure(pack, model, out, file)
            size_bytes = sum(shard.stat().st_size for shard in out.glob("*.safetensors"))
            rows.append(row(purpose, "pack", size_bytes, packed))
            rows.append(row(purpose, "load", size_bytes, measure(load, out)))
    columns = ["purpose", "step", "artifact MB", "time s", "peak MB", "anonymous MB", "file MB"]
    name = "tiny, not Llama-3.2-1B" if quick else "Llama-3.2-1B"
    title = f"{name}: random weights at {BITS:g} bits, {torch.get_num_threads()} threads, each step in its own process"
    report.table(title, columns, rows, key="checkpoint")


def row(purpose: str | None, step: str, size_bytes: int | None, footprint: Footprint) -> list[Any]:
    return [purpose, step, None if size_bytes is None else round(size_bytes / 1e6), *figures(footprint)]


# The steps, as they run in a process of their own


def plan(model: Path, files: dict[str, Path], probe: dict[str, int]) -> None:
    first, second = PURPOSES
    waterfill.plan(model, bits=BITS, purpose=first, save=files[first], **probe)
    known = files[first].with_suffix(".sensitivity.json")
    waterfill.plan(model, bits=BITS, purpose=second, save=files[second], sensitivity=known)


def pack(model: Path, out: Path, plan_file: Path) -> None:
    waterfill.pack(model, out, plan=plan_file)


def load(artifact: Path) -> None:
    waterfill.load(artifact)
