"""Speed of the native kernels: against the memory they read from, against other libraries, and in whole models.

    gemv      cold weights times one vector, as a share of the bandwidth of DRAM
    peers     the same beside torch, ONNX Runtime, OpenVINO and ggml, at 4, 3 and 2 bits
    gemm      cold weights times 1 to 512 vectors, beside torch
    fwht      the Hadamard transform on one core, in L1
    accuracy  what integer activations and table entries add to the loss of the example model
    decode    tokens per second of random weights in the shapes of Llama-3.2-1B, beside llama.cpp

Everything runs on torch.get_num_threads() threads unless said otherwise. What is compared is timed in turn within each
round, and the median over rounds is taken of the ratio, so that what slows the machine weighs on both sides. It has to
be idle all the same: two threads that wait for each other lose far more to a third than two that do not.

Peers run in processes of their own: under --peers-python, under WATERFILL_PEERS_PYTHON, or beside waterfill. Those not
installed are left out. Peak memory is about 10 GB.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.kernels.activations import measure_accuracy
from benchmarks.kernels.decode import measure_decode
from benchmarks.peers.processes import (
    FAMILIES,
    open_peers,
    peer_products,
    peers_python,
    torch_dense,
    torch_int8,
    torch_products,
)
from benchmarks.shared.report import BenchmarkReport, median_spread, parse_arguments
from benchmarks.shared.rounds import Effort, Round, Series, ratios, undisturbed
from benchmarks.shared.timing import (
    COLD_BYTES,
    GBPS,
    NS,
    SHARE,
    ColdProduct,
    Memory,
    Shape,
    TimedProduct,
    interleave,
    kernels,
    packed_products,
)
from waterfill.base import native

SHAPES: tuple[Shape, ...] = ((4096, 4096), (11008, 4096))
SQUARE = SHAPES[0]

# Share of the bandwidth of DRAM
GEMV_GOALS = {
    "higgs-p1-n4": 0.85,
    "higgs-p1-n8": 0.85,
    "higgs-p1-n16": 0.85,
    "higgs-p2-n16": 0.85,
    "higgs-p2-n64": 0.85,
    "higgs-p2-n256": 0.60,
}

# Codecs and peers of comparable bits, and how many times faster the best codec should be than the best peer
OURS = {4: ("higgs-p1-n16", "higgs-p2-n256"), 3: ("higgs-p2-n64", "higgs-p1-n8"), 2: ("higgs-p2-n16", "higgs-p1-n4")}
PEERS = {
    4: ("torch int4", "onnxruntime 4 bit", "openvino u4", "ggml Q4_0", "ggml Q4_K", "ggml IQ4_XS"),
    3: ("ggml Q3_K", "ggml IQ3_XXS"),
    2: ("onnxruntime 2 bit", "ggml Q2_K", "ggml IQ2_XXS", "ggml IQ2_XS"),
}
SPEED_GOALS = {4: 1.3, 3: 2.0, 2: 1.5}

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
GEMM_CODECS = ("higgs-p1-n16", "higgs-p2-n64", "higgs-p2-n256")
GEMM_SAMPLE_S = 0.03
FALL_GOAL = 0.9  # more tokens never lose more throughput than this

QUICK_ROUNDS = 3
PATIENCE_S, QUICK_PATIENCE_S = 60.0, 0.5

BLOCKS = tuple(2**k for k in range(1, 11))
L1_FLOATS = 4096  # 16 KiB, half of the smallest L1 in use
ROTATIONS = 3000
FWHT_GOAL = 10.0  # GB/s

COLUMNS = ["product", "bits", NS, "± ns/weight", GBPS, "± GB/s", SHARE, "± share"]


def main() -> None:
    names = list(SECTIONS)
    arguments = parse_arguments(
        __doc__,
        only={"choices": names, "nargs": "+", "default": names, "metavar": "NAME", "help": f"of {', '.join(names)}"},
        patience={"type": float, "metavar": "SECONDS", "help": "time to repeat the disturbed rounds of a series for"},
        peers_python={"type": Path, "metavar": "FILE", "help": "interpreter that has the peers installed"},
    )
    kernels()
    report = BenchmarkReport("the native kernels")
    report.note(f"{torch.get_num_threads()} threads, {native.isa()}")
    if arguments.patience is None:
        arguments.patience = QUICK_PATIENCE_S if arguments.quick else PATIENCE_S
    memory = Memory(report, COLD_BYTES // 2 if arguments.quick else COLD_BYTES, arguments.patience)
    for name in names:
        if name in arguments.only:
            SECTIONS[name](report, memory, arguments)
    report.save(arguments.json)


def measure_gemv(report: BenchmarkReport, memory: Memory, arguments: argparse.Namespace) -> None:
    """Each codec at each shape, as a share of the bandwidth measured around it."""
    for shape in SHAPES[:1] if arguments.quick else SHAPES:
        products = [packed_products(memory, codec, shape) for codec in GEMV_GOALS]
        size = f"{shape[0]}x{shape[1]}"
        samples = interleave(report, f"gemv {size}", memory, products, effort_of(arguments, 25))
        rows = [row_of(product, samples[product.name]) for product in products]
        report.table(f"cold weights {size} times one vector", COLUMNS, rows, key=f"gemv_{size}")
        for codec, goal in GEMV_GOALS.items():
            share = median_spread(samples[codec][SHARE])[0]
            report.criterion(f"gemv_{size}_share_of_dram_{codec}", share, f">= {goal}", share >= goal)


def effort_of(arguments: argparse.Namespace, rounds: int) -> Effort:
    return Effort(QUICK_ROUNDS if arguments.quick else rounds, arguments.patience)


def row_of(product: TimedProduct, samples: Mapping[str, list[float]]) -> list[object]:
    figures = [value for figure in (NS, GBPS, SHARE) for value in median_spread(samples[figure])]
    return [product.name, 8 * product.size_bytes / product.weights, *figures]


def compare_peers(report: BenchmarkReport, memory: Memory, arguments: argparse.Namespace) -> None:
    """Codecs and peers of comparable bits in the same rounds."""
    with open_peers(report, peers_python(arguments.peers_python), FAMILIES) as processes:
        for shape in SHAPES[:1] if arguments.quick else SHAPES:
            products: list[TimedProduct] = [
                packed_products(memory, codec, shape) for codecs in OURS.values() for codec in codecs
            ]
            products += torch_products(shape, memory.size_bytes)
            products += peer_products(report, processes, shape, memory.size_bytes)
            what = f"peers {shape[0]}x{shape[1]}"
            samples = interleave(report, what, memory, products, effort_of(arguments, 25))
            report_peers(report, shape, products, samples)


def report_peers(report: BenchmarkReport, shape: Shape, products: Sequence[TimedProduct], samples: Series) -> None:
    size = f"{shape[0]}x{shape[1]}"
    rows = [row_of(product, samples[product.name]) for product in products]
    report.table(f"beside other libraries: cold weights {size} times one vector", COLUMNS, rows, key=f"peers_{size}")
    median = {name: median_spread(series[NS])[0] for name, series in samples.items()}
    speeds = []
    for bits, codecs in OURS.items():
        ours = min(codecs, key=lambda codec: median[codec])
        rivals = [("same bits", PEERS[bits])]
        if bits == 3:  # one library has 3 bits; who needs speed takes 4
            rivals.append(("3 or 4 bits", PEERS[3] + PEERS[4]))
        for compared, peers in rivals:
            there = [peer for peer in peers if peer in median]
            if not there:
                continue
            best = min(there, key=lambda peer: median[peer])
            for codec in codecs:
                faster, spread = median_spread(ratios(samples[best][NS], samples[codec][NS]))
                speeds.append([bits, codec, compared, best, faster, spread])
                if codec == ours and compared == "same bits":
                    name, goal = f"speed_{size}_{bits}_bits_over_best_peer", SPEED_GOALS[bits]
                    report.criterion(name, faster, f">= {goal}", faster >= goal)
    columns = ["bits", "codec", "against", "best peer", "times faster", "±"]
    report.table(f"speed against the best peer, {size}", columns, speeds, key=f"speed_{size}")


def measure_gemm(report: BenchmarkReport, memory: Memory, arguments: argparse.Namespace) -> None:
    """Throughput by tokens: where it falls, the switch from one kernel to another comes too early or too late."""
    counts = TOKENS[::3] if arguments.quick else TOKENS
    gops: dict[str, list[tuple[float, float]]] = {}
    for tokens in counts:
        dense = COLD_BYTES // 2  # what does not fit any cache here; float32 weights are large
        products = [packed_products(memory, codec, SQUARE, tokens) for codec in GEMM_CODECS]
        products += [torch_dense(SQUARE, dtype, dense, tokens) for dtype in (torch.float32, torch.bfloat16)]
        products += [torch_int8(SQUARE, dense, tokens)]
        for name, series in throughput(report, products, tokens, effort_of(arguments, 11)).items():
            gops.setdefault(name, []).append(median_spread(series["GOP/s"]))
    rows = [[name, *(round(median) for median, _ in series)] for name, series in gops.items()]
    title = f"GOP/s of cold weights {SQUARE[0]}x{SQUARE[1]} times so many tokens"
    report.table(title, ["product", *map(str, counts)], rows, key="gemm_gops")
    report.results["gemm_gops_spread"] = {name: [spread for _, spread in series] for name, series in gops.items()}
    for codec in GEMM_CODECS:
        medians = [median for median, _ in gops[codec]]
        worst = min(ratios(medians[1:], medians[:-1]))
        name = f"gemm_least_gain_of_more_tokens_{codec}"
        report.criterion(name, worst, f">= {FALL_GOAL}", worst >= FALL_GOAL)
        dense = zip(gops["torch float32"], gops["torch bfloat16"], strict=True)
        floats = [max(single, half) for (single, _), (half, _) in dense]
        least = min(ratios(medians, floats))
        report.criterion(f"gemm_least_speed_over_torch_floats_{codec}", least, ">= 1", least >= 1)


def throughput(report: BenchmarkReport, products: Sequence[ColdProduct], tokens: int, effort: Effort) -> Series:
    """GOP/s of each product, a multiplication and an addition being two."""
    calls = {p.name: max(1, min(len(p.calls), int(GEMM_SAMPLE_S / max(p.seconds(2) / 2, 1e-6)))) for p in products}

    def one_round() -> Round:
        figures = {}
        for product in products:
            seconds = product.seconds(calls[product.name]) / calls[product.name]
            figures[product.name] = {"GOP/s": 2 * tokens * product.weights / len(product.calls) / seconds / 1e9}
        return figures

    return undisturbed(report, f"gemm of {tokens}", effort, one_round)


def measure_fwht(report: BenchmarkReport, _: Memory, arguments: argparse.Namespace) -> None:
    """The transform with its random signs, in place, as the activations get it; 16 KiB at a time, one thread.

    The cost of a call, found with one block, is taken off.
    """
    library, isa = kernels()
    library.set_threads(1)
    rows = []
    for block in BLOCKS:
        x = torch.randn(L1_FLOATS // block, block)
        one_round = partial(rotation, library, isa, x)
        samples = undisturbed(report, f"blocks of {block}", effort_of(arguments, 31), one_round)
        rows.append([block, *median_spread(samples["rotate"][GBPS])])
    library.set_threads(torch.get_num_threads())
    title = "Hadamard transform of blocks, one core: bytes of data (each read and written once) per second"
    report.table(title, ["block", "GB/s", "±"], rows, key="fwht")
    at_best = rows[-1][1]
    report.criterion(f"fwht_{BLOCKS[-1]}_gb_per_s", at_best, f">= {FWHT_GOAL}", at_best >= FWHT_GOAL)


def rotation(library: native.Native, isa: int, x: torch.Tensor) -> Round:
    """GB/s of one row after the other, without what a call costs."""
    seconds = []
    for rows in (1, len(x)):
        start = time.perf_counter()
        for _ in range(ROTATIONS):
            library.rotate(isa, x.data_ptr(), rows=rows, width=x.shape[1], inverse=False)
        seconds.append(time.perf_counter() - start)
    size_bytes = ROTATIONS * (len(x) - 1) * x.shape[1] * x.element_size()
    return {"rotate": {GBPS: size_bytes / 1e9 / (seconds[1] - seconds[0])}}


SECTIONS = {
    "gemv": measure_gemv,
    "peers": compare_peers,
    "gemm": measure_gemm,
    "fwht": measure_fwht,
    "accuracy": lambda report, _, arguments: measure_accuracy(report, quick=arguments.quick),
    "decode": measure_decode,
}


if __name__ == "__main__":
    main()
