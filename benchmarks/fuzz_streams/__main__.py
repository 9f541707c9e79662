"""Damaged and lying streams through every decoder: the same answer from all, or a refusal from all, never a crash.

rANS and trellis streams are mutated (`stream_mutations.py`) and judged (`tests/stream_cases.py`) by the numpy reference
and by the native decoders of every instruction set of the machine, which read and write beside pages that may not be
touched. That happens in a process of its own: one that dies or hangs is a finding, and another one takes its place.

    --library FILE   another build, for instance one with sanitizers (native/tests/run.sh makes it):
                     LD_PRELOAD=$(c++ -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 \\
                     python -m benchmarks.fuzz_streams --library build/native-sanitize/libwaterfill_native.so
    --corpus FILE    write the shortest case of every kind that was met: how tests/attacks/streams.jsonl was made
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from benchmarks.fuzz_streams.mutations import Mutator
from benchmarks.shared.report import REPOSITORY, BenchmarkReport, parse_arguments
from tests.support.stream_cases import CORPUS, Case, DisagreementError, judge, read_cases, write_cases
from waterfill.base import native

SECONDS, QUICK_SECONDS = 600.0, 20.0
REPORT_S = 1.0  # how often a worker says that it is alive
HANG_S = 60.0  # no word for so long: a case takes the slowest reference less than a second
PROCESS_S = 120.0  # a worker's life; the next one begins with other seeds
CORPUS_BYTES = 1200  # of a case, but for those that are the shortest in which 32 lanes meet
FINDINGS = REPOSITORY / "build" / "fuzz-findings.jsonl"


@dataclass
class Tally:
    """What was met so far."""

    met: Counter[tuple[str, str]] = field(default_factory=Counter)  # (kind of case, what decoders say)
    findings: list[tuple[str, Case]] = field(default_factory=list)
    shortest: dict[tuple[object, ...], Case] = field(default_factory=dict)

    def add(self, other: Tally) -> None:
        self.met.update(other.met)
        self.findings += other.findings
        for key, case in other.shortest.items():
            self.offer(key, case)

    def offer(self, key: tuple[object, ...], case: Case) -> bool:
        """Whether the case is the shortest of those like it."""
        known = self.shortest.get(key)
        if known is not None and len(known.data) <= len(case.data):
            return False
        self.shortest[key] = case
        return known is None


def main() -> None:
    arguments = parse_arguments(
        __doc__,
        seconds={"type": float, "help": f"how long ({SECONDS:g}; quick: {QUICK_SECONDS:g})"},
        seed={"type": int, "default": 0},
        library={"type": Path, "metavar": "FILE", "help": "native library to test"},
        corpus={"type": Path, "metavar": "FILE", "help": "where to write one case of every kind"},
        findings={"type": Path, "metavar": "FILE", "default": FINDINGS, "help": "where to write what went wrong"},
    )
    seconds = arguments.seconds or (QUICK_SECONDS if arguments.quick else SECONDS)
    path = arguments.library or native.find()
    if path is None:
        raise SystemExit("there is no native library to be compared with the reference")
    report = BenchmarkReport("damaged streams through every decoder")
    report.note(f"{path.name}: {', '.join(native.Native(path).isas)}, and the numpy reference; {seconds:g} s")
    tally, crashes, elapsed_s = fuzz(report, path, seconds, arguments.seed)
    rows = [[kind, said, count] for (kind, said), count in tally.met.most_common()]
    report.table("cases", ["kind", "decoders say", "cases"], rows, key="cases")
    cases = sum(tally.met.values())
    report.note(f"{cases:,} cases in {elapsed_s:.0f} s, each through every decoder")
    for what, case in tally.findings:
        report.note(f"FOUND {what}: {case.kind} {case.numbers}, {len(case.data)} bytes, by {case.name}")
    if tally.findings:
        write_cases(arguments.findings, (replace(case, name=what) for what, case in tally.findings))
        report.note(f"kept in {arguments.findings.name}")
    if arguments.corpus:
        write_corpus(report, tally, arguments.corpus)
    wanted = QUICK_SECONDS if arguments.quick else SECONDS
    report.criterion("seconds_of_fuzzing", elapsed_s, f">= {wanted:g}", elapsed_s >= wanted)
    disagreements = len(tally.findings) - crashes
    report.criterion("cases_on_which_decoders_differ", disagreements, "0", not disagreements)
    report.criterion("crashes_and_hangs", crashes, "0", not crashes)
    report.save(arguments.json)


def fuzz(report: BenchmarkReport, library: Path, seconds: float, seed: int) -> tuple[Tally, int, float]:
    """(what was met, how many of the findings are crashes or hangs, seconds)."""
    context = multiprocessing.get_context("spawn")
    tally, crashes, start = Tally(), 0, time.monotonic()
    state = Path(f"{FINDINGS}.current")
    state.parent.mkdir(parents=True, exist_ok=True)
    while (left := seconds - (time.monotonic() - start)) > 0:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(sender, library, state, seed, min(left, PROCESS_S)), daemon=True)
        process.start()
        sender.close()
        done, last = False, time.monotonic()
        while not done and process.is_alive() and time.monotonic() - last < HANG_S:
            with contextlib.suppress(EOFError):
                while receiver.poll(REPORT_S):
                    part, done = receiver.recv()
                    tally.add(part)
                    last = time.monotonic()
        if not done:
            what = "a crash" if not process.is_alive() else "a hang"
            process.kill()
            process.join()
            found = read_cases(state) if state.is_file() else []
            tally.findings += [(f"{what}, exit code {process.exitcode}", case) for case in found]
            crashes += len(found)
            if not found:
                raise SystemExit("the worker did not start, see above")
            report.note(f"{what}: {found[0].name}")
        process.join()
        seed += 1
    state.unlink(missing_ok=True)
    return tally, crashes, time.monotonic() - start


def work(sender: Connection, library_path: Path, state: Path, seed: int, seconds: float) -> None:
    """Fuzz for a while; what is judged now is always in the file `state`."""
    torch.set_num_threads(1)
    library = native.Native(library_path)
    library.set_threads(1)
    end, mutator, tally, last = time.monotonic() + seconds, Mutator(seed), Tally(), time.monotonic()
    with state.open("w+b") as current:
        for case in mutator.cases():
            current.seek(0)
            current.truncate()
            current.write(f"{case.line()}\n".encode())
            current.flush()
            try:
                said = judge(case, library)
            except Exception as error:  # whatever else a decoder raises is a finding as well
                said = "a finding"
                where = (
                    ""
                    if isinstance(error, DisagreementError)
                    else f" in {traceback.extract_tb(error.__traceback__)[-1]}"
                )
                if len(tally.findings) < 20:
                    tally.findings.append((f"{type(error).__name__}: {error}{where}", case))
            tally.met[case.kind, said.partition(";")[0]] += 1
            if tally.offer(signature(case, said), case):
                mutator.keep(case)
            now = time.monotonic()
            if now - last > REPORT_S or now > end:
                sender.send((tally, now > end))
                tally, last = Tally(shortest=tally.shortest), now
            if now > end:
                return


def signature(case: Case, said: str) -> tuple[object, ...]:
    """Cases with the same one are alike."""
    if case.kind == "rans":
        table = np.frombuffer(case.data, "<u2", 256)
        symbols = int(np.flatnonzero(table).max(initial=0)) + 1
        return "rans", said, case.numbers[0] == 32, max(4, (symbols - 1).bit_length())
    states, wide, *_ = case.numbers
    flags = case.data[4] if len(case.data) > 4 and said == "decoded" else None
    return "trellis", said, states == 1, wide, case.data[5:6] > b"\x0f", flags, lanes(case) == 32


def lanes(case: Case) -> int:
    from waterfill.codecs.entropy import lanes_for

    return lanes_for(case.numbers[2] * case.numbers[3])


def write_corpus(report: BenchmarkReport, tally: Tally, path: Path) -> None:
    """The shortest cases of their kinds, those found wrong first."""
    kept = sorted(tally.shortest.items(), key=lambda item: str(item[0]))
    cases = [replace(case, name=f"{key[1]}".partition(";")[0]) for key, case in kept if len(case.data) <= CORPUS_BYTES]
    old = read_cases(CORPUS) if path == CORPUS and CORPUS.is_file() else []
    known = {(case.kind, case.numbers, case.data) for case in cases}
    cases = [
        case for case in old if case.name.startswith("found") and (case.kind, case.numbers, case.data) not in known
    ] + cases
    write_cases(path, cases)
    report.note(f"{len(cases)} cases in {path.name}, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
