"""`rate_distortion.py`: how fast levels come out of streams, for every instruction set, beside other entropy coders.

    trellis     a matrix's buffer -> levels as bytes and fp16 scales, as `load` does it
    peers       the same Gaussian weights, quantised uniformly to the same entropy, their indices coded in pieces:
                zstd -1 over packed nibbles (two weights a byte; decoding ends there, unpacking is not counted), or over
                bytes where 16 levels do not suffice; Huff0, the Huffman coder inside zstd, as zipnn carries it; and
                constriction's ANS coder

Peers give indices only: no trellis to walk, no scales. All in turn within each round; G weights/s of all threads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import util
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.compressibility.coders import HUFF0_PIECE, Huff0
from benchmarks.shared.report import BenchmarkReport, median_spread
from benchmarks.shared.rounds import Effort, Round, undisturbed
from waterfill.base import native
from waterfill.codecs import get_codec
from waterfill.codecs.entropy import code_length_bits, from_counts
from waterfill.codecs.trellis import code as trellis_code
from waterfill.codecs.trellis.codec import Trellis
from waterfill.codecs.trellis.curves import curve

MATRIX, QUICK_MATRIX = (4096, 4096), (512, 4096)
BITS = (2, 3, 4)
STATES = 8  # decoding takes as long with any other number
THREADS = (1, 2)
PIECE = HUFF0_PIECE  # weights of a peer's piece
CONSTRICTION_WEIGHTS = 1 << 18
GOALS = {"avx512vbmi": 1.0, "avx512": 1.0, "avx2": 0.5}  # G weights/s per core
ENCODE_MATRIX, QUICK_ENCODE_MATRIX = (2048, 4096), (256, 4096)
ENCODE_BITS = 3
ENCODE_GOALS = {8: 5.0, 64: 1.0}  # M weights/s per core
EFFORT, QUICK_EFFORT = Effort(15, 60.0), Effort(3, 1.0)
FIGURE = "G/s"

Symbols = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Decoder:
    """Decodes `weights` weights in one call, on so many threads."""

    name: str
    bits: float  # of code per weight
    weights: int
    call: Callable[[int], object]


def measure_speed(report: BenchmarkReport, quick: bool) -> None:
    library = native.library()
    if library is None:
        raise SystemExit("these are speeds of the native library, which is not built")
    with ThreadPoolExecutor(max(THREADS)) as pool:
        for bits in BITS:
            decoders = [*our_decoders(library, bits, quick), *peers(report, pool, bits, quick)]
            measure_decoding(report, decoders, bits, QUICK_EFFORT if quick else EFFORT)
    library.set_threads(torch.get_num_threads())
    measure_encoding(report, quick)


def measure_decoding(report: BenchmarkReport, decoders: Sequence[Decoder], bits: int, effort: Effort) -> None:
    def one_round() -> Round:
        return {decoder.name: {f"{FIGURE} on {n}": speed(decoder, n) for n in THREADS} for decoder in decoders}

    samples = undisturbed(report, f"decoding {bits} bits", effort, one_round)
    rows = []
    for decoder in decoders:
        figures = [value for n in THREADS for value in median_spread(samples[decoder.name][f"{FIGURE} on {n}"])]
        rows.append([decoder.name, decoder.bits, *figures])
    columns = ["decoder", "bits", *(column for n in THREADS for column in (f"{FIGURE} on {n}", f"± on {n}"))]
    report.table(f"decoding at {bits} bits, 10^9 weights per second", columns, rows, key=f"decoding_{bits}_bits")
    for isa, goal in GOALS.items():
        for n in THREADS:
            name = f"trellis {isa}"
            if name in samples:
                value = median_spread(samples[name][f"{FIGURE} on {n}"])[0] / n
                what = f"decoding_{bits}_bits_{isa}_{n}_threads_g_weights_per_s_and_core"
                report.criterion(what, value, f">= {goal:g}", value >= goal)


def speed(decoder: Decoder, threads: int) -> float:
    start = time.perf_counter()
    decoder.call(threads)
    return decoder.weights / 1e9 / (time.perf_counter() - start)


# Ours


def our_decoders(library: native.Native, bits: int, quick: bool) -> list[Decoder]:
    shape = QUICK_MATRIX if quick else MATRIX
    codec = get_codec(f"trellis-s{STATES}-r{bits:.4f}")
    assert isinstance(codec, Trellis)
    streams = codec.encode(gaussian(shape)).buffers["streams"]
    layout = codec.levels.layout(shape)
    codes = torch.empty(layout["codes"].shape, dtype=torch.uint8)
    arena, levels, scales = streams.numpy(), codes.numpy(), np.empty(layout["scales"].shape, np.uint16)

    def decode(isa: int, threads: int) -> None:
        library.set_threads(threads)
        damaged = library.trellis_decode(
            isa, arena, states=STATES, wide=codec.wide, shape=shape, codes=levels, scales=scales
        )
        if damaged is not None:
            raise ValueError("streams that were just encoded are damaged")

    stored = 8 * streams.numel() / math.prod(shape)
    expected, _ = codec.to_levels(streams, shape)
    found = []
    for name, isa in library.isas.items():
        decode(isa, 1)
        if not torch.equal(codes, expected):
            raise ValueError(f"{name} decodes to other levels")
        found.append(Decoder(f"trellis {name}", stored, math.prod(shape), partial(decode, isa)))
    return found


def gaussian(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# Peers


def peers(report: BenchmarkReport, pool: ThreadPoolExecutor, bits: int, quick: bool) -> list[Decoder]:
    """Those that are installed; each is checked once."""
    symbols = uniform_symbols(bits, math.prod(QUICK_MATRIX if quick else MATRIX))
    counts = np.bincount(symbols).astype(np.int64)
    share = counts[counts > 0] / len(symbols)
    entropy = float(-(share * np.log2(share)).sum())
    ideal = code_length_bits(counts, from_counts(counts)) / len(symbols)
    report.note(
        f"{bits} bits: the peers' indices have {np.count_nonzero(counts)} values, {entropy:.4f} bits of entropy "
        f"({ideal:.4f} with a 12-bit table)"
    )
    found = []
    for package, make in {"zstandard": zstd, "zipnn_core": huff0, "constriction": constriction_ans}.items():
        if util.find_spec(package) is None:
            report.note(f"not measured: {package} is not installed")
        else:
            found.append(make(symbols, pool))
    return found


def uniform_symbols(bits: float, count: int) -> Symbols:
    """Indices of a uniform quantiser of Gaussian weights, of `bits` bits of entropy: at most 16 where those suffice."""
    x = torch.randn(count, generator=torch.Generator().manual_seed(1)).numpy()
    most = 7 if bits <= 3 else 31
    aim = (1 - curve(1).t2(bits)) / curve(1).step(bits)
    j = trellis_code.search(x * np.float32(aim), 1, 1, -most, most) // 4
    return (j + most).astype(np.uint8)


def zstd(symbols: Symbols, pool: ThreadPoolExecutor) -> Decoder:
    import zstandard

    nibbles = symbols.max() < 16
    data = symbols[0::2] | symbols[1::2] << 4 if nibbles else symbols
    pieces = np.split(data, range(PIECE, len(data), PIECE))
    compressor, local = zstandard.ZstdCompressor(level=1), [zstandard.ZstdDecompressor() for _ in THREADS]
    coded = [compressor.compress(piece.tobytes()) for piece in pieces]

    def decode(which: int, threads: int) -> bytes:
        last = b""
        for piece in coded[which::threads]:
            last = local[which].decompress(piece)
        return last

    if decode(0, 1) != pieces[-1].tobytes():
        raise ValueError("zstandard gives back something else")
    name = f"zstd -1, {'packed nibbles' if nibbles else 'a byte per weight'}"
    return threaded(name, sum(map(len, coded)), len(symbols), decode, pool)


def huff0(symbols: Symbols, pool: ThreadPoolExecutor) -> Decoder:
    coder = Huff0()
    pieces = [np.ascontiguousarray(piece) for piece in np.split(symbols, range(PIECE, len(symbols), PIECE))]
    coded = [part for part in map(coder.compress, pieces) if part is not None]
    if len(coded) != len(pieces):
        raise ValueError("Huff0 did not compress")
    out = [np.empty(PIECE, np.uint8) for _ in THREADS]

    def decode(which: int, threads: int) -> Symbols:
        for piece, original in zip(coded[which::threads], pieces[which::threads], strict=True):
            coder.decompress(piece, out[which][: len(original)])
        return out[which][: len(pieces[-1])]

    if not np.array_equal(decode(0, 1), pieces[-1]):
        raise ValueError("Huff0 gives back something else")
    return threaded("Huff0, a byte per weight", sum(map(len, coded)), len(symbols), decode, pool)


def constriction_ans(symbols: Symbols, pool: ThreadPoolExecutor) -> Decoder:
    import constriction

    some = symbols[:CONSTRICTION_WEIGHTS].astype(np.int32)
    counts = np.bincount(some) + 1e-3
    model = constriction.stream.model.Categorical((counts / counts.sum()).astype(np.float32), perfect=False)
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(some, model)
    coded = coder.get_compressed()

    def decode(which: int, threads: int) -> Any:
        del which, threads  # every thread decodes all of it: one stream cannot be shared
        return constriction.stream.stack.AnsCoder(coded).decode(model, len(some))

    if not np.array_equal(decode(0, 1), some):
        raise ValueError("constriction gives back something else")
    one = threaded("constriction ANS, one thread", 4 * len(coded), len(some), decode, pool)
    return Decoder(one.name, one.bits, one.weights, lambda _: decode(0, 1))  # holds the GIL: one thread


def threaded(
    name: str, size_bytes: int, weights: int, decode: Callable[[int, int], object], pool: ThreadPoolExecutor
) -> Decoder:
    """Thread `i` of n decodes every n-th piece."""

    def call(threads: int) -> None:
        if threads == 1:
            decode(0, 1)
        else:
            list(pool.map(lambda which: decode(which, threads), range(threads)))

    return Decoder(name, 8 * size_bytes / weights, weights, call)


# Encoding


def measure_encoding(report: BenchmarkReport, quick: bool) -> None:
    """Rotation, normalisation, search, choice of step and coding, on one thread; beside it the search alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    weight = gaussian(QUICK_ENCODE_MATRIX if quick else ENCODE_MATRIX)
    x = np.ascontiguousarray(weight.numpy().reshape(-1))
    rows = []
    for states, goal in ENCODE_GOALS.items():
        codec = get_codec(f"trellis-s{states}-r{ENCODE_BITS:.4f}")
        step = np.float32(curve(states).step(ENCODE_BITS))

        def one_round(codec: Any = codec, step: Any = step, states: int = states) -> Round:
            calls = {
                "encode": lambda: codec.encode(weight),
                "search": lambda: trellis_code.search(x / step, states, 32, -32, 31),
            }
            return {name: {"M/s": million_per_s(call, weight.numel())} for name, call in calls.items()}

        effort = Effort(1 if quick else 7, 1.0 if quick else 30.0)
        samples = undisturbed(report, f"encoding with {states} states", effort, one_round)
        value = median_spread(samples["encode"]["M/s"])
        rows.append([states, *value, *median_spread(samples["search"]["M/s"])])
        what = f"encoding_{states}_states_m_weights_per_s_and_core"
        report.criterion(what, value[0], f">= {goal:g}", value[0] >= goal)
    torch.set_num_threads(threads)
    columns = ["states", "encode M/s", "± of encode", "search alone M/s", "± of search"]
    title = f"encoding at {ENCODE_BITS} bits on one thread, {native.isa()}, 10^6 weights per second"
    report.table(title, columns, rows, key="encoding")


def million_per_s(call: Callable[[], object], weights: int) -> float:
    start = time.perf_counter()
    call()
    return weights / 1e6 / (time.perf_counter() - start)
