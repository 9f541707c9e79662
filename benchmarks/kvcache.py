"""Keys and values by codes of few bits beside those in bfloat16: what is lost, what they take, how fast they are read.

    quality   --models read held-out text, once with every kind of cache, in one pass over the weights: divergence from
              the cache in bfloat16 by keys and values together and apart, perplexity, the likeliest token
    memory    bytes of a token in shapes of Llama-3.2-1B
    speed     tokens per second of the same shapes at 4 bits, behind texts of 512 and 8192 tokens, every kind of cache
              in turn; random numbers stand for what is remembered, which time does not depend on

A pass of the engine gives the bits of a token at a time, so a text is read in pieces. With --quick, a short text of the
example model, and a model of one layer.
"""

from __future__ import annotations

import math
import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

import waterfill
from benchmarks.shared.make_checkpoint import LLAMA_3_2_1B, TINY, make_checkpoint
from benchmarks.shared.report import EXAMPLE_MODEL, BenchmarkReport, held_out_text, median_spread, parse_arguments
from benchmarks.shared.rounds import Effort, Round, ratios, undisturbed
from benchmarks.streaming.models import even_sensitivity
from waterfill.running.engine.cache import KeysValues, Sequence, Shape
from waterfill.running.engine.coded_cache import BLOCK, CodedShape
from waterfill.running.engine.families.llama import LlamaModel, shape_of
from waterfill.running.engine.opening import open_model
from waterfill.running.text.tokenizer_files import load_tokenizer

PARTS = ("quality", "memory", "speed")
Bits = tuple[int, int]  # of keys, of values
PLAIN: Bits = (16, 16)
RATES = (8, 5, 4, 3)
TOGETHER: tuple[Bits, ...] = tuple((bits, bits) for bits in RATES)
APART: tuple[Bits, ...] = (*((bits, 16) for bits in RATES), *((16, bits) for bits in RATES), (5, 4))
JUDGED: Bits = (4, 4)
CONTEXT, WINDOWS, QUICK_CONTEXT, QUICK_WINDOWS = 1024, 3, 512, 1
PIECE = 32  # tokens of a pass; their logits are in memory for every kind of cache
UNSEEN = 128  # tokens of a window that are not scored: most of them see nothing by codes
WEIGHTS = {"uniform": True, "codecs": ["levels-8"], "bits": 16.0}  # as good as the checkpoint's, and packed quickly
PERPLEXITY_GOAL = 1.01  # times that with bfloat16

SHAPES = LLAMA_3_2_1B | {"vocab_size": 32768}
FAST = {"uniform": True, "codecs": ["higgs-p1-n16"], "bits": 16.0}  # the quickest of 4 bits
TEXTS = (512, 8192)
NEW_TOKENS, ROUNDS, QUICK_ROUNDS, PATIENCE_S = 4, 9, 3, 60.0
SPEED_GOALS = {512: 0.95, 8192: 1.3}
RATE = "tokens/s"

Doubles = npt.NDArray[np.float64]


def main() -> None:
    arguments = parse_arguments(
        __doc__,
        part={"choices": PARTS, "nargs": "+", "default": list(PARTS), "help": f"of {', '.join(PARTS)}"},
        models={"type": Path, "nargs": "+", "default": [EXAMPLE_MODEL], "help": "checkpoints whose loss is measured"},
        folder={"type": Path, "help": "where packed models are kept; nowhere where none is named"},
        patience={"type": float, "default": PATIENCE_S, "help": "seconds to repeat disturbed rounds for"},
    )
    report = BenchmarkReport("keys and values by codes")
    with tempfile.TemporaryDirectory() as folder:
        kept = arguments.folder or Path(folder)
        if "quality" in arguments.part:
            text = held_out_text(report)
            for checkpoint in arguments.models:
                artifact = packed(kept / checkpoint.name, checkpoint, WEIGHTS)
                measure_quality(report, checkpoint.name, artifact, text, arguments.quick)
        if "memory" in arguments.part:
            measure_memory(report)
        if "speed" in arguments.part:
            measure_speed(report, kept, arguments)
    report.save(arguments.json)


def packed(out: Path, checkpoint: Path, options: Mapping[str, object]) -> Path:
    """One codec for all matrices."""
    if not out.exists():
        waterfill.pack(checkpoint, out, sensitivity=even_sensitivity(checkpoint), **options)  # type: ignore[arg-type]
    return out


def measure_quality(report: BenchmarkReport, name: str, artifact: Path, text: Path, quick: bool) -> None:
    model, kinds = open_model(artifact, verify=False), (PLAIN, *TOGETHER, *APART)
    context = min(QUICK_CONTEXT if quick else CONTEXT, model.positions)
    ids = load_tokenizer(artifact).prompt_ids(text.read_text("utf-8")[: 16 * context * WINDOWS])
    windows = [ids[i : i + context] for i in range(0, len(ids) - context + 1, context)]
    windows = windows[: QUICK_WINDOWS if quick else WINDOWS]
    scored = [read(model, window, kinds) for window in windows]
    losses, divergences, same = (np.concatenate(parts, axis=1) for parts in zip(*scored, strict=True))
    perplexity = np.exp(losses.mean(1))
    rows = []
    for i, kind in enumerate(kinds):
        kl = divergences[i]
        rows.append(
            [
                *(*kind, true_bits(model, kind), kl.mean(), kl.std() / math.sqrt(kl.size), np.quantile(kl, 0.999)),
                *(perplexity[i], perplexity[i] / perplexity[0] - 1, same[i].mean()),
            ]
        )
    columns = ["bits of keys", "of values", "with scales", "KL, nats", "±", "KL, 99.9 %", "perplexity", "more"]
    columns.append("same top token")
    report.table(f"{name}, {len(windows)} windows of {context} tokens", columns, rows, key=f"quality_{name}")
    times = float(perplexity[kinds.index(JUDGED)] / perplexity[0])
    report.criterion(
        f"perplexity_over_bf16_{name}_4_bits", round(times, 5), f"<= {PERPLEXITY_GOAL}", times <= PERPLEXITY_GOAL
    )


def read(model: LlamaModel, window: list[int], kinds: tuple[Bits, ...]) -> tuple[Doubles, Doubles, Doubles]:
    """A window with every kind of cache side by side, the first one plain: of each and of each token that is scored,
    `[kinds, tokens]`, what its target costs, the divergence from the first, both in nats, and whether their likeliest
    tokens agree."""
    sequences = [Sequence(model, shape_of(model.spec, kind).cache()) for kind in kinds]
    parts = []
    for start in range(0, len(window) - 1, PIECE):
        piece, targets = window[start : start + PIECE], window[start + 1 : start + PIECE + 1]
        logits = model.forward(sequences, [piece] * len(kinds), len(piece))
        if start < UNSEEN:
            continue
        logs = np.stack([log_probabilities(rows[: len(targets)]) for rows in logits])
        reference, best = logs[0], logs.argmax(-1)
        losses = -logs[:, np.arange(len(targets)), targets].astype(np.float64)
        divergences = (np.exp(reference) * (reference - logs)).sum(-1, dtype=np.float64)
        parts.append((losses, divergences, (best == best[0]).astype(np.float64)))
    losses, divergences, same = (np.concatenate(some, axis=1) for some in zip(*parts, strict=True))
    return losses, divergences, same


def log_probabilities(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    shifted = logits - logits.max(-1, keepdims=True)
    found: npt.NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return found


def true_bits(model: LlamaModel, kind: Bits) -> float:
    """Of a key's or a value's number, with what scales take."""
    shape = shape_of(model.spec, kind)
    return 8 * shape.token_bytes / (2 * shape.layers * shape.kv_heads * shape.head_dim)


def measure_memory(report: BenchmarkReport) -> None:
    shapes = LLAMA_3_2_1B
    numbers = (int(shapes[name]) for name in ("num_hidden_layers", "num_key_value_heads", "head_dim"))  # type: ignore[call-overload]
    plain = Shape(*numbers, half=True, positions=1 << 17)
    rows = []
    for kind in (PLAIN, *TOGETHER, (5, 4)):
        shape = plain if kind == PLAIN else CodedShape.of(plain, kind)
        less = plain.token_bytes / shape.token_bytes
        rows.append([*kind, shape.token_bytes, less, shape.text_bytes / 1e6, (8192 * shape.token_bytes) / 1e6])
    columns = [
        "bits of keys",
        "of values",
        "bytes per token",
        "times less",
        "MB of tokens as they are",
        "MB, 8192 tokens",
    ]
    report.table("shapes of Llama-3.2-1B", columns, rows, key="memory")


def measure_speed(report: BenchmarkReport, folder: Path, arguments: Namespace) -> None:
    name = "tiny" if arguments.quick else "1b"
    checkpoint = folder / f"{name}-bf16"
    if not checkpoint.exists():
        make_checkpoint(checkpoint, TINY if arguments.quick else SHAPES)
    model = open_model(packed(folder / f"{name}-fast", checkpoint, FAST), verify=False)
    rows = []
    for length in TEXTS:
        sequences = {kind: filled(model, kind, length) for kind in (PLAIN, *TOGETHER)}
        effort = Effort(QUICK_ROUNDS if arguments.quick else ROUNDS, 0 if arguments.quick else arguments.patience)
        samples = undisturbed(report, f"{length} tokens", effort, partial(one_round, sequences))
        plain = samples[str(PLAIN)][RATE]
        for kind in sequences:
            own = samples[str(kind)][RATE]
            times = median_spread(ratios(own, plain))
            rows.append([length, kind[0], *median_spread(own), *times])
            if kind == JUDGED:
                goal = SPEED_GOALS[length]
                report.criterion(
                    f"speed_over_bf16_{length}_tokens_4_bits", round(times[0], 3), f">= {goal}", times[0] >= goal
                )
    columns = ["tokens before", "bits", RATE, "±", "times bfloat16", "± "]
    report.table(f"{name}, weights at 4 bits, one text", columns, rows, key="speed")


def filled(model: LlamaModel, kind: Bits, length: int) -> Sequence:
    """A text of so many tokens, of which random numbers are remembered."""
    cache = shape_of(model.spec, kind).cache()
    assert isinstance(cache, KeysValues)
    cache.expected = length + NEW_TOKENS
    cache.reserve(cache.expected)
    random = np.random.default_rng(0)
    for array in (*cache._keys, *cache._values):
        if array.dtype == np.uint8:  # blocks of scales and codes
            array[:] = random.integers(0, 256, array.shape, np.uint8)
            array[..., : 2 * BLOCK].view(np.float16)[:] = 1
        else:  # bfloat16 between 1 and 2
            array[:] = random.integers(0x3F80, 0x4000, array.shape, np.uint16)
    sequence = Sequence(model, cache)
    sequence.append([0] * length)
    return sequence


def one_round(sequences: Mapping[Bits, Sequence]) -> Round:
    """Tokens per second with each kind of cache; what they add is forgotten."""
    rates = {}
    for kind, sequence in sequences.items():
        before = len(sequence.ids)
        start = time.perf_counter()
        for token in range(NEW_TOKENS):
            sequence.forward([token])
        rates[str(kind)] = {RATE: NEW_TOKENS / (time.perf_counter() - start)}
        sequence.truncate(before)
    return rates


if __name__ == "__main__":
    main()
