"""`streaming.py`: what a streamed run does when reading fails, files are damaged, or it is interrupted.

    python -m benchmarks.streaming.faults < request        all trials in one process; one JSON line
    measure_faults(bench)                                runs that, with a limit on its time

Every trial streams a copy of the example model in small chunks, does one thing wrong at a random place, and generates a
few tokens. It has to end in the right answer or in an error that says what happened, within a bounded time, with no
reading thread left; and the same model, unharmed, has to give the right answer afterwards.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.shared.limits import Limits, run_limited
from benchmarks.streaming.worker import Request, answering

TRIALS, QUICK_TRIALS = 200, 28
BOUND_S = 15.0  # of a trial
TOKENS = 3
CHUNK_BYTES = 32 << 10


def measure_faults(bench: Any) -> None:
    """Run the trials and report what they ended in."""
    count = QUICK_TRIALS if bench.quick else TRIALS
    request = {"artifact": str(bench.store.example().path), "trials": count}
    command = [sys.executable, "-m", "benchmarks.streaming.faults"]
    answer = run_limited(command, Limits(), request=request, timeout_s=60 + 2 * BOUND_S * count).answer()
    if "error" in answer:
        bench.report.note(f"faults: {answer['error']}")
        return
    rows = [
        [kind, found["trials"], found["answer"], found["error"], found["wrong"], found["slowest_s"]]
        for kind, found in answer["kinds"].items()
    ]
    columns = ["fault", "trials", "right answer", "clear error", "anything else", "slowest, s"]
    bench.report.table("faults injected", columns, rows, key="faults")
    for example in answer["wrong"]:
        bench.report.note(f"anything else: {example}")
    total, wrong = sum(row[1] for row in rows), sum(row[4] for row in rows)
    slowest = max(row[5] for row in rows)
    bench.report.criterion("faults_injected", total, f">= {count}", total >= count)
    bench.report.criterion("faults_ending_in_neither_answer_nor_error", wrong, "0", wrong == 0)
    bench.report.criterion("slowest_trial_s", slowest, f"<= {BOUND_S}", slowest <= BOUND_S)
    bench.report.criterion("threads_left", answer["threads_left"], "0", answer["threads_left"] == 0)


class ConsumerError(Exception):
    """A consumer's own exception."""


class Bed:
    """A streamed model, and what can be done to it."""

    def __init__(self, artifact: Path) -> None:
        import torch

        import waterfill
        from waterfill.running.streaming.residency import Residency
        from waterfill.running.streaming.tuning import Tuning

        tuning = Tuning(
            chunk_bytes=CHUNK_BYTES, reading_s=0.0, working_s=0.0, choose_residency=lambda *_: Residency((), (), 1.0)
        )
        self.file = artifact / "model.safetensors"
        self.size = self.file.stat().st_size
        self.model = waterfill.load(artifact, streamed=True, tuning=tuning)
        self.prompt = torch.arange(8)[None] + 40
        self.expected = self.generate()

    def generate(self) -> list[int]:
        out = self.model.generate(self.prompt, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
        return [int(token) for token in out[0]]

    @contextmanager
    def reads(self, spoil: Callable[[Callable[..., int], Any], int]) -> Iterator[None]:
        """`spoil(read, arguments)` in the place of one read, at random; the others are as ever."""
        storage = self.model.streaming.storage
        original, left = storage.read_at, [random.randrange(1, 100)]

        def read(*arguments: Any) -> int:
            left[0] -= 1
            return spoil(original, arguments) if left[0] == 0 else original(*arguments)

        storage.read_at = read
        try:
            yield
        finally:
            storage.read_at = original


@contextmanager
def short_read(bed: Bed) -> Iterator[None]:
    def spoil(read: Callable[..., int], arguments: Any) -> int:
        descriptor, memory, offset = arguments
        return read(descriptor, memory[: max(4096, len(memory) // 3 // 4096 * 4096)], offset)

    with bed.reads(spoil):
        yield


@contextmanager
def failing_read(bed: Bed) -> Iterator[None]:
    def spoil(*_: Any) -> int:
        raise OSError(random.choice([errno.EIO, errno.ENXIO, errno.ESTALE]), "injected")

    with bed.reads(spoil):
        yield


@contextmanager
def truncated_file(bed: Bed) -> Iterator[None]:
    whole = bed.file.read_bytes()
    os.truncate(bed.file, random.randrange(bed.size // 2, bed.size))
    try:
        yield
    finally:
        bed.file.write_bytes(whole)


@contextmanager
def flipped_bit(bed: Bed) -> Iterator[None]:
    offset, bit = random.randrange(bed.size // 8, bed.size), 1 << random.randrange(8)

    def flip() -> None:
        with bed.file.open("r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ bit]))

    flip()
    try:
        yield
    finally:
        flip()


@contextmanager
def interrupt(bed: Bed) -> Iterator[None]:
    """SIGINT at a random moment."""
    timer = threading.Timer(random.uniform(0.001, 0.3), lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    try:
        yield
        timer.join()
        time.sleep(0.01)  # the signal has come by now
    finally:
        timer.cancel()
        timer.join()


@contextmanager
def failing_consumer(bed: Bed) -> Iterator[None]:
    modules = [module for name, module in bed.model.named_modules() if name.endswith(("mlp", "self_attn", "norm"))]

    def fail(*_: Any) -> None:
        raise ConsumerError

    hook = random.choice(modules).register_forward_hook(fail)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def full_disk(bed: Bed) -> Iterator[None]:
    """Whatever is logged fails, as it does where the log's disk is full."""

    class Full(io.TextIOBase):
        def write(self, _: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    log, handler, stderr = logging.getLogger("waterfill"), logging.StreamHandler(Full()), sys.stderr
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    sys.stderr = Full()  # type: ignore[assignment]
    try:
        bed.model.streaming.make_way(1 << 62)
        log.info("%s", bed.model.streaming.line)
        yield
    finally:
        sys.stderr = stderr
        log.removeHandler(handler)


KINDS = (short_read, failing_read, truncated_file, flipped_bit, interrupt, failing_consumer, full_disk)


def trials(request: Request) -> Request:
    """{kind: how its trials ended}, examples of what is neither answer nor error, reading threads left at the end."""
    from waterfill.base.errors import WaterfillError

    random.seed(0)
    logging.raiseExceptions = False
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(shutil.copytree(request["artifact"], Path(folder) / "copy"))
        bed = Bed(artifact)
        kinds: dict[str, Any] = {}
        wrong: list[str] = []
        for trial in range(request["trials"]):
            fault = KINDS[trial % len(KINDS)]
            name = fault.__name__.replace("_", " ")
            found = kinds.setdefault(name, {"trials": 0, "answer": 0, "error": 0, "wrong": 0, "slowest_s": 0.0})
            start = time.perf_counter()
            try:
                with fault(bed):
                    outcome = "answer" if bed.generate() == bed.expected else "wrong"
            except (WaterfillError, ConsumerError, KeyboardInterrupt):
                outcome = "error"
            except Exception as error:
                outcome = "wrong"
                wrong.append(f"{name}: {type(error).__name__}: {error}")
            elapsed = time.perf_counter() - start
            if bed.generate() != bed.expected:
                outcome = "wrong"
                wrong.append(f"{name}: the next answer was another one")
            found["trials"] += 1
            found[outcome] += 1
            found["slowest_s"] = max(found["slowest_s"], elapsed)
        bed.model.streaming.close()
    left = sum(thread.name == "waterfill-read" for thread in threading.enumerate())
    return {"kinds": kinds, "wrong": wrong[:5], "threads_left": left}


if __name__ == "__main__":
    answering(trials)
