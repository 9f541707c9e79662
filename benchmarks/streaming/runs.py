"""Runs for `streaming.py`: a worker under limits of memory and of reading, with nothing of its files in the page cache.

StreamingBench.ours(artifact, rate, …) ──► streaming.worker ──┐
StreamingBench.peer(request, …)        ──► streaming.peers ──┴─ run_limited ──► WorkerRun: answer, seconds, peaks
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.shared.limits import LimitError, Limits, Outcome, Peaks, enforcement, evict, run_limited, with_source
from benchmarks.shared.report import BenchmarkReport
from benchmarks.streaming.models import Store, StreamedArtifact
from waterfill.planning.budget import format_size

RATES = {"device": None, "0.5 GB/s": 0.5e9, "0.2 GB/s": 0.2e9}  # bytes a second that may be read
MEMORY_SHARE = 1 / 3  # of the artifact
PROMPT = list(range(1, 9))
WARM_PASSES = 2  # the prompt's, and one more
SLACK = 0.01  # one process needs a little more than another
TIMEOUT_S = 1200.0
PEER_TIMEOUT_S, QUICK_PEER_TIMEOUT_S = 300.0, 30.0  # some do not end: they read the same pages again and again
MORE_MEMORY = 1.5  # that a peer is given once it was killed, or did not end
LARGEST_MEMORY = 16e9


@dataclass(frozen=True)
class WorkerRun:
    """One worker that answered."""

    answer: dict[str, Any]
    seconds: Sequence[float]  # of passes, but for the first ones
    peaks: Peaks
    memory_bytes: int | None  # the limit that it ran under

    @property
    def token_s(self) -> float:
        """The mean: a throttle lets what it owes through at once, and passes of a small model are long and short."""
        return fmean(self.seconds)

    @property
    def peak_bytes(self) -> int:
        """Of resident memory, as the process saw it, or else the one that watched it."""
        return self.answer["peak_bytes"] or self.peaks.resident


@dataclass
class StreamingBench:
    """How workers are run, and what is known of artifacts."""

    report: BenchmarkReport
    store: Store
    quick: bool
    peers_python: str
    storages: Sequence[str]  # names of `RATES`
    memory: int | str | None  # bytes; None: a share of the artifact, or the smallest; "none": all of it, without limit
    _known: dict[tuple[Any, ...], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._refused = enforcement(self.store.folder)
        for reason in filter(None, self._refused.values()):
            self.report.note(f"not enforced from outside: {reason}")

    def rates(self) -> dict[str, float | None]:
        """Those wanted that can be had here; a quick run takes the last."""
        names = [name for name in self.storages if RATES[name] is None or not self._refused["read"]]
        return {name: RATES[name] for name in (names[-1:] if self.quick else names)}

    def limit(self, *artifacts: StreamedArtifact, **request: Any) -> int | None:
        """The memory that all of them are run in; `request` as for `ours`."""
        if self.memory == "none":
            return None
        if self.memory is not None:
            return int(self.memory)
        shares = [int(MEMORY_SHARE * artifact.size_bytes) for artifact in artifacts]
        return max(*shares, *(self._smallest(artifact, request) for artifact in artifacts))

    def ours(
        self,
        artifact: StreamedArtifact,
        rate: float | None,
        tokens: int,
        memory: int | None,
        prompts: Sequence[Sequence[int]] = (PROMPT,),
        **request: Any,
    ) -> WorkerRun:
        """Raises LimitError if it is killed or fails."""
        request |= {"artifact": str(artifact.path), "memory": memory, "prompts": prompts}
        request["tokens"] = tokens + WARM_PASSES
        outcome = self._outcome("benchmarks.streaming.worker", sys.executable, request, [artifact.path], rate, memory)
        answer = _checked(outcome)
        seconds = [s for generation in answer["generations"] for s in generation["seconds"][WARM_PASSES:]]
        return WorkerRun(answer, seconds, outcome.peaks, memory)

    def peer(self, request: dict[str, Any], rate: float | None, tokens: int, memory: int | None) -> WorkerRun:
        """A peer, with more memory whenever it is killed or does not end; it begins with what it is known to need,
        `least_memory` of the request. Raises LimitError if it fails."""
        memory = None if memory is None else max(memory, request.get("least_memory", 0))
        files = [Path(request[what]) for what in ("model", "folder") if what in request]
        request = {"prompt": PROMPT, "threads": torch.get_num_threads(), "tokens": tokens + WARM_PASSES, **request}
        timeout_s = QUICK_PEER_TIMEOUT_S if self.quick else PEER_TIMEOUT_S
        while True:
            outcome = self._outcome(
                "benchmarks.streaming.peers", self.peers_python, request, files, rate, memory, timeout_s
            )
            starved = memory is not None and (outcome.killed or outcome.timed_out)
            if not starved or memory * MORE_MEMORY > LARGEST_MEMORY:
                answer = _checked(outcome)
                return WorkerRun(answer, answer["seconds"][WARM_PASSES:], outcome.peaks, memory)
            memory = int(memory * MORE_MEMORY)

    def prepare(self, request: dict[str, Any]) -> dict[str, Any]:
        """A peer's answer to a request that writes files: without limits."""
        return _checked(self._run("benchmarks.streaming.peers", self.peers_python, request, Limits()))

    def _smallest(self, artifact: StreamedArtifact, request: dict[str, Any]) -> int:
        """The least memory that an artifact can be streamed in, as the refusal of one byte says."""
        known = artifact.path, *request.items()
        if known not in self._known:
            request = {"artifact": str(artifact.path), "memory": 1, "prompts": [], "tokens": 0, **request}
            answer = self._run("benchmarks.streaming.worker", sys.executable, request, Limits()).answer()
            if not answer.get("smallest_bytes"):
                raise LimitError(f"the smallest memory is not known: {answer.get('error', 'a byte is enough')}")
            self._known[known] = round((1 + SLACK) * answer["smallest_bytes"])
            self.report.note(f"{artifact.path.name}: at least {format_size(answer['smallest_bytes'])} of memory")
        return self._known[known]

    def _outcome(
        self,
        module: str,
        python: str,
        request: Any,
        files: Sequence[Path],
        rate: float | None,
        memory: int | None,
        timeout_s: float = TIMEOUT_S,
    ) -> Outcome:
        for path in files:
            evict(path)
        limits = Limits(
            memory_bytes=None if self._refused["memory"] else memory,
            read_bytes_per_s=None if self._refused["read"] else rate,
            disk=self.store.folder,
        )
        return self._run(module, python, request, limits, timeout_s)

    def _run(self, module: str, python: str, request: Any, limits: Limits, timeout_s: float = TIMEOUT_S) -> Outcome:
        environment = {**with_source(os.environ), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        command = [python, "-m", module]
        return run_limited(command, limits, request=request, env=environment, timeout_s=timeout_s)


def _checked(outcome: Outcome) -> dict[str, Any]:
    answer = outcome.answer()
    if "error" in answer:
        raise LimitError(answer["error"])
    return answer


def key(*parts: str) -> str:
    """The name of a criterion."""
    return "_".join(parts).translate({ord(" "): "_", ord("-"): "_", ord("."): "_", ord("/"): "_per_"}).lower()
