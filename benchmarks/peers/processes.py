"""Other libraries beside the kernels: in processes of their own, asked in turn, so that no two ever run at once.

PeerProcess ──{"call": …}──► peer_worker.py FAMILY, under any interpreter ──► seconds of one pass
torch_products: torch's own, in this process
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.shared.limits import REPOSITORY, with_source
from benchmarks.shared.report import BenchmarkReport
from benchmarks.shared.rounds import own_processes
from benchmarks.shared.timing import COLD_BYTES, SETTLE_S, ColdProduct, Shape

PYTHON_VARIABLE = "WATERFILL_PEERS_PYTHON"
WORKER = "benchmarks.peers.worker"
FAMILIES = ("onnxruntime", "openvino", "ggml")
INT4_GROUP = 128


class PeerError(Exception):
    """A library is not installed, or failed; the sentence says what it said."""


class PeerProcess:
    """One library in a process of its own."""

    def __init__(self, python: str, family: str) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # for as long as the process
        self._process = subprocess.Popen(
            [python, "-m", WORKER, family],
            cwd=REPOSITORY,
            env=with_source(os.environ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            bufsize=1,
        )
        own_processes.add(self._process.pid)
        try:
            self.version: str = self._answer()
        except PeerError:
            self.close()
            raise

    def call(self, method: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None
        time.sleep(SETTLE_S)
        try:
            self._process.stdin.write(json.dumps({"call": method, "arguments": arguments}) + "\n")
        except OSError:
            raise PeerError(self._last_words()) from None
        return self._answer()

    def close(self) -> None:
        """End the process, and with it the memory it holds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        own_processes.discard(self._process.pid)
        self._process.stdin.close()
        self._process.stdout.close()
        self._errors.close()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(self._last_words())
        content = json.loads(line)
        if "error" in content:
            raise PeerError(content["error"])
        return content["result"]

    def _last_words(self) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"the process ended with status {status}" + (f": {said[-1]}" if said else "")


def peers_python(given: Path | None) -> str:
    """The interpreter that has the peers: `--peers-python`, WATERFILL_PEERS_PYTHON, or this one."""
    return str(given or os.environ.get(PYTHON_VARIABLE) or sys.executable)


@contextmanager
def open_peers(report: BenchmarkReport, python: str, families: Sequence[str]) -> Iterator[list[PeerProcess]]:
    """The libraries that are there; a note names versions, and what is left out."""
    with ExitStack() as stack:
        found = []
        for family in families:
            try:
                peer = PeerProcess(python, family)
            except PeerError as error:
                report.note(f"{family} is left out: {error}")
                continue
            stack.callback(peer.close)
            report.note(f"{family}: {peer.version}")
            found.append(peer)
        yield found


@dataclass(frozen=True)
class PeerProduct:
    """A product in another process; all of its weights are multiplied by one call."""

    name: str
    weights: int
    size_bytes: int
    process: PeerProcess

    def seconds(self) -> float:
        return float(self.process.call("seconds", name=self.name))


def peer_products(
    report: BenchmarkReport,
    processes: Sequence[PeerProcess],
    shape: Shape,
    cold_bytes: int = COLD_BYTES,
    wanted: Sequence[str] | None = None,
) -> list[PeerProduct]:
    """Every product that the processes offer, or those of certain names, made ready."""
    products = []
    sizes = {"rows": shape[0], "width": shape[1], "cold_bytes": cold_bytes, "threads": torch.get_num_threads()}
    variants = []
    for process in processes:
        process.call("drop")
        for name in process.call("names"):
            if wanted is not None and name not in wanted:
                continue
            try:
                made = process.call("prepare", name=name, **sizes)
            except PeerError as error:
                report.note(f"{name} is left out: {error}")
                continue
            variants.append(f"{name} {made.pop('variant')}")
            products.append(PeerProduct(name, **made, process=process))
    if variants:
        report.note(f"the fastest variant of each, by a trial: {', '.join(variants)}")
    return products


def torch_products(shape: Shape, cold_bytes: int = COLD_BYTES, tokens: int = 1) -> list[ColdProduct]:
    """Dense float32 and bfloat16, and torch's 4-bit kernel."""
    dense = [torch_dense(shape, dtype, cold_bytes, tokens) for dtype in (torch.float32, torch.bfloat16)]
    return [*dense, torch_int4(shape, cold_bytes, tokens)]


def torch_dense(shape: Shape, dtype: torch.dtype, cold_bytes: int, tokens: int) -> ColdProduct:
    count = -(-cold_bytes // (shape[0] * shape[1] * dtype.itemsize))
    weights = torch.randn(shape[0], shape[1]).to(dtype).repeat(count, 1, 1)
    x = torch.randn(tokens, shape[1], dtype=dtype)
    name = f"torch {str(dtype).removeprefix('torch.')}"
    return ColdProduct(name, weights.numel(), weights.nbytes, [partial(F.linear, x, weight) for weight in weights])


def torch_int4(shape: Shape, cold_bytes: int, tokens: int) -> ColdProduct:
    """aten's 4-bit product of bfloat16 activations, groups of 128."""
    rows, width = shape
    levels = torch.randint(0, 16, (rows, width), dtype=torch.int32)
    codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)
    scales = torch.full((width // INT4_GROUP, rows, 2), 0.01, dtype=torch.bfloat16)  # and zeros
    size_bytes = codes.nbytes + scales.nbytes
    count = -(-cold_bytes // size_bytes)
    x = torch.randn(tokens, width, dtype=torch.bfloat16)
    product = torch.ops.aten._weight_int4pack_mm_for_cpu.default
    calls = [partial(product, x, codes.clone(), INT4_GROUP, scales.clone()) for _ in range(count)]
    return ColdProduct("torch int4", rows * width * count, size_bytes * count, calls)


def torch_int8(shape: Shape, cold_bytes: int, tokens: int) -> ColdProduct:
    """torch's dynamically quantised linear layer."""
    from torch.ao.nn.quantized.dynamic import Linear

    rows, width = shape
    count = -(-cold_bytes // (rows * width))
    with warnings.catch_warnings(action="ignore"):  # torch means to drop it some day
        weight = torch.quantize_per_tensor(torch.randn(rows, width) * 0.02, 0.001, 0, torch.qint8)
    layers = []
    for _ in range(count):
        layer = Linear(width, rows, bias_=False)
        layer.set_weight_bias(weight, None)
        layers.append(layer)
    x = torch.randn(tokens, width)
    return ColdProduct(
        "torch int8 dynamic", rows * width * count, rows * width * count, [partial(layer, x) for layer in layers]
    )
