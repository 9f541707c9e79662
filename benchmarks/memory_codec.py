"""The bitshift trellis beside the grids that `--for memory` had alone before, and the entropy-coded trellis.

    gaussian   how many bits more than the Shannon bound its codes take, and how many weights are encoded per second
    products   cold weights times one vector and eight, as a share of the bandwidth of DRAM
    peers      the same times one vector beside ggml's types, with what each loses of Gaussian weights
    tokens     tokens per second of whole models from their codes, beside llama.cpp
    equal      KL of --models at equal bytes: planned for memory with grids alone, with all, and for storage

Nothing has error feedback here, which either codec takes. Minutes for each model of 100 million weights. With --quick,
one rate of everything, and the example model.
"""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import waterfill
from benchmarks.peers.processes import open_peers, peer_products, peers_python
from benchmarks.rate_distortion.gaussian import SEED, code
from benchmarks.shared.report import EXAMPLE_MODEL, BenchmarkReport, held_out_text, median_spread, parse_arguments
from benchmarks.shared.rounds import Effort, ratios
from benchmarks.shared.timing import COLD_BYTES, GBPS, NS, SHARE, Memory, interleave, packed_products
from benchmarks.whole_models import measure_whole_models
from waterfill.base import native
from waterfill.codecs import get_codec
from waterfill.codecs.bitshift.code import REGISTERS, code_of

PARTS = ("gaussian", "products", "peers", "tokens", "equal")
MATRIX, QUICK_MATRIX = (1024, 4096), (128, 4096)
GAP_GOALS = {2.0: 0.11, 3.0: 0.15, 4.0: 0.23}  # bits
ENCODING_GOAL = 1.5  # million weights per second and core
SHAPE = (4096, 4096)
GRIDS = {2.0: "higgs-p2-n16", 3.0: "higgs-p2-n64", 4.0: "higgs-p2-n256"}
TOKENS = (1, 8)
PEERS = {  # a type of ggml, and the rate that is nearest to its bits
    "IQ2_XXS": 2.0,
    "IQ2_XS": 2.5,
    "Q2_K": 2.5,
    "IQ3_XXS": 3.0,
    "Q3_K": 3.5,
    "IQ4_XS": 4.0,
    "Q4_K": 4.5,
}
PEER_SPEED_GOALS = {"avx2": 1.0, "avx512": 1.2, "avx512vbmi": 1.2}  # of each type's speed
PEER_LOSS_GOAL = 0.5  # of its t²
EQUAL_BITS, QUICK_EQUAL_BITS = (2.25, 3.0, 3.5, 4.25), (3.0,)
BEFORE_GOAL, STORAGE_GOAL = 0.70, 1.35
CONTEXT, WINDOWS = 512, 12
ROUNDS, QUICK_ROUNDS, PATIENCE_S = 15, 3, 60.0


def main() -> None:
    arguments = parse_arguments(
        __doc__,
        part={"choices": PARTS, "nargs": "+", "default": list(PARTS), "help": f"of {', '.join(PARTS)}"},
        peers_python={"type": Path, "metavar": "FILE", "help": "interpreter that has ggml's library installed"},
        models={"type": Path, "nargs": "+", "default": [EXAMPLE_MODEL], "help": "checkpoints to measure"},
    )
    report = BenchmarkReport("a fixed rate near the bound")
    if "gaussian" in arguments.part:
        measure_gaussian(report, arguments.quick)
    if "products" in arguments.part:
        measure_products(report, arguments.quick)
    if "peers" in arguments.part:
        compare_with_ggml(report, peers_python(arguments.peers_python), arguments.quick)
    if "tokens" in arguments.part:
        measure_whole_models(report, peers_python(arguments.peers_python), arguments.quick)
    if "equal" in arguments.part:
        text = held_out_text(report)
        measure_equal(report, arguments.models, text, QUICK_EQUAL_BITS if arguments.quick else EQUAL_BITS)
    report.save(arguments.json)


def measure_gaussian(report: BenchmarkReport, quick: bool) -> None:
    """Every rate, on as many weights as there are."""
    shape, rows, worst = (QUICK_MATRIX if quick else MATRIX), [], math.inf
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
    for rate in (3.0,) if quick else REGISTERS:
        codec = get_codec(f"bitshift-{rate:g}")
        start_s = time.perf_counter()
        bits, t2, _ = code(codec, weight)
        speed = weight.numel() / (time.perf_counter() - start_s) / torch.get_num_threads() / 1e6
        worst = min(worst, speed)
        above = rate + 0.5 * math.log2(t2)
        rows.append([rate, round(bits, 4), t2, above, bits + 0.5 * math.log2(t2), round(speed, 2)])
        if goal := GAP_GOALS.get(rate):
            report.criterion(f"gaussian_bits_over_bound_{rate:g}", round(above, 4), f"<= {goal}", above <= goal)
    columns = ["bits", "stored bits", "t²", "bits over the bound", "with all that is stored", "M weights/s and core"]
    report.table(f"Gaussian weights {shape[0]}x{shape[1]}, encoded and decoded", columns, rows, key="gaussian")
    report.criterion("encoding_m_weights_per_s_and_core", worst, f">= {ENCODING_GOAL}", worst >= ENCODING_GOAL)


def measure_products(report: BenchmarkReport, quick: bool) -> None:
    """Beside grids of the same bits, and levels of 8."""
    memory = Memory(report, COLD_BYTES // 4 if quick else COLD_BYTES, PATIENCE_S)
    names = [name for rate, grid in GRIDS.items() for name in (f"bitshift-{rate:g}", grid)] + ["levels-8"]
    rows = []
    for tokens in TOKENS:
        products = [packed_products(memory, name, SHAPE, tokens) for name in names]
        effort = Effort(QUICK_ROUNDS if quick else ROUNDS, PATIENCE_S)
        samples = interleave(report, f"{tokens} vectors", memory, products, effort)
        for product in products:
            figures = {what: median_spread(values) for what, values in samples[product.name].items()}
            times = (each / tokens for each in figures[NS])
            rows.append([product.name, tokens, *times, figures[GBPS][0], *figures[SHARE]])
        for rate, grid in GRIDS.items():
            ours, theirs = (median_spread(samples[name][NS])[0] for name in (f"bitshift-{rate:g}", grid))
            over = theirs / ours
            report.criterion(f"speed_over_grid_{tokens}_vectors_{rate:g}_bits", round(over, 2), ">= 1", over >= 1)
    columns = ["codec", "vectors", "ns per weight and vector", "±", "GB/s", "share of DRAM", "± share"]
    report.table(f"cold weights {SHAPE[0]}x{SHAPE[1]}", columns, rows, key="products")


def compare_with_ggml(report: BenchmarkReport, python: str, quick: bool) -> None:
    """Each of ggml's types beside the rate that is nearest to its bits, in the same rounds."""
    memory = Memory(report, COLD_BYTES // 4 if quick else COLD_BYTES, PATIENCE_S)
    with open_peers(report, python, ["ggml"]) as processes:
        if not processes:
            return
        rates = {rate: packed_products(memory, f"bitshift-{rate:g}", SHAPE) for rate in sorted(set(PEERS.values()))}
        kinds = [f"ggml {kind}" for kind in PEERS]
        theirs = {product.name: product for product in peer_products(report, processes, SHAPE, COLD_BYTES, kinds)}
        left = {kind: processes[0].call("relative_error", kind=kind) for kind in PEERS}
        effort = Effort(QUICK_ROUNDS if quick else ROUNDS, PATIENCE_S)
        samples = interleave(report, "beside ggml", memory, [*rates.values(), *theirs.values()], effort)
    rows, goal = [], PEER_SPEED_GOALS.get(native.isa() or "", 1.0)
    for kind, rate in PEERS.items():
        peer, own = theirs[f"ggml {kind}"], rates[rate]
        faster, spread = median_spread(ratios(samples[peer.name][NS], samples[own.name][NS]))
        times = [median_spread(samples[product.name][NS])[0] for product in (peer, own)]
        bits = [8 * product.size_bytes / product.weights for product in (peer, own)]
        t2 = code_of(rate).t2
        rows.append([kind, bits[0], times[0], left[kind], own.name, bits[1], times[1], t2, faster, spread])
        report.criterion(f"speed_over_{kind.lower()}", round(faster, 2), f">= {goal}", faster >= goal)
        less = t2 / left[kind]
        report.criterion(f"t2_of_{kind.lower()}", round(less, 3), f"<= {PEER_LOSS_GOAL}", less <= PEER_LOSS_GOAL)
    columns = ["ggml", "bits", "ns/weight", "t²", "codec", "its bits", "its ns/weight", "its t²", "times faster", "±"]
    report.table(f"beside ggml, {native.isa()}: cold weights {SHAPE[0]}x{SHAPE[1]}", columns, rows, key="peers")


def measure_equal(report: BenchmarkReport, models: list[Path], text: Path, rates: tuple[float, ...]) -> None:
    """Three plans of each model at each rate, packed and measured."""
    rows = []
    for model in models:
        for bits in rates:
            size_bytes = waterfill.plan(model, bits=bits, purpose="memory", feedback="none").size_bytes
            options = {"size": size_bytes, "feedback": "none"}
            kl = {
                "grids": _kl(model, text, purpose="memory", codecs=["higgs-*", "raw"], **options),
                "memory": _kl(model, text, purpose="memory", **options),
                "storage": _kl(model, text, **options),
            }
            before, storage = kl["memory"] / kl["grids"], kl["memory"] / kl["storage"]
            figures = [*(round(each, 5) for each in kl.values()), round(before, 3), round(storage, 3)]
            rows.append([model.name, bits, *figures])
            name = f"{model.name}_{bits:g}"
            report.criterion(f"{name}_of_grids", round(before, 3), f"<= {BEFORE_GOAL}", before <= BEFORE_GOAL)
            report.criterion(f"{name}_of_storage", round(storage, 3), f"<= {STORAGE_GOAL}", storage <= STORAGE_GOAL)
    columns = ["checkpoint", "bits", "KL, grids alone", "KL, for memory", "KL, for storage", "of grids", "of storage"]
    report.table(f"equal bytes, {WINDOWS} windows of {CONTEXT} tokens", columns, rows, key="equal")


def _kl(model: Path, text: Path, **options: Any) -> float:
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder) / "packed"
        waterfill.pack(model, packed, **options)
        loss = waterfill.evaluate(packed, model, text, context=CONTEXT, max_windows=WINDOWS)
    assert loss.kl is not None
    return loss.kl


if __name__ == "__main__":
    main()
