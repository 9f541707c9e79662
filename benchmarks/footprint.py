"""Peak memory and time of `plan` and `pack`, and how fast each kind of grid encodes.

Two models: the example, and random weights in the shapes of Llama-3.2-1B (bf16, in shards of 500 MB; written to a
temporary folder, 3.5 GB with the artifact). Each step runs alone in a fresh process. Peak memory is that process's
VmHWM, which counts Python, torch and mapped file pages as well; anonymous and file pages are sampled while it runs, so
their peaks need not coincide. Linux only.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import waterfill
from benchmarks.shared.limits import process_memory
from benchmarks.shared.make_checkpoint import LLAMA_3_2_1B, TINY, make_checkpoint
from benchmarks.shared.report import EXAMPLE_MODEL, BenchmarkReport, median_spread, parse_arguments
from waterfill.codecs import get_codec
from waterfill.codecs.contract import BLOCK_WEIGHTS

BITS = 4.0
PACK_LIMIT_BYTES = 1_500_000_000
SAMPLE_S = 0.01
CODECS = ("higgs-p1-n16", "higgs-p2-n256", "higgs-p3-n4096", "higgs-p4-n4096")
MATRIX = (4096, 4096)


@dataclass(frozen=True)
class Footprint:
    """What one step took."""

    elapsed_s: float
    peak_bytes: int  # resident, VmHWM
    anonymous_bytes: int  # peak, sampled
    file_bytes: int  # peak, sampled


def main() -> None:
    arguments = parse_arguments(__doc__)
    report = BenchmarkReport("memory and time of plan and pack")
    with tempfile.TemporaryDirectory() as folder:
        shapes = TINY if arguments.quick else LLAMA_3_2_1B
        name = "tiny" if arguments.quick else "llama-3.2-1b"
        random_model = make_checkpoint(Path(folder) / name, shapes)
        rows = [["none", "import waterfill", None, *figures(measure(nothing))]]
        rows += measure_model(report, EXAMPLE_MODEL, Path(folder), {})
        # A short probe: sensitivities need a float32 copy of the model and minutes, whatever is packed afterwards.
        rows += measure_model(report, random_model, Path(folder), {"sequences": 2, "length": 64})
    columns = ["model", "step", "million weights", "time s", "peak MB", "anonymous MB", "file MB"]
    report.table(f"plan and pack at {BITS:g} bits, each in a process of its own", columns, rows, key="steps")
    measure_encoding(report, repetitions=1 if arguments.quick else 5)
    report.save(arguments.json)


def measure_model(report: BenchmarkReport, model: Path, folder: Path, probe: dict[str, int]) -> list[list[Any]]:
    """Rows of `plan` and of `pack` by that plan; the criterion on the memory of `pack`."""
    plan_file = folder / f"{model.name}.json"
    planned = measure(plan, model, plan_file, probe)
    weights = sum(tensor.weights for tensor in waterfill.Plan.load(plan_file).tensors)
    packed = measure(pack, model, folder / f"{model.name}-packed", plan_file)
    peak = packed.peak_bytes
    report.criterion(f"peak_bytes_of_pack_{model.name}", peak, f"< {PACK_LIMIT_BYTES}", peak < PACK_LIMIT_BYTES)
    probed = " ".join(f"{key}={value}" for key, value in probe.items()) or "default probe"
    steps = ((f"plan ({probed})", planned), ("pack", packed))
    return [[model.name, step, round(weights / 1e6, 1), *figures(footprint)] for step, footprint in steps]


def figures(footprint: Footprint) -> list[float]:
    sizes = (footprint.peak_bytes, footprint.anonymous_bytes, footprint.file_bytes)
    return [round(footprint.elapsed_s, 2), *(round(size / 1e6) for size in sizes)]


# The steps, as they run in a process of their own


def nothing() -> None:
    """What every process pays for its imports."""


def plan(model: Path, save: Path, probe: dict[str, Any]) -> None:
    waterfill.plan(model, bits=BITS, save=save, **probe)


def pack(model: Path, out: Path, plan_file: Path) -> None:
    waterfill.pack(model, out, plan=plan_file)


def measure(step: Callable[..., None], *arguments: Any) -> Footprint:
    """Run `step(*arguments)` in a new process, and watch its memory."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sender, step, arguments))
    process.start()
    sender.close()
    anonymous = file = 0
    while not receiver.poll(SAMPLE_S):
        status = process_memory(process.pid)
        anonymous = max(anonymous, status.get("RssAnon", 0))
        file = max(file, status.get("RssFile", 0))
    try:
        elapsed_s, peak_bytes = receiver.recv()
    except EOFError:
        raise SystemExit(f"{step.__name__} failed, see above") from None
    finally:
        process.join()
    return Footprint(elapsed_s, peak_bytes, anonymous, file)


def _run(sender: Connection, step: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    start = time.perf_counter()
    step(*arguments)
    sender.send((time.perf_counter() - start, process_memory("self")["VmHWM"]))


def measure_encoding(report: BenchmarkReport, repetitions: int) -> None:
    """Million weights per second on one matrix, in the blocks that `pack` uses."""
    weight = torch.randn(MATRIX).to(torch.bfloat16)
    blocks = weight.split(BLOCK_WEIGHTS // MATRIX[1])
    rows = []
    for name in CODECS:
        codec = get_codec(name)
        start = time.perf_counter()
        codec.encode(weight[:1])
        prepare_s = time.perf_counter() - start  # the search tables of the grid, once per process
        rates = []
        for _ in range(repetitions):
            start = time.perf_counter()
            for block in blocks:
                codec.encode(block)
            rates.append(weight.numel() / 1e6 / (time.perf_counter() - start))
        rows.append([name, prepare_s, *median_spread(rates)])
    columns = ["codec", "prepare s", "million weights / s", "±"]
    report.table(f"encoding one {MATRIX[0]} x {MATRIX[1]} matrix", columns, rows, key="encoding")


if __name__ == "__main__":
    main()
