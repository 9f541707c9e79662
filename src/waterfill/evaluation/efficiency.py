"""What it takes to run a model: bytes, memory at three points, time to the first token, tokens per second, energy.

measure_efficiency(model) ──► a process per batch size: `python -m waterfill.evaluation.efficiency`, task ──► figures

Each process is fresh, so that its peak memory is that of one model running once. Prompts are random tokens, and
generation is greedy and does not stop early: speed depends on neither.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from waterfill.base import process
from waterfill.base.errors import WaterfillError
from waterfill.base.records import Record
from waterfill.evaluation.llamacpp import GgufModel
from waterfill.evaluation.subjects import Subject, open_subject
from waterfill.running.streaming.fit import Form

PROMPT_TOKENS, NEW_TOKENS = 256, 128
BATCH = 8
WARM_UP = (8, 4)  # tokens read and written before anything is measured
POWERCAP = Path("/sys/class/powercap")

_SOURCE = str(Path(__file__).parents[2])  # so that another process imports this very package


@dataclass(frozen=True)
class Efficiency(Record):
    """One model on one machine.

    Memory is the largest resident set of the process so far, with Python, libraries and mapped weights;
    `memory_start_bytes` is what it was before the model was opened.
    """

    size_bytes: int  # of the weight files
    weights: int  # numbers in all tensors
    bits_per_weight: float  # 8 * size_bytes / weights: scales, padding, headers, unpacked tensors, nothing left out
    memory_start_bytes: int
    memory_load_bytes: int  # after loading
    memory_prefill_bytes: int  # after the prompt, batch 1
    memory_generation_bytes: int  # after all tokens, batch 1
    memory_batch_bytes: int  # the same with `batch` sequences
    first_token_s: float  # from the prompt to its first token, batch 1
    tokens_per_s: float  # after the first, batch 1
    batch: int
    first_token_batch_s: float
    tokens_per_s_batch: float  # of all `batch` sequences together
    energy_j_per_token: float | None  # of the processor packages while generating, batch 1; None where it is not told
    prompt_tokens: int
    new_tokens: int
    threads: int
    dtype: str  # of the activations


def measure_efficiency(
    model: str | Path,
    *,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    batch: int = BATCH,
    memory_form: Form = "auto",
    rate: float | None = None,
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Efficiency:
    """Measure an artifact, a checkpoint in its own dtype, or a GGUF file.

    Args:
        prompt_tokens: that are read (256, or half of the model's positions if that is less).
        new_tokens: that are generated (128, or as many as there is room for).
        batch: sequences at a time in the second measurement.
        memory_form, rate: of an artifact, as for `load`.
        progress: called with (processes done, processes in all).

    Raises:
        WaterfillError: a bad model, more tokens than it has positions, or a process that failed.
    """
    subject = open_subject(model, revision=revision, form=memory_form, rate=rate)
    prompt_tokens, new_tokens = _lengths(subject, prompt_tokens, new_tokens)
    if batch < 1:
        raise WaterfillError(f"a batch of {batch} sequences was asked for; choose at least 1")
    common = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "threads": torch.get_num_threads()}
    task = {"model": str(model), "revision": revision, "form": memory_form, "rate": rate, **common}
    size_bytes, weights = subject.size_bytes, subject.weights
    del subject
    figures = []
    if progress is not None:
        progress(0, 2)
    for sequences in (1, batch):
        figures.append(_in_process({**task, "batch": sequences}))
        if progress is not None:
            progress(len(figures), 2)
    one, many = figures
    return Efficiency(
        size_bytes=size_bytes,
        weights=weights,
        bits_per_weight=8 * size_bytes / weights,
        memory_start_bytes=one.memory_start_bytes,
        memory_load_bytes=one.memory_load_bytes,
        memory_prefill_bytes=one.memory_prefill_bytes,
        memory_generation_bytes=one.memory_generation_bytes,
        memory_batch_bytes=many.memory_generation_bytes,
        first_token_s=one.first_token_s,
        tokens_per_s=one.tokens_per_s,
        batch=batch,
        first_token_batch_s=many.first_token_s,
        tokens_per_s_batch=many.tokens_per_s,
        energy_j_per_token=one.energy_j_per_token,
        dtype=one.dtype,
        **common,
    )


def _lengths(subject: Subject, prompt: int | None, new: int | None) -> tuple[int, int]:
    positions = subject.positions
    prompt = prompt if prompt is not None else min(PROMPT_TOKENS, positions // 2) if positions else PROMPT_TOKENS
    new = new if new is not None else min(NEW_TOKENS, max(2, positions - prompt)) if positions else NEW_TOKENS
    if prompt < 1 or new < 2:
        raise WaterfillError(f"{prompt} tokens to read and {new} to write were asked for; choose at least 1 and 2")
    if positions is not None and prompt + new > positions:
        raise WaterfillError(
            f"{prompt} + {new} tokens were asked for, but the model has {positions} positions; choose fewer"
        )
    return prompt, new


# ------------------------------------------------------------------------------------------------- a process of its own


@dataclass(frozen=True)
class Figures:
    """What one process measures."""

    memory_start_bytes: int
    memory_load_bytes: int
    memory_prefill_bytes: int
    memory_generation_bytes: int
    first_token_s: float
    tokens_per_s: float
    energy_j_per_token: float | None
    dtype: str


def _in_process(task: dict[str, Any]) -> Figures:
    path = os.pathsep.join(part for part in (_SOURCE, os.environ.get("PYTHONPATH")) if part)
    done = subprocess.run(
        [sys.executable, "-m", "waterfill.evaluation.efficiency"],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    try:
        record = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise WaterfillError(
            f"the process that ran {task['model']} ended with code {done.returncode} ({last}); try fewer tokens"
        ) from None
    if "error" in record:
        raise WaterfillError(record["error"])
    return Figures(**record)


def _measure(task: dict[str, Any]) -> Figures:
    start_bytes = process.peak_bytes()
    torch.set_num_threads(task["threads"])
    model = open_subject(task["model"], revision=task["revision"], form=task["form"], rate=task["rate"]).load_to_run()
    load_bytes = process.peak_bytes()
    _generate(model, 1, *WARM_UP, lambda: None)
    times_s: list[float] = []
    prefill: list[int] = []

    def token() -> None:
        times_s.append(time.perf_counter())
        if not prefill:
            prefill.append(process.peak_bytes())

    before_j, started_s = _energy_j(), time.perf_counter()
    _generate(model, task["batch"], task["prompt_tokens"], task["new_tokens"], token)
    energy_j = _used_j(before_j, _energy_j())
    tokens = task["batch"] * task["new_tokens"]
    return Figures(
        memory_start_bytes=start_bytes,
        memory_load_bytes=load_bytes,
        memory_prefill_bytes=prefill[0],
        memory_generation_bytes=process.peak_bytes(),
        first_token_s=times_s[0] - started_s,
        tokens_per_s=task["batch"] * (len(times_s) - 1) / (times_s[-1] - times_s[0]),
        energy_j_per_token=None if energy_j is None else energy_j / tokens,
        dtype=str(model.dtype).removeprefix("torch."),
    )


def _generate(model: Any, batch: int, prompt_tokens: int, new_tokens: int, token: Callable[[], None]) -> None:
    """Calls `token` after each token of all sequences."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    shape, generator = (batch, prompt_tokens), torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, shape, generator=generator).to(model.device)
    if isinstance(model, GgufModel):
        past = None
        for _ in range(new_tokens):
            output = model(ids, past_key_values=past, use_cache=True, last=True)
            past, ids = output.past_key_values, output.logits[:, -1].argmax(dim=-1, keepdim=True)
            token()
        return
    model.generate(  # transformers' own loop, as users run it
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        stopping_criteria=StoppingCriteriaList([_Watch(token)]),
    )


class _Watch(StoppingCriteria):  # type: ignore[misc]
    """Never stops, but is asked after every token."""

    def __init__(self, token: Callable[[], None]) -> None:
        self._token = token

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self._token()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _energy_j() -> dict[Path, tuple[float, float]] | None:
    """Counter and range in joules of each processor package; None where the machine does not tell."""
    counters = {}
    for zone in sorted(POWERCAP.glob("*:[0-9]*")):
        if zone.name.count(":") != 1:
            continue  # a part of a package
        try:
            if not (zone / "name").read_text().startswith("package"):
                continue
            values = [float((zone / name).read_text()) for name in ("energy_uj", "max_energy_range_uj")]
        except (OSError, ValueError):
            return None
        counters[zone] = (values[0] / 1e6, values[1] / 1e6)
    return counters or None


def _used_j(
    before: dict[Path, tuple[float, float]] | None, after: dict[Path, tuple[float, float]] | None
) -> float | None:
    """Joules between two readings of counters that start again from 0 at the end of their range."""
    if not before or not after or before.keys() != after.keys():
        return None
    return sum((after[zone][0] - before[zone][0]) % after[zone][1] for zone in before)


def main() -> None:
    """Measure what the task on standard input says."""
    task = json.loads(sys.stdin.read())
    try:
        record = asdict(_measure(task))
    except WaterfillError as error:
        record = {"error": str(error)}
    sys.stdout.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
