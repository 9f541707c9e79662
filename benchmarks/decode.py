"""Tokens per second of a whole model: random codes in the shapes of Llama-3.2-1B, beside llama.cpp's at equal bits.

    LlamaConfig ──► model without weights ──install──► packed modules ◄── random codes, scales of plausible size
                                                             └──arrange──► generate, as `waterfill generate` does

Time does not depend on the values of weights, so none are encoded. The least time of a token is that of reading every
matrix once; the embedding is read too, since it is the output head.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.initialization import no_init_weights

from common import EXAMPLE_MODEL, Report, median_spread
from kernel_peers import PeerError, PeerProcess, open_peers, peers_python
from make_checkpoint import LLAMA_3_2_1B
from rounds import Effort, Round, Series, ratios, undisturbed
from timing import SETTLE_S, Memory
from waterfill import kernels
from waterfill.artifact import StoredTensor
from waterfill.codecs import get_codec
from waterfill.hf import WaterfillConfig, WaterfillQuantizer
from waterfill.runtime.generate import generate
from waterfill.runtime.install import install
from waterfill.runtime.packed import PackedMatrix

SMALL = LLAMA_3_2_1B | {"num_hidden_layers": 4, "vocab_size": 32768}  # for --quick
CODECS = {2: ("higgs-p2-n16",), 3: ("higgs-p2-n64",), 4: ("higgs-p1-n16", "higgs-p2-n256")}
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


class Prompt:
    """A tokenizer whose every prompt is the same tokens; ids beyond its vocabulary decode as others do."""

    bos_token_id = 1

    def __init__(self, tokenizer: Any, tokens: int) -> None:
        self._tokenizer, self._ids = tokenizer, list(range(1, tokens + 1))

    def __call__(self, _: str) -> dict[str, list[int]]:
        return {"input_ids": self._ids}

    def decode(self, ids: Any, **options: Any) -> str:
        text: str = self._tokenizer.decode([int(i) % len(self._tokenizer) for i in ids], **options)
        return text


@dataclass(frozen=True)
class Size:
    """What remains of a model once it is measured."""

    codec: str
    weights: int
    size_bytes: int


class PackedModel:
    """A model of random codes, all of one codec."""

    def __init__(self, codec: str, shapes: dict[str, Any]) -> None:
        self.codec = codec
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(LlamaConfig(**shapes), dtype=torch.bfloat16).eval()
        install(model, list(stored_tensors(model, codec)))
        for module in model.modules():
            if isinstance(module, PackedMatrix):
                module.scales = torch.full(module.scales.shape, SCALE, dtype=torch.float16)
                module.codes = random_bytes(module.codes.numel())
        WaterfillQuantizer(WaterfillConfig(verified=True))._process_model_after_weight_loading(model)
        model.generation_config.eos_token_id = None
        self.model = model
        self.matrices = [module.packed for module in model.modules() if isinstance(module, PackedMatrix)]
        self.size_bytes = sum(matrix.codes.nbytes + matrix.scales.nbytes for matrix in self.matrices)
        self.weights = sum(matrix.shape[0] * matrix.shape[1] for matrix in self.matrices)
        self._inputs = {width: torch.randn(1, width, dtype=torch.bfloat16) for _, width in shapes_of(self.matrices)}
        self._tokenizer = AutoTokenizer.from_pretrained(EXAMPLE_MODEL)
        self._starts: list[float] = []
        model.register_forward_pre_hook(lambda *_: self._starts.append(time.perf_counter()))

    def decode(self, prompt: int, tokens: int) -> tuple[float, list[float]]:
        """(tokens per second after the first one, seconds from one call of the model to the next)."""
        self._starts.clear()
        stats = self._generate(prompt, tokens)
        after_prompt = self._starts[1:]
        return stats.tokens_per_second, [b - a for a, b in pairwise(after_prompt)]

    def prefill(self, tokens: int) -> float:
        """Seconds to the first token."""
        return float(self._generate(tokens, 1).first_token_s)

    @torch.inference_mode()
    def products(self) -> float:
        """Seconds of the packed products of one token and nothing else, one after the other."""
        start = time.perf_counter()
        for matrix in self.matrices:
            kernels.matmul(self._inputs[matrix.shape[1]], matrix)
        return time.perf_counter() - start

    def _generate(self, prompt: int, tokens: int) -> Any:
        tokenizer = Prompt(self._tokenizer, prompt)
        generation = generate(self.model, tokenizer, "", temperature=0.0, max_new_tokens=tokens)
        for _ in generation:
            pass
        return generation.stats


def stored_tensors(model: Any, codec: str) -> Sequence[StoredTensor]:
    """What an artifact with this codec for every matrix would declare."""
    tied = model.get_output_embeddings() if model.config.tie_word_embeddings else None
    return [
        StoredTensor(name, codec, tuple(module.weight.shape), "BF16", (), 0, get_codec(codec).grid.t2)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding) and module is not tied
    ]


def random_bytes(count: int) -> torch.Tensor:
    return torch.empty(-(-count // 8), dtype=torch.int64).random_().view(torch.uint8)[:count]


def shapes_of(matrices: Sequence[kernels.Packed]) -> list[tuple[int, int]]:
    return [matrix.shape for matrix in matrices]


def measure_decode(report: Report, memory: Memory, arguments: argparse.Namespace) -> None:
    """Ours and llama.cpp's models of the same bits in turn."""
    shapes = SMALL if arguments.quick else LLAMA_3_2_1B
    effort = Effort(2 if arguments.quick else 8, arguments.patience)
    samples: dict[str, Mapping[str, list[float]]] = {}
    models = []
    with (
        open_peers(report, peers_python(arguments.peers_python), ("llama.cpp",)) as peers,
        tempfile.TemporaryDirectory() as folder,
    ):
        for bits, codecs in CODECS.items():
            ours = [PackedModel(codec, shapes) for codec in codecs]
            kinds = [
                kind for peer in peers for kind in PEER_TYPES[bits] if load_peer(report, peer, kind, shapes, folder)
            ]
            measure = partial(one_round, memory, ours, peers, kinds)
            samples |= undisturbed(report, f"decode at {bits} bits", effort, measure)
            models += [Size(model.codec, model.weights, model.size_bytes) for model in ours]
    report_models(report, models, samples)
    report_peers(report, samples)


def one_round(memory: Memory, ours: Sequence[PackedModel], peers: Sequence[PeerProcess], kinds: Sequence[str]) -> Round:
    figures = {model.codec: measure_model(model, memory) for model in ours}
    for kind in kinds:
        seconds = peers[0].call("decode", kind=kind, prompt=PROMPT_TOKENS, tokens=NEW_TOKENS)
        prefill = peers[0].call("prefill", kind=kind, tokens=PREFILL_TOKENS)
        figures[PEER.format(kind)] = {DECODE: len(seconds) / sum(seconds), PREFILL: PREFILL_TOKENS / prefill}
    return figures


def measure_model(model: PackedModel, memory: Memory) -> dict[str, float]:
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


def load_peer(report: Report, peer: PeerProcess, kind: str, shapes: dict[str, Any], folder: str) -> bool:
    """Whether llama.cpp has loaded a model of this type of weights."""
    try:
        peer.call("load", kind=kind, shapes=shapes, folder=folder, threads=torch.get_num_threads())
    except PeerError as error:
        report.note(f"llama.cpp {kind} is left out: {error}")
        return False
    return True


def report_models(report: Report, models: Sequence[Size], samples: Series) -> None:
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


def report_peers(report: Report, samples: Series) -> None:
    """Ours beside the best peer of the same bits."""
    rows = [[name, *median_spread(s[DECODE]), *median_spread(s[PREFILL])] for name, s in samples.items()]
    columns = ["model", f"decode, {DECODE}", "±", f"prefill of {PREFILL_TOKENS}, tokens/s", "± "]
    report.table("whole models", columns, rows, key="models")
    for bits, codecs in CODECS.items():
        for (what, figure, goal), codec in product(GOALS, codecs):
            names = [PEER.format(kind) for kind in PEER_TYPES[bits]]
            rivals = [samples[name][figure] for name in names if name in samples]
            if rivals:
                best = max(rivals, key=lambda rates: median_spread(rates)[0])
                ratio = median_spread(ratios(samples[codec][figure], best))[0]
                report.criterion(f"{what}_over_llama_cpp_{codec}", ratio, f">= {goal}", ratio >= goal)
