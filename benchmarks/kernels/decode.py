"""Tokens per second of a whole model: random codes in the shapes of Llama-3.2-1B, beside llama.cpp's at equal bits.

    shapes ──► random codes in the kernels' layout ──► the engine's model ──► tokens, as `waterfill generate` makes them

Time does not depend on the values of weights, so none are encoded. The least time of a token is that of reading every
matrix once; the embedding is read too, since it is the output head.
"""

from __future__ import annotations

import argparse
import mmap
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.peers.processes import PeerError, PeerProcess, open_peers, peers_python
from benchmarks.shared.make_checkpoint import LLAMA_3_2_1B
from benchmarks.shared.report import BenchmarkReport, median_spread
from benchmarks.shared.rounds import Effort, Round, Series, ratios, undisturbed
from benchmarks.shared.timing import SETTLE_S, Memory
from waterfill.base import native
from waterfill.codecs import get_codec
from waterfill.codecs.integers import native_table
from waterfill.running.engine.config import Attention
from waterfill.running.engine.families.llama import LlamaModel
from waterfill.running.engine.families.llama_spec import EMBEDDING, FINAL_NORM, NORMS, PROJECTIONS, Spec
from waterfill.running.engine.weights import Resident, kernels
from waterfill.running.text.generation import Run
from waterfill.running.text.next_token import Rules

SMALL = LLAMA_3_2_1B | {"num_hidden_layers": 4, "vocab_size": 32768}  # for --quick
CODECS = {2: ("higgs-p2-n16",), 3: ("higgs-p2-n64",), 4: ("higgs-p1-n16", "higgs-p2-n256")}
QUICK_CODECS = {2: CODECS[2]}
PEER_TYPES = {2: ("Q2_K",), 3: ("Q3_K",), 4: ("Q4_0", "Q4_K")}
SCALE = 0.02  # standard deviation of the weights

PROMPT_TOKENS = 16
NEW_TOKENS = 48
PREFILL_TOKENS = 256

LIMIT_GOAL = 0.75  # of the tokens per second that the bandwidth of DRAM allows

# Figures of a model
DECODE, PREFILL, TOKEN_MS = "tokens/s", "prefill tokens/s", "ms, median token"
OF_LIMIT, IN_PRODUCTS = "of the DRAM limit", "time in products"
PEER = "llama.cpp {}"

GOALS = (("decode", DECODE, 1.5), ("prefill", PREFILL, 1.0))  # times llama.cpp's


@dataclass(frozen=True)
class Size:
    """What remains of a model once it is measured."""

    codec: str
    weights: int
    size_bytes: int


class RandomModel:
    """The engine's model with random codes, all of one codec, and no head of its own."""

    def __init__(self, codec: str, shapes: dict[str, Any]) -> None:
        self.codec = codec
        self._library, isa = kernels()
        self._table, self._isa = native_table(get_codec(codec), native.isa()), isa
        self._arrays: list[Any] = []
        self.spec = spec_of(shapes)
        spec, sizes = self.spec, {"q": "heads", "k": "kv_heads", "v": "kv_heads"}
        inner = {"gate": spec.inner, "up": spec.inner, "down": spec.hidden, "o": spec.hidden}
        rows = {key: getattr(spec, name) * spec.head_dim for key, name in sizes.items()} | inner
        widths = {"o": spec.heads * spec.head_dim, "down": spec.inner}
        self.views = {EMBEDDING: self._matrix(spec.vocabulary, spec.hidden)} | {
            f"model.layers.{layer}.{name}": self._matrix(rows[key], widths.get(key, spec.hidden))
            for layer in range(spec.layers)
            for key, name in PROJECTIONS.items()
        }
        norms = [
            FINAL_NORM,
            *(f"model.layers.{i}.{name}.weight" for i in range(spec.layers) for name in NORMS.values()),
        ]
        vectors = {name: np.ones(spec.hidden, np.float32) for name in norms}
        self.model = LlamaModel(spec, Resident(self.views, spec, self._arrays), vectors, pass_tokens=PREFILL_TOKENS)
        self.size_bytes = sum(array.nbytes for array in self._arrays)
        self.weights = sum(view.rows * view.width for view in self.views.values())

    def decode(self, prompt: int, tokens: int) -> tuple[float, list[float]]:
        """(tokens per second after the first one, seconds of each)."""
        ends = [time.perf_counter() for _ in self._run(prompt, tokens)]
        return (len(ends) - 1) / (ends[-1] - ends[0]), [b - a for a, b in pairwise(ends)]

    def prefill(self, tokens: int) -> float:
        """Seconds to the first token."""
        start = time.perf_counter()
        next(self._run(tokens, 1))
        return time.perf_counter() - start

    def products(self) -> float:
        """Seconds of the packed products of one token and nothing else, one after the other."""
        x = np.ones((1, max(view.width for view in self.views.values())), np.float32)
        y = np.empty(max(view.rows for view in self.views.values()), np.float32)
        result = native.addresses_of([y.ctypes.data])
        start = time.perf_counter()
        for view in self.views.values():
            one = native.matrices_of([view])
            self._library.matmul(self._isa, one, x.ctypes.data, result, dtype=native.FLOAT32, tokens=1)
        return time.perf_counter() - start

    def _run(self, prompt: int, tokens: int) -> Iterator[list[int]]:
        ids = list(range(1, prompt + 1))
        return Run(self.model.sequence(), ids, tokens, Rules.greedy(), frozenset(), None, seed=0).tokens()

    def _matrix(self, rows: int, width: int) -> native.MatrixView:
        step, table = self._table
        codes = random_bytes(self._library.codes_bytes(table=table, rows=rows, width=width))
        scales = np.full(self._library.scales_count(rows=rows, width=width), SCALE, np.float16)
        self._arrays += [codes, scales]
        places = codes.ctypes.data, scales.ctypes.data, codes.nbytes, scales.size
        return native.MatrixView(rows, width, step, 1.0, table, *places)


def spec_of(shapes: dict[str, Any]) -> Spec:
    head_dim = shapes["hidden_size"] // shapes["num_attention_heads"]
    return Spec(
        layers=shapes["num_hidden_layers"],
        hidden=shapes["hidden_size"],
        heads=shapes["num_attention_heads"],
        kv_heads=shapes["num_key_value_heads"],
        head_dim=head_dim,
        inner=shapes["intermediate_size"],
        vocabulary=shapes["vocab_size"],
        positions=shapes["max_position_embeddings"],
        epsilon=1e-5,
        dtype="BF16",
        frequencies=np.ones((1, head_dim // 2), np.float32),
        tied=True,
        vectors=(),
        scaling=float(head_dim**-0.5),
        attention=(Attention(),) * shapes["num_hidden_layers"],
    )


def random_bytes(count: int) -> npt.NDArray[np.uint8]:
    """In huge pages where the system gives them, as the library asks for when it arranges weights."""
    memory = mmap.mmap(-1, count)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    found = np.frombuffer(memory, np.uint8)
    found[:] = np.resize(np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8), count)
    return found


def measure_decode(report: BenchmarkReport, memory: Memory, arguments: argparse.Namespace) -> None:
    """Ours and llama.cpp's models of the same bits in turn."""
    shapes = SMALL if arguments.quick else LLAMA_3_2_1B
    effort = Effort(2 if arguments.quick else 8, arguments.patience)
    samples: dict[str, Mapping[str, list[float]]] = {}
    models = []
    with (
        open_peers(report, peers_python(arguments.peers_python), ("llama.cpp",)) as peers,
        tempfile.TemporaryDirectory() as folder,
    ):
        for bits, codecs in (QUICK_CODECS if arguments.quick else CODECS).items():
            ours = [RandomModel(codec, shapes) for codec in codecs]
            kinds = [
                kind for peer in peers for kind in PEER_TYPES[bits] if load_peer(report, peer, kind, shapes, folder)
            ]
            measure = partial(one_round, memory, ours, peers, kinds)
            samples |= undisturbed(report, f"decode at {bits} bits", effort, measure)
            models += [Size(model.codec, model.weights, model.size_bytes) for model in ours]
    report_models(report, models, samples)
    report_peers(report, samples)


def one_round(memory: Memory, ours: Sequence[RandomModel], peers: Sequence[PeerProcess], kinds: Sequence[str]) -> Round:
    figures = {model.codec: measure_model(model, memory) for model in ours}
    for kind in kinds:
        seconds = peers[0].call("decode", kind=kind, prompt=PROMPT_TOKENS, tokens=NEW_TOKENS)
        prefill = peers[0].call("prefill", kind=kind, tokens=PREFILL_TOKENS)
        figures[PEER.format(kind)] = {DECODE: len(seconds) / sum(seconds), PREFILL: PREFILL_TOKENS / prefill}
    return figures


def measure_model(model: RandomModel, memory: Memory) -> dict[str, float]:
    before = memory.gbps()
    time.sleep(SETTLE_S)
    rate, seconds = model.decode(PROMPT_TOKENS, NEW_TOKENS)
    bandwidth = (before + memory.gbps()) / 2
    token_s = median_spread(seconds)[0]
    products_s = median_spread([model.products() for _ in range(5)])[0]
    return {
        DECODE: rate,
        PREFILL: PREFILL_TOKENS / model.prefill(PREFILL_TOKENS),
        TOKEN_MS: 1e3 * token_s,
        OF_LIMIT: rate * model.size_bytes / (bandwidth * 1e9),
        IN_PRODUCTS: products_s / token_s,
    }


def load_peer(report: BenchmarkReport, peer: PeerProcess, kind: str, shapes: dict[str, Any], folder: str) -> bool:
    """Whether llama.cpp has loaded a model of this type of weights."""
    try:
        peer.call("load", kind=kind, shapes=shapes, folder=folder, threads=torch.get_num_threads())
    except PeerError as error:
        report.note(f"llama.cpp {kind} is left out: {error}")
        return False
    return True


def report_models(report: BenchmarkReport, models: Sequence[Size], samples: Series) -> None:
    rows = []
    for model in models:
        series = samples[model.codec]
        figures = [
            value for figure in (DECODE, TOKEN_MS, OF_LIMIT, IN_PRODUCTS) for value in median_spread(series[figure])
        ]
        rows.append([model.codec, 8 * model.size_bytes / model.weights, model.size_bytes / 1e6, *figures[:-1]])
        share = median_spread(series[OF_LIMIT])[0]
        report.criterion(f"decode_share_of_limit_{model.codec}", share, f">= {LIMIT_GOAL}", share >= LIMIT_GOAL)
    columns = ["codec", "bits", "MB/token", DECODE, "±", TOKEN_MS, "± ms", OF_LIMIT, "± of it", IN_PRODUCTS]
    title = f"{models[0].weights / 1e6:.0f} million weights: {NEW_TOKENS} tokens after a prompt of {PROMPT_TOKENS}"
    report.table(title, columns, rows, key="decode")


def report_peers(report: BenchmarkReport, samples: Series) -> None:
    """Ours beside the best peer of the same bits."""
    rows = [[name, *median_spread(s[DECODE]), *median_spread(s[PREFILL])] for name, s in samples.items()]
    columns = ["model", f"decode, {DECODE}", "±", f"prefill of {PREFILL_TOKENS}, tokens/s", "± "]
    report.table("whole models", columns, rows, key="models")
    for bits, codecs in CODECS.items():
        for (what, figure, goal), codec in product(GOALS, codecs):
            names = [PEER.format(kind) for kind in PEER_TYPES[bits]]
            rivals = [samples[name][figure] for name in names if name in samples]
            if rivals and codec in samples:
                best = max(rivals, key=lambda rates: median_spread(rates)[0])
                ratio = median_spread(ratios(samples[codec][figure], best))[0]
                report.criterion(f"{what}_over_llama_cpp_{codec}", ratio, f">= {goal}", ratio >= goal)
