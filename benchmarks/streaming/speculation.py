"""`streaming.py`: tokens per streamed pass of the example model, with tokens guessed from the prompt or by a draft.

Reading is slowed down until one pass takes as long as that of a model which does not fit in memory. The prompts are
code that the model has not seen; all tokens are the most likely ones, so every way has to give the same.
"""

from __future__ import annotations

import math
from typing import Any

from transformers import AutoTokenizer

from benchmarks.shared.limits import LimitError
from benchmarks.shared.report import EXAMPLE_MODEL, held_out_text
from benchmarks.streaming.runs import StreamingBench, WorkerRun, key

PASS_S, QUICK_PASS_S = 0.2, 0.05
PROMPTS, QUICK_PROMPTS = 4, 1
PROMPT_TOKENS = 256
TOKENS, QUICK_TOKENS = 96, 24
LOOKUP = 8  # tokens guessed at a time


def measure_speculation(bench: StreamingBench) -> None:
    report, quick = bench.report, bench.quick
    artifact, draft = bench.store.example(), bench.store.example(draft=True)
    ways: dict[str, dict[str, Any]] = {
        "plain": {},
        "prompt look-up": {"lookup": LOOKUP},
        "low-bit draft": {"draft": str(draft.path)},
    }
    tokens, memory = QUICK_TOKENS if quick else TOKENS, bench.limit(artifact, draft=str(draft.path))
    rate = artifact.size_bytes / (QUICK_PASS_S if quick else PASS_S)
    text_prompts = prompts(bench, QUICK_PROMPTS if quick else PROMPTS)
    report.note(f"speculation: {artifact.bits:.3g} bits, the draft {draft.bits:.3g}; read at {rate / 1e6:.3g} MB/s")
    runs: dict[str, WorkerRun] = {}
    for way, options in ways.items():
        try:
            runs[way] = bench.ours(artifact, rate, tokens, memory, text_prompts, keep=False, **options)
        except LimitError as error:
            report.note(f"{way}: {error}")
    if "plain" not in runs:
        return
    rows, plain = [], figures(runs["plain"])
    for way, run in runs.items():
        passes, seconds, ids = figures(run)
        same = sum(a == b for a, b in zip(ids, plain[2], strict=True)) / len(ids)
        per_pass, faster = sum(map(len, ids)) / passes, plain[1] / seconds
        rows.append([way, passes, per_pass, seconds, faster, same, run.peak_bytes / 1e6, memory and memory / 1e6])
        if way != "plain":
            report.criterion(f"{key(way)}_tokens_per_pass", per_pass, "> 1", per_pass > 1)
            report.criterion(f"{key(way)}_speed_up", faster, "> 1", faster > 1)
            report.criterion(f"{key(way)}_same_tokens", same, "all", same == 1)
        if memory is not None:
            name, peak = f"peak_resident_bytes_{key(way)}", run.peak_bytes
            report.criterion(name, peak, f"<= {memory}", peak <= memory)
    columns = ["guesses", "passes", "tokens per pass", "seconds", "times as fast", "same tokens", "peak MB", "limit MB"]
    report.table(f"{len(plain[2])} texts of {PROMPT_TOKENS} tokens continued", columns, rows, key="speculation")


def figures(run: WorkerRun) -> tuple[int, float, list[list[int]]]:
    """(passes, seconds, tokens) of all generations but the first, which warms up; prompts' passes are counted."""
    generations = run.answer["generations"][1:]
    passes = sum(len(generation["seconds"]) for generation in generations)
    seconds = math.fsum(s for generation in generations for s in generation["seconds"])
    return passes, seconds, [generation["ids"] for generation in generations]


def prompts(bench: StreamingBench, count: int) -> list[list[int]]:
    """Stretches spread over the held-out text, and before them one to warm up with."""
    text = held_out_text(bench.report).read_text("utf-8")[: 1 << 18]
    ids = AutoTokenizer.from_pretrained(EXAMPLE_MODEL)(text, verbose=False)["input_ids"]
    stride = len(ids) // (count + 1)
    return [ids[i * stride : i * stride + PROMPT_TOKENS] for i in range(count + 1)]
