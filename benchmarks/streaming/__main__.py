"""Models that do not fit in memory: time per token of streamed weights, under limits enforced from outside.

    start        what a process takes before weights do
    stages       time per token against the slowest of reading, decoding and computing, each alone; peak memory
    coded        entropy-coded against fixed-rate weights of equal predicted loss
    peers        accelerate's disk offload, AirLLM and llama.cpp under the same limits
    speculation  tokens guessed from the prompt, or by a draft, and verified in one pass over the weights
    faults       damaged files, failing reads, interruptions

Random weights in the shapes of Llama-3.2-1B and of a 3B model at 3 bits, in memory for a third of the artifact (or the
least that is enough). Storage is the device's own, and slowed down to 0.5 and 0.2 GB/s; page caches are cold. Models
are made once and kept in --folder, on a disk: 25 GB and an hour or more for all of them. Limits are control groups',
which takes root; without them the report says so. Speeds want an idle machine.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.peers.processes import peers_python
from benchmarks.shared.limits import LimitError
from benchmarks.shared.report import BenchmarkReport, median_spread, parse_arguments
from benchmarks.streaming.faults import measure_faults
from benchmarks.streaming.models import CODED, FAST, FIXED, KINDS, MODELS, QUICK_MODELS, Store, StreamedArtifact
from benchmarks.streaming.runs import RATES, StreamingBench, WorkerRun, key
from benchmarks.streaming.speculation import measure_speculation
from benchmarks.streaming.start import measure_start
from waterfill.planning.budget import parse_size

TOKENS = 8
PEER_TOKENS, QUICK_PEER_TOKENS = 3, 1
ROUNDS = 2  # of processes; one in a quick run
CODED_ROUNDS, DEVICE_ROUNDS = 3, 7  # a device's own speed drifts
STAGES_GOAL, CODED_GOAL, ACCELERATE_GOAL, LLAMA_CPP_GOAL = 1.15, 1.08, 5.0, 1.3
STAGES = ("read_s", "decode_s", "compute_s")
QUICK_KINDS = (CODED, FIXED)
GGUF_TYPES = ("Q2_K", "Q3_K", "Q4_0")
COMPARABLE = ("Q3_K", "Q4_0")  # the nearest types with more error than 3 bits entropy-coded, and with less
# Peers that make float weights do not end in less, twice the embeddings and more: they read pages again and again.
LEAST_DENSE_MEMORY = {"tiny": 440_000_000, "1b": 1_600_000_000, "3b": 2_400_000_000}
OTHER_MODES = ("none", "direct_io")  # of llama.cpp, beside mapping


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # control groups are removed on the way out
    folder = Path(os.environ.get("WATERFILL_CACHE") or tempfile.gettempdir()) / "waterfill-streaming"
    arguments = parse_arguments(
        __doc__,
        only={"choices": list(SECTIONS), "nargs": "+", "metavar": "NAME", "help": f"of {', '.join(SECTIONS)}"},
        folder={"type": Path, "default": folder, "help": "where models are kept, on the disk that is measured"},
        models={"choices": list(MODELS), "nargs": "+", "default": list(MODELS), "help": "of 1b, 3b; not with --quick"},
        storage={
            "choices": list(RATES),
            "nargs": "+",
            "default": list(RATES),
            "help": "speeds; the slowest with --quick",
        },
        memory={"default": None, "metavar": "SIZE", "help": "limit; `none` loads all of an artifact, to try it out"},
        peers_python={"type": Path, "default": None, "metavar": "PATH", "help": "interpreter that has the peers"},
    )
    report = BenchmarkReport("models larger than memory")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    memory = arguments.memory if arguments.memory in (None, "none") else parse_size(arguments.memory)
    store = Store(arguments.folder, report)
    bench = StreamingBench(
        report, store, arguments.quick, peers_python(arguments.peers_python), arguments.storage, memory
    )
    names = list(QUICK_MODELS) if arguments.quick else arguments.models
    for section, measure in SECTIONS.items():
        if section in (arguments.only or SECTIONS):
            measure(bench, names)
    report.save(arguments.json)


def megabytes(size_bytes: int | None) -> float | None:
    return None if size_bytes is None else round(size_bytes / 1e6)


# ----------------------------------------------------------------------------------------------------------------------
# Stages


def measure_stages(bench: StreamingBench, names: list[str]) -> None:
    rows: list[list[Any]] = []
    for name in names:
        artifact = bench.store.artifact(name, CODED)
        memory = bench.limit(artifact)
        runs: list[WorkerRun] = []
        failures = 0
        for storage, rate in bench.rates().items():
            try:
                some = [
                    bench.ours(artifact, rate, TOKENS, memory, stages=True) for _ in range(1 if bench.quick else ROUNDS)
                ]
            except LimitError as error:
                bench.report.note(f"{name}, {storage}: {error}")
                failures += 1
                continue
            runs += some
            rows.append([name, storage, *stage_figures(bench, key(name, storage), some)])
        if memory is not None:
            report_memory(bench, name, memory, runs, failures)
    columns = ["model", "storage", "tokens/s", "ms/token", "±", *(f"{stage.removesuffix('_s')} ms" for stage in STAGES)]
    columns += ["over the slowest", "± of it", "limiting", "kept MB", "peak MB", "group MB", "limit MB"]
    bench.report.table("time per token, and of each stage alone", columns, rows, key="stages")


def stage_figures(bench: StreamingBench, name: str, runs: list[WorkerRun]) -> list[Any]:
    """A row; the criterion on the time that overlapping leaves."""
    token_s, spread_s = median_spread([run.token_s for run in runs])
    head = [1 / token_s, 1e3 * token_s, 1e3 * spread_s]
    last = runs[-1]
    summary = last.answer["summary"] or {}
    peaks = [megabytes(max(run.peak_bytes for run in runs)), megabytes(last.peaks.group), megabytes(last.memory_bytes)]
    if any(run.answer["stages"] is None for run in runs):
        return [*head, *[None] * 7, *peaks]
    stages = [median_spread([1e3 * run.answer["stages"][stage] for run in runs])[0] for stage in STAGES]
    ratio, spread = median_spread([run.token_s / max(run.answer["stages"][stage] for stage in STAGES) for run in runs])
    holds = ratio <= STAGES_GOAL
    bench.report.criterion(f"time_over_slowest_stage_{name}", ratio, f"<= {STAGES_GOAL}", holds)
    return [*head, *stages, ratio, spread, summary.get("limiting"), megabytes(summary.get("kept_bytes")), *peaks]


def report_memory(bench: StreamingBench, name: str, memory: int, runs: list[WorkerRun], failures: int) -> None:
    peak = max((run.peak_bytes for run in runs), default=None)
    bench.report.criterion(
        f"peak_resident_bytes_{name}", peak, f"<= {memory}", peak is not None and peak <= memory and not failures
    )


# ----------------------------------------------------------------------------------------------------------------------
# Entropy-coded beside fixed rates


def measure_coded(bench: StreamingBench, names: list[str]) -> None:
    rows: list[list[Any]] = []
    for name in names:
        artifacts = {kind: bench.store.artifact(name, kind) for kind in (QUICK_KINDS if bench.quick else KINDS)}
        memory = bench.limit(*artifacts.values())
        for storage, rate in bench.rates().items():
            try:
                count = 1 if bench.quick else CODED_ROUNDS if rate else DEVICE_ROUNDS
                rounds = [coded_round(bench, artifacts, rate, memory) for _ in range(count)]
            except LimitError as error:
                bench.report.note(f"{name}, {storage}: {error}")
                continue
            for kind, artifact in artifacts.items():
                token_s, spread_s = median_spread([run.token_s for some in rounds for run in [some[kind]]])
                ratio = median_spread([some[kind].token_s / some[CODED].token_s for some in rounds])[0]
                size = [artifact.bits, artifact.t2, artifact.size_bytes / 1e6]
                peak = megabytes(max(some[kind].peak_bytes for some in rounds))
                rows.append([name, storage, kind, *size, 1e3 * token_s, 1e3 * spread_s, ratio, peak])
            coded_criterion(bench, name, storage, rounds)
    columns = ["model", "storage", "weights", "bits", "t²", "MB", "ms/token", "±", "times the coded ones'", "peak MB"]
    bench.report.table("weights of equal predicted loss", columns, rows, key="coded")


def coded_round(
    bench: StreamingBench, artifacts: dict[str, StreamedArtifact], rate: float | None, memory: int | None
) -> dict[str, WorkerRun]:
    return {kind: bench.ours(artifact, rate, TOKENS, memory) for kind, artifact in artifacts.items()}


def coded_criterion(bench: StreamingBench, name: str, storage: str, rounds: list[dict[str, WorkerRun]]) -> None:
    """Against the faster of the fixed-rate artifacts. On a fast device equality is enough, within the spread."""
    kinds = [kind for kind in rounds[0] if kind != CODED]
    ratio, spread = min(median_spread([some[kind].token_s / some[CODED].token_s for some in rounds]) for kind in kinds)
    if storage == "device":
        goal, holds = f">= 1 - {spread:.2g}, the spread", ratio >= 1 - spread
    else:
        goal, holds = f">= {CODED_GOAL}", ratio >= CODED_GOAL
    bench.report.criterion(key("coded_over_fixed", name, storage), ratio, goal, holds)


# ----------------------------------------------------------------------------------------------------------------------
# Peers


def measure_peers(bench: StreamingBench, names: list[str]) -> None:
    rows: list[list[Any]] = []
    for name in names:
        artifacts = {kind: bench.store.artifact(name, kind) for kind in ((CODED,) if bench.quick else (CODED, FAST))}
        memory = bench.limit(artifacts[CODED])
        peers = peer_requests(bench, name)
        for storage, rate in bench.rates().items():
            try:
                runs = {kind: bench.ours(artifacts[kind], rate, TOKENS, memory) for kind in artifacts}
            except LimitError as error:
                bench.report.note(f"{name}, {storage}: {error}")
                continue
            fastest, ours = min(runs.items(), key=lambda item: item[1].token_s)
            for kind, run in runs.items():
                artifact = artifacts[kind]
                rows.append([name, storage, f"waterfill {kind}", artifact.bits, artifact.t2, *peer_figures(run, ours)])
            for peer, (request, bits, t2) in peers.items():
                if rate is not None and request.get("mode") in OTHER_MODES:
                    continue  # whole in memory: nothing is read for a token
                try:
                    run = bench.peer(request, rate, QUICK_PEER_TOKENS if bench.quick else PEER_TOKENS, memory)
                except LimitError as error:
                    bench.report.note(f"{peer}, {name}, {storage}: {error}")
                    continue
                against, more = ours, memory is not None and run.memory_bytes > memory
                if (more or rate is None) and not bench.quick:
                    # ours under the same limit, and within a minute: a device's own speed drifts
                    kind, why = (CODED, "as much memory") if more else (fastest, "once more")
                    artifact, against = artifacts[kind], bench.ours(artifacts[kind], rate, TOKENS, run.memory_bytes)
                    who = f"waterfill {kind}, {why}"
                    rows.append([name, storage, who, artifact.bits, artifact.t2, *peer_figures(against, ours)])
                rows.append([name, storage, peer, bits, t2, *peer_figures(run, ours)])
                peer_criterion(bench, peer, name, storage, run.token_s / against.token_s)
    columns = ["model", "storage", "who", "bits", "t²", "s/token", "±", "times our faster", "s/prompt", "peak MB"]
    columns += ["of it anonymous", "limit MB"]
    bench.report.table("under the same limits, more memory where a peer was killed", columns, rows, key="peers")


def peer_requests(bench: StreamingBench, name: str) -> dict[str, tuple[dict[str, Any], float, float | None]]:
    """{peer: (request, bits per weight, relative error)} of all that can be run here."""
    store = bench.store
    peers: dict[str, tuple[dict[str, Any], float, float | None]] = {}
    checkpoint = {"model": str(store.checkpoint(name))}
    offload = str(store.folder / "offload")
    needed = {"least_memory": LEAST_DENSE_MEMORY.get(name, 0)}
    peers["accelerate"] = {"peer": "accelerate", "folder": offload, **needed, **checkpoint}, 16.0, 0.0
    if bench.quick:
        bench.report.note("a quick run's model is so small that peers keep it in memory: no goals, and fewer of them")
    else:
        try:
            split = store.split(name, bench.prepare)
            peers["AirLLM"] = {"peer": "airllm", "folder": str(split), **needed, **checkpoint}, 16.0, 0.0
        except LimitError as error:
            bench.report.note(f"AirLLM is left out: {error}")
    for kind in COMPARABLE[:1] if bench.quick else GGUF_TYPES:
        try:
            file, bits, t2 = store.gguf(name, kind, bench.prepare)
        except LimitError as error:
            bench.report.note(f"llama.cpp is left out: {error}")
            break
        peers[f"llama.cpp {kind}"] = llama_cpp(file, "mmap"), bits, t2
        if kind == COMPARABLE[0]:
            peers |= {f"llama.cpp {kind} {mode}": (llama_cpp(file, mode), bits, t2) for mode in OTHER_MODES}
    return peers


def llama_cpp(file: Path, mode: str) -> dict[str, Any]:
    return {"peer": "llama.cpp", "model": str(file), "mode": mode}


def peer_figures(run: WorkerRun, ours: WorkerRun) -> list[Any]:
    token_s, spread_s = run.token_s, median_spread(run.seconds)[1]
    passes = run.answer.get("generations", [run.answer])[0]["seconds"]
    memory = [megabytes(run.peak_bytes), megabytes(run.peaks.anonymous), megabytes(run.memory_bytes)]
    return [token_s, spread_s, token_s / ours.token_s, passes[0], *memory]


def peer_criterion(bench: StreamingBench, peer: str, name: str, storage: str, ratio: float) -> None:
    goals = {"accelerate": ACCELERATE_GOAL} | {f"llama.cpp {kind}": LLAMA_CPP_GOAL for kind in COMPARABLE}
    if peer in goals and not bench.quick:
        goal = goals[peer]
        bench.report.criterion(key("times_as_fast_as", peer, name, storage), ratio, f">= {goal}", ratio >= goal)


SECTIONS = {
    "start": lambda bench, _: measure_start(bench),
    "stages": measure_stages,
    "coded": measure_coded,
    "peers": measure_peers,
    "speculation": lambda bench, _: measure_speculation(bench),
    "faults": lambda bench, _: measure_faults(bench),
}


if __name__ == "__main__":
    main()
