"""Tokens per second of whole models from their codes, beside llama.cpp's models of comparable bits.

Random codes in the shapes of known models, all matrices of one codec, the embedding too, which is the head. Where rows
are too short for a type of ggml's, models have none of it. Threads are the library's own, as `waterfill generate` has
them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

from benchmarks.kernels.decode import NEW_TOKENS, PEER, PROMPT_TOKENS, RandomModel, load_peer
from benchmarks.peers.processes import PeerProcess, open_peers
from benchmarks.shared.make_checkpoint import LLAMA_3_2_1B
from benchmarks.shared.report import BenchmarkReport, median_spread
from benchmarks.shared.rounds import Effort, Round, Series, ratios, undisturbed
from waterfill.base import native

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "smollm2-135m": LLAMA_3_2_1B
    | {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
    },
    "qwen2.5-0.5b": LLAMA_3_2_1B
    | {
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151936,
    },
    "llama-3.2-1b": LLAMA_3_2_1B,
}
QUICK_SHAPES = ("smollm2-135m",)
CODECS = {3.0: "bitshift-3", 4.5: "bitshift-4.5"}
KINDS = {3.0: ("Q3_K", "Q4_0"), 4.5: ("Q4_0", "Q4_K")}  # Q4_0: any rows that 32 divides
BLOCK = 256  # weights of a row that types but Q4_0 put together
READING = 512
GOALS = {"avx2": 1.0, "avx512": 1.2, "avx512vbmi": 1.2}  # of llama.cpp's fastest
ROUNDS, QUICK_ROUNDS, PATIENCE_S = 3, 2, 60.0
WRITTEN, READ = "tokens/s", f"tokens/s of {READING} read"


def measure_whole_models(report: BenchmarkReport, python: str, quick: bool) -> None:
    """Every shape at every rate, ours and theirs in the same rounds."""
    rows: list[list[Any]] = []
    with open_peers(report, python, ["llama.cpp"]) as peers:
        for shape in QUICK_SHAPES if quick else SHAPES:
            samples = _samples(report, shape, peers, QUICK_ROUNDS if quick else ROUNDS)
            rows += [[shape, name, *median_spread(s[WRITTEN]), *median_spread(s[READ])] for name, s in samples.items()]
            _beside_peers(report, shape, samples)
    columns = ["shapes", "model", WRITTEN, "±", READ, "± of it"]
    report.table(
        f"whole models, {native.isa()}: {NEW_TOKENS} tokens, {READING} read", columns, rows, key="whole_models"
    )


def _samples(report: BenchmarkReport, shape: str, peers: Sequence[PeerProcess], rounds: int) -> Series:
    shapes = dict(SHAPES[shape])
    wanted = dict.fromkeys(kind for kinds in KINDS.values() for kind in kinds)
    widths = shapes["hidden_size"], shapes["intermediate_size"]
    fitting = [kind for kind in wanted if kind == "Q4_0" or not any(width % BLOCK for width in widths)]
    ours = [RandomModel(codec, shapes) for codec in CODECS.values()]
    with tempfile.TemporaryDirectory() as folder, native.own_threads():
        kinds = [kind for peer in peers for kind in fitting if load_peer(report, peer, kind, shapes, folder)]
        return undisturbed(report, shape, Effort(rounds, PATIENCE_S), partial(_round, ours, peers, kinds))


def _round(ours: Sequence[RandomModel], peers: Sequence[PeerProcess], kinds: Sequence[str]) -> Round:
    figures = {
        model.codec: {
            WRITTEN: model.decode(PROMPT_TOKENS, NEW_TOKENS)[0],
            READ: READING / model.prefill(READING),
        }
        for model in ours
    }
    for kind in kinds:
        seconds = peers[0].call("decode", kind=kind, prompt=PROMPT_TOKENS, tokens=NEW_TOKENS)
        reading = peers[0].call("prefill", kind=kind, tokens=READING)
        figures[PEER.format(kind)] = {WRITTEN: len(seconds) / sum(seconds), READ: READING / reading}
    return figures


def _beside_peers(report: BenchmarkReport, shape: str, samples: Series) -> None:
    """Each rate beside the fastest that llama.cpp has of comparable bits."""
    goal = GOALS.get(native.isa() or "", 1.0)
    for (bits, codec), (what, figure) in product(CODECS.items(), (("writing", WRITTEN), ("reading", READ))):
        rivals = [samples[name][figure] for kind in KINDS[bits] if (name := PEER.format(kind)) in samples]
        if not rivals:
            continue
        best = max(rivals, key=lambda rates: median_spread(rates)[0])
        faster = median_spread(ratios(samples[codec][figure], best))[0]
        name = f"{shape}_{what}_{bits:g}_bits_over_llama_cpp"
        report.criterion(name, round(faster, 2), f">= {goal}", faster >= goal)
