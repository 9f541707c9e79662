"""Eight texts in one pass over the weights, beside eight one after another: tokens per second of the native engine.

    random weights in shapes of Llama-3.2-1B ──pack at 4 bits──► for memory, for storage ──┬── in memory
                                                                                           └── streamed below a limit

Every text is greedy and as long as the others. Both ways make the same tokens: a pass over several texts gives the bits
of a pass over each, and the script ends where it does not. A streamed model keeps a part of its weights; a pass reads
the others.
"""

from __future__ import annotations

import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import waterfill
from benchmarks.shared.make_checkpoint import LLAMA_3_2_1B, TINY, make_checkpoint
from benchmarks.shared.report import BenchmarkReport, median_spread, parse_arguments
from benchmarks.shared.rounds import Effort, Round, ratios, undisturbed
from benchmarks.streaming.models import even_sensitivity
from waterfill.base.errors import MemoryLimitError
from waterfill.running.engine.families.llama import LlamaModel
from waterfill.running.engine.opening import open_model

SHAPES = LLAMA_3_2_1B | {"num_hidden_layers": 4, "vocab_size": 32768}  # 312 million weights: no cache holds them
BITS = 4.0
PURPOSES = ("memory", "storage")
TEXTS = 8
PROMPT_TOKENS, NEW_TOKENS, QUICK_TOKENS = 16, 32, 8
ROUNDS, QUICK_ROUNDS, PATIENCE_S = 5, 2, 60.0
KEPT = 0.25  # of the weights that a streamed model has room for, beyond the least that it takes
GOAL = 3.0  # times as many tokens per second

RATE = "tokens/s"
ALONE, TOGETHER = "one after another", "in one pass"

Tokens = list[list[int]]


def main() -> None:
    arguments = parse_arguments(
        __doc__, patience={"type": float, "default": PATIENCE_S, "help": "seconds to repeat disturbed rounds for"}
    )
    report = BenchmarkReport("several texts in one pass")
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            row
            for purpose in PURPOSES
            for row in measure_artifact(report, packed(Path(folder), purpose, arguments), arguments)
        ]
    columns = [
        "packed for",
        "weights",
        "MB",
        "one after another, tokens/s",
        "±",
        "in one pass, tokens/s",
        "± ",
        "times",
        "±  ",
    ]
    report.table(f"{TEXTS} greedy texts, after prompts of {PROMPT_TOKENS} tokens", columns, rows, key="batching")
    report.save(arguments.json)


def packed(folder: Path, purpose: str, arguments: Namespace) -> Path:
    """A random checkpoint at 4 bits, packed for one purpose."""
    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        make_checkpoint(checkpoint, TINY if arguments.quick else SHAPES)
    options: dict[str, Any] = {"bits": BITS, "purpose": purpose, "sensitivity": even_sensitivity(checkpoint)}
    waterfill.pack(checkpoint, folder / purpose, plan=waterfill.plan(checkpoint, **options))
    return folder / purpose


def measure_artifact(report: BenchmarkReport, artifact: Path, arguments: Namespace) -> list[list[Any]]:
    """Rows of the table: in memory, and streamed."""
    size = sum(file.stat().st_size for file in artifact.glob("*.safetensors"))
    rows = []
    for where in ("in memory", "streamed"):
        limit = None if where == "in memory" else least_bytes(artifact) + int(KEPT * size)
        model = open_model(artifact, memory=limit, streamed=limit is not None, verify=False)
        rows.append(
            [artifact.name, where, size / 1e6, *measure_model(report, f"{artifact.name}, {where}", model, arguments)]
        )
        if model.streaming is not None:
            report.note(f"{artifact.name}: {model.streaming.line}")
            model.streaming.close()
        del model
    return rows


def least_bytes(artifact: Path) -> int:
    """Memory that the process needs to stream an artifact."""
    try:
        open_model(artifact, memory="1MB", streamed=True, verify=False)
    except MemoryLimitError as error:
        return error.smallest_bytes
    raise SystemExit("a model in 1 MB: the limit is not held")


def measure_model(report: BenchmarkReport, what: str, model: LlamaModel, arguments: Namespace) -> list[float]:
    tokens = QUICK_TOKENS if arguments.quick else NEW_TOKENS
    effort = Effort(QUICK_ROUNDS if arguments.quick else ROUNDS, 0 if arguments.quick else arguments.patience)
    samples = undisturbed(report, what, effort, partial(one_round, model, tokens))
    alone, together = samples[ALONE][RATE], samples[TOGETHER][RATE]
    times = median_spread(ratios(together, alone))
    report.criterion(
        f"one_pass_over_one_by_one_{what.replace(', ', '_').replace(' ', '_')}",
        times[0],
        f">= {GOAL}",
        times[0] >= GOAL,
    )
    return [*median_spread(alone), *median_spread(together), *times]


def one_round(model: LlamaModel, tokens: int) -> Round:
    """Tokens per second behind the prompts, both ways."""
    random = np.random.default_rng(0)
    prompts = random.integers(0, model.vocabulary, (TEXTS, PROMPT_TOKENS)).tolist()
    found, rates = [], {}
    for way, groups in ((ALONE, [[prompt] for prompt in prompts]), (TOGETHER, [prompts])):
        made, seconds = [], 0.0
        for group in groups:
            texts, elapsed = continued(model, group, tokens)
            made += texts
            seconds += elapsed
        found.append(made)
        rates[way] = {RATE: TEXTS * tokens / seconds}
    if found[0] != found[1]:
        raise SystemExit("texts in one pass are not those that come one after another")
    return rates


def continued(model: LlamaModel, prompts: Sequence[list[int]], count: int) -> tuple[Tokens, float]:
    """(`count` tokens behind each prompt, seconds that they took)."""
    sequences = [model.sequence() for _ in prompts]
    last = [int(rows[-1].argmax()) for rows in model.forward(sequences, prompts)]
    start = time.perf_counter()
    for _ in range(count):
        last = [int(rows[-1].argmax()) for rows in model.forward(sequences, [[token] for token in last])]
    elapsed = time.perf_counter() - start
    return [sequence.ids[PROMPT_TOKENS:] for sequence in sequences], elapsed


if __name__ == "__main__":
    main()
