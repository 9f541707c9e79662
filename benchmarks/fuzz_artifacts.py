"""Artifacts that lie through every loader: each runs, or refuses with an error of ours; none crashes, hangs or swells.

Small sound artifacts of every kind of codec are changed (`tests/artifact_mutations.py`): shapes, dtypes, codecs,
numbers, names, offsets, bytes, settings, special files. Then they are sealed again, so that every digest is right, and
given to every loader (`tests/artifact_loaders.py`) in processes of their own: one that dies, hangs or takes too much
memory is a finding, as is any error but a WaterfillError, and another one takes its place. Findings are kept.

    --case SEED:NUMBER   make one case again, judge it in this process, and say what every loader says
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
import transformers

from benchmarks.shared.report import REPOSITORY, BenchmarkReport, parse_arguments
from tests.support.artifact_drafts import write
from tests.support.artifact_loaders import FindingError, judge
from tests.support.artifact_mutations import Mutator
from tests.support.fuzz_samples import sample_artifacts
from waterfill.base import process as memory

MINUTES, QUICK_MINUTES = 30.0, 0.5
HANG_S = 60.0  # a case takes a second or two
MOST_BYTES = 2_000_000_000  # of a process's resident memory; one that has loaded everything takes a quarter
ADDRESS_BYTES = 64 << 30  # of its address space: what asks for more is refused by the system
CASES = 400  # of a process's life
FINDINGS = REPOSITORY / "build" / "fuzz-artifacts"


@dataclass
class Worker:
    """A process, the case that it judges, and since when."""

    process: multiprocessing.process.BaseProcess
    receiver: Connection
    number: int = -1
    since: float = field(default_factory=time.monotonic)


def main() -> None:
    arguments = parse_arguments(
        __doc__,
        minutes={"type": float, "help": f"how long ({MINUTES:g}; quick: {QUICK_MINUTES:g})"},
        seed={"type": int, "default": 0},
        workers={"type": int, "default": os.cpu_count() or 1, "help": "processes at a time"},
        case={"metavar": "SEED:NUMBER", "help": "judge this one alone"},
        findings={"type": Path, "metavar": "FOLDER", "default": FINDINGS, "help": "where to keep what went wrong"},
    )
    minutes = arguments.minutes or (QUICK_MINUTES if arguments.quick else MINUTES)
    report = BenchmarkReport("lying artifacts through every loader")
    with tempfile.TemporaryDirectory(prefix="fuzz-artifacts-") as folder:
        samples = sample_artifacts(Path(folder))
        if arguments.case:
            seed, number = map(int, arguments.case.split(":"))
            what, draft = Mutator(samples, seed).case(number)
            write(draft, Path(folder) / "case")
            report.note(f"{what}: {judge(Path(folder) / 'case')}")
            return
        report.note(f"seed {arguments.seed}, {minutes:g} minutes, {arguments.workers} processes")
        report.note(
            f"torch {torch.__version__}, transformers {transformers.__version__}; samples: {', '.join(samples)}"
        )
        met, found, elapsed_s = fuzz(samples, arguments.seed, 60 * minutes, arguments.workers, Path(folder))
        rows = [[loader, said, count] for (loader, said), count in sorted(met.items())]
        report.table("what loaders say", ["loader", "says", "cases"], rows, key="said")
        cases = sum(count for (loader, _), count in met.items() if loader == "open")
        report.note(f"{cases:,} cases in {elapsed_s:.0f} s, each through every loader")
        for number, what in found:
            keep(samples, arguments.seed, number, arguments.findings)
            report.note(f"FOUND {arguments.seed}:{number}: {what}")
    if found:
        report.note(f"kept in {arguments.findings.name}")
    report.criterion("seconds_of_fuzzing", elapsed_s, f">= {60 * minutes:g}", elapsed_s >= 60 * minutes)
    report.criterion("findings", len(found), "0", not found)
    report.save(arguments.json)


def fuzz(
    samples: dict[str, Path], seed: int, seconds: float, workers: int, folder: Path
) -> tuple[Counter[tuple[str, str]], list[tuple[int, str]], float]:
    """(what every loader said and how often, findings by number of case, seconds)."""
    context = multiprocessing.get_context("spawn")
    met: Counter[tuple[str, str]] = Counter()
    found: list[tuple[int, str]] = []
    alive: list[Worker] = []
    start, next_case = time.monotonic(), 0
    while (open_ := time.monotonic() - start < seconds) or alive:
        while open_ and len(alive) < workers:
            receiver, sender = context.Pipe(duplex=False)
            numbers = range(next_case, next_case + CASES)
            until = start + seconds
            arguments = sender, samples, seed, numbers, folder / f"from-{next_case}", until
            started = context.Process(target=work, args=arguments, daemon=True)
            started.start()
            sender.close()
            alive.append(Worker(started, receiver))
            next_case += CASES
        wait([worker.receiver for worker in alive], timeout=1.0)
        for worker in list(alive):
            ended = receive(worker, met, found)
            hangs = time.monotonic() - worker.since > HANG_S
            if not ended and not hangs:
                continue
            if hangs:
                worker.process.kill()
            worker.process.join()
            if worker.number >= 0:  # it ended within a case
                what = "a hang" if hangs else f"a crash, exit code {worker.process.exitcode}"
                found.append((worker.number, what))
            alive.remove(worker)
    return met, found, time.monotonic() - start


def receive(worker: Worker, met: Counter[tuple[str, str]], found: list[tuple[int, str]]) -> bool:
    """Take in what a worker has to say; whether it has ended."""
    try:
        while worker.receiver.poll():
            kind, content = worker.receiver.recv()
            worker.since = time.monotonic()
            if kind == "begins":
                worker.number = content
            elif kind == "said":
                met.update(content.items())
                worker.number = -1
            else:
                found.append((worker.number, content))
                worker.number = -1
    except EOFError:
        return True
    return False


def work(sender: Connection, samples: dict[str, Path], seed: int, numbers: range, folder: Path, until: float) -> None:
    """Judge cases one after another; the process ends where memory was taken and not given back."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_BYTES, ADDRESS_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with Path(os.devnull).open("w") as nowhere:  # libraries that panic say so at length
        os.dup2(nowhere.fileno(), 2)
    mutator = Mutator(samples, seed)
    for number in numbers:
        if time.monotonic() > until:
            return
        sender.send(("begins", number))
        shutil.rmtree(folder, ignore_errors=True)
        _, draft = mutator.case(number)
        write(draft, folder)
        try:
            said = judge(folder)
        except FindingError as error:
            sender.send(("found", str(error)))
            continue
        if (taken := memory.peak_bytes()) > MOST_BYTES:
            sender.send(("found", f"{taken / 1e9:.1f} GB of memory"))
            return
        sender.send(("said", said))


def keep(samples: dict[str, Path], seed: int, number: int, findings: Path) -> None:
    """Make a case again, to be looked at."""
    out = findings / f"{seed}-{number}"
    shutil.rmtree(out, ignore_errors=True)
    with contextlib.suppress(OSError):  # a special file that this system does not make
        write(Mutator(samples, seed).case(number)[1], out)


if __name__ == "__main__":
    main()
