"""What `streaming.py` runs: random checkpoints in given shapes, artifacts of them, and GGUF files, kept in a folder.

    shapes ──► checkpoint (bf16) ──► "coded": entropy-coded at 3 bits, one rate for all matrices
                                 ──► "fixed", "fast": the fewest bytes of fixed-rate grids at the same predicted loss
           ──► GGUF per type, written by `stream_peers.py`

Sensitivities are made up: every weight costs the same, so that equal loss is equal mean relative error. Whatever is
there already is used again; what is being made has another name until it is whole.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import waterfill
from benchmarks.shared.make_checkpoint import LLAMA_3_2_1B, TINY, make_checkpoint
from benchmarks.shared.report import EXAMPLE_MODEL, BenchmarkReport
from waterfill.files.architecture import describe
from waterfill.files.checkpoint import open_checkpoint
from waterfill.planning.loss import Coefficients
from waterfill.planning.plan import Plan
from waterfill.planning.sensitivity import SENSITIVITY_FILE, Sensitivity

BITS = 3.0
LLAMA_3_2_3B = LLAMA_3_2_1B | {
    "hidden_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "head_dim": 128,
}
MODELS = {"1b": LLAMA_3_2_1B, "3b": LLAMA_3_2_3B}
QUICK_MODELS = {"tiny": TINY}
# Kinds of artifacts, and what is asked of their plans.
CODED, FIXED, FAST = "coded", "fixed", "fast"
KINDS: dict[str, dict[str, Any]] = {
    CODED: {"bits": BITS, "uniform": True},
    FIXED: {"purpose": "memory"},
    FAST: {"purpose": "memory", "codecs": ("fast",)},
}
EXAMPLE_BITS, DRAFT_BITS = 3.0, 2.0
EXAMPLE_PROBE = {"sequences": 16, "length": 128}

Ask = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class StreamedArtifact:
    """One that was packed."""

    path: Path
    size_bytes: int  # of its weight files
    bits: float  # stored, per weight
    t2: float  # measured, mean over all weights


@dataclass(frozen=True)
class Store:
    """A folder of models, made when they are first asked for."""

    folder: Path
    report: BenchmarkReport

    def checkpoint(self, name: str) -> Path:
        return self._made(f"{name}-bf16", lambda path: make_checkpoint(path, shapes_of(name)))

    def artifact(self, name: str, kind: str) -> StreamedArtifact:
        def make(path: Path) -> None:
            waterfill.pack(self.checkpoint(name), path, plan=self._plan(name, kind))

        return self._opened(self._made(f"{name}-{kind}-{BITS:g}", make))

    def example(self, draft: bool = False) -> StreamedArtifact:
        """The example model as it is streamed, or as its own draft."""
        options: dict[str, Any] = {"bits": EXAMPLE_BITS, **EXAMPLE_PROBE}
        if draft:
            known = self.example().path / SENSITIVITY_FILE
            options = {"bits": DRAFT_BITS, "purpose": "memory", "codecs": ("fast",), "sensitivity": known}

        def make(path: Path) -> None:
            waterfill.pack(EXAMPLE_MODEL, path, **options)

        return self._opened(self._made(f"example-{'draft' if draft else 'streamed'}", make))

    def gguf(self, name: str, kind: str, write: Ask) -> tuple[Path, float, float]:
        """(file, bits per weight, relative error of its type); `write` answers requests as `stream_peers.py` does."""

        def make(path: Path) -> None:
            path.mkdir()
            request = {"peer": "gguf", "kind": kind, "shapes": shapes_of(name), "out": str(path / "model.gguf")}
            (path / "answer.json").write_text(json.dumps(write(request)))

        path = self._made(f"{name}-{kind}", make)
        answer = json.loads((path / "answer.json").read_text())
        return path / "model.gguf", answer["bits"], answer["t2"]

    def split(self, name: str, write: Ask) -> Path:
        """The checkpoint in a file per layer, as AirLLM keeps it."""
        request = {"peer": "airllm", "model": str(self.checkpoint(name)), "tokens": 0}
        return self._made(f"{name}-airllm", lambda path: write(request | {"folder": str(path)}))

    def _plan(self, name: str, kind: str) -> Plan:
        checkpoint, options = self.checkpoint(name), KINDS[kind]
        if kind != CODED:
            options = options | {"max_kl": self._plan(name, CODED).predicted.kl}
        return waterfill.plan(checkpoint, sensitivity=even_sensitivity(checkpoint), **options)

    def _made(self, name: str, make: Callable[[Path], Any]) -> Path:
        path = self.folder / name
        if not path.exists():
            partial = path.with_name(f"{name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            self.report.console.print(f"making {name}", style="dim", highlight=False)
            make(partial)
            os.sync()  # what is written later disturbs what is measured next
            partial.rename(path)
        return path

    def _opened(self, path: Path) -> StreamedArtifact:
        stored = waterfill.inspect(path, verify=False)
        weights = sum(tensor.weights for tensor in stored.plan.tensors)
        noise = math.fsum(tensor.weights * stored.measured_t2.get(tensor.name, 0) for tensor in stored.plan.tensors)
        return StreamedArtifact(path, stored.size_bytes, stored.plan.bits, noise / weights)


def shapes_of(name: str) -> dict[str, Any]:
    return (MODELS | QUICK_MODELS)[name]


def even_sensitivity(path: Path) -> Sensitivity:
    """Noise costs the same everywhere, along the weights and across: KL is mean relative error."""
    checkpoint = open_checkpoint(path)
    weights = {matrix.name: math.prod(matrix.shape) for matrix in describe(checkpoint).matrices}
    total = sum(weights.values())
    tensors = {name: Coefficients(count / total, count / total) for name, count in weights.items()}
    return Sensitivity(checkpoint.fingerprint, "fisher", {"kind": "even"}, 0.0, 0, tensors)
