"""A checkpoint that is larger than the memory it is measured in: random weights of Llama-3.1-8B's shapes.

shapes ──► bfloat16 weights on disk, 16 GB ──► waterfill plan in 4 GB: seconds a sequence, peak memory
                                           └─► the same, killed after a sequence, and begun again: the same plan
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from benchmarks.shared.processes import take
from benchmarks.shared.report import BenchmarkReport
from waterfill.base.cache import VARIABLE
from waterfill.planning.plan import Plan

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
QUICK_LAYERS = 2
SHARD_WEIGHTS = 1 << 30
POOL = 1 << 24  # normal numbers, of which every tensor takes those from some place on
SEQUENCES, LENGTH = 4, 128
GOAL_BYTES = 4e9
POLL_S = 0.5


def measure_large(report: BenchmarkReport, quick: bool) -> None:
    """Measured at a time, and in two: the plan is the same."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        weights = _write(model, QUICK_LAYERS if quick else CONFIG["num_hidden_layers"])
        whole, seconds, peak = _plan(model, Path(folder) / "whole")
        stored = _killed(model, Path(folder) / "two")
        resumed, rest_s, _ = _plan(model, Path(folder) / "two")
    report.criterion("large_peak_bytes", peak, f"<= {GOAL_BYTES:g}", peak <= GOAL_BYTES)
    report.criterion("large_same_when_resumed", whole == resumed, "== True", whole == resumed)
    columns = ["billion weights", "GB", "sequences", "tokens each", "s", "s a sequence", "peak MB"]
    columns += ["passes before it was killed", "s of the rest"]
    row = [round(weights / 1e9, 2), round(2 * weights / 1e9, 1), SEQUENCES, LENGTH, round(seconds, 1)]
    row += [round(seconds / SEQUENCES, 1), round(peak / 1e6), stored, round(rest_s, 1)]
    report.table("larger than memory", columns, [row], key="large")


def _write(path: Path, layers: int) -> int:
    """A checkpoint of random weights; returns how many."""
    path.mkdir()
    config = {**CONFIG, "num_hidden_layers": layers}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0))
    index: dict[str, str] = {}
    for number, names in enumerate(_shards(shapes)):
        file = f"model-{number:05d}.safetensors"
        tensors = {name: _random(shapes[name], pool, len(index) + i) for i, name in enumerate(names)}
        save_file(tensors, path / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    record = {"metadata": {"total_size": 2 * sum(sizes.values())}, "weight_map": index}
    (path / "model.safetensors.index.json").write_text(json.dumps(record), encoding="utf-8")
    return sum(sizes.values())


def _shards(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    names: list[str] = []
    for name in shapes:
        if names and sum(math.prod(shapes[other]) for other in [*names, name]) > SHARD_WEIGHTS:
            yield names
            names = []
        names.append(name)
    yield names


def _random(shape: tuple[int, ...], pool: torch.Tensor, seed: int) -> torch.Tensor:
    """bfloat16; each row from a place of its own, as many as there are."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    scaled = (pool * shape[1] ** -0.5).to(torch.bfloat16)
    starts = torch.from_numpy(np.random.default_rng(seed).integers(POOL - shape[1], size=shape[0]))
    return scaled.as_strided((POOL - shape[1], shape[1]), (1, 1))[starts]


def _command(model: Path, cache: Path) -> tuple[list[str], dict[str, str], Path]:
    saved = cache / "plan.json"
    cache.mkdir(exist_ok=True)
    options = ["--bits", "4", "--probe", "random", "--sequences", str(SEQUENCES), "--length", str(LENGTH)]
    command = [sys.executable, "-m", "waterfill", "plan", str(model), *options, "--save", str(saved)]
    return command, {**os.environ, VARIABLE: str(cache)}, saved


def _plan(model: Path, cache: Path) -> tuple[Plan, float, int]:
    """The plan, seconds, and peak memory in bytes."""
    command, environment, saved = _command(model, cache)
    taken = take(command, environment)
    return Plan.load(saved), taken.seconds, taken.peak_bytes


def _killed(model: Path, cache: Path) -> int:
    """Begun, and killed as soon as something is kept; returns how many passes are."""
    command, environment, _ = _command(model, cache)
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    kept: list[Any] = []
    while not kept and process.poll() is None:
        time.sleep(POLL_S)
        kept = list(cache.glob("probes/*/passes-*/*.json"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    return len(kept)
