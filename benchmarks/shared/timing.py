"""Cold products and a reader of memory, timed in turn: what slows a shared machine slows both, and ratios stay.

    Memory (a pool of random bytes, larger than any cache) ──► reader, the best of several ──► GB/s
       └──► packed_products: matrices of a codec, cut from the pool ──► ColdProduct ──► seconds of one pass
    interleave: in each round reader, product, reader, product, … ──► Series

A pass multiplies with every matrix once, so each weight comes from DRAM, as in decoding. Rates count what a pass reads:
codes and scales.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from benchmarks.shared.report import BenchmarkReport, median_spread
from benchmarks.shared.rounds import Effort, Round, Series, undisturbed
from waterfill.base import native
from waterfill.codecs import get_codec

COLD_BYTES = 512 << 20  # of distinct weights, at least
READER_ROUNDS = 9
SETTLE_S = 0.003  # for threads of the one before to stop spinning
ALIGNMENT = 4096

NS, GBPS, SHARE = "ns/weight", "GB/s", "share of DRAM"  # figures of a product

Shape = tuple[int, int]  # (rows, width)


class TimedProduct(Protocol):
    """Matrix times vectors, over weights that are not in any cache."""

    name: str
    weights: int  # of one pass
    size_bytes: int  # read in one pass

    def seconds(self) -> float:
        """Time of one pass."""


@dataclass
class ColdProduct:
    """A product in this process: `calls` do the same with different weights."""

    name: str
    weights: int
    size_bytes: int
    calls: Sequence[Callable[[], object]]
    _turn: Iterator[Callable[[], object]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._turn = itertools.cycle(self.calls)

    def seconds(self, calls: int | None = None) -> float:
        """Time of one pass, or of so many calls, beginning where the last ones ended."""
        chosen = list(itertools.islice(self._turn, len(self.calls) if calls is None else calls))
        start = time.perf_counter()
        for call in chosen:
            call()
        return time.perf_counter() - start


class Memory:
    """Random bytes in DRAM, and how fast `torch.get_num_threads()` threads read them."""

    def __init__(self, report: BenchmarkReport, size_bytes: int, patience_s: float) -> None:
        self.words = torch.empty(size_bytes // 8, dtype=torch.int64).random_()
        self.size_bytes = self.words.nbytes
        self._executor = ThreadPoolExecutor(torch.get_num_threads())
        readers = self._readers()
        samples = undisturbed(
            report,
            "reading memory",
            Effort(READER_ROUNDS, patience_s),
            lambda: {name: {GBPS: self._gbps(reader)} for name, reader in readers.items()},
        )
        medians = {name: median_spread(series[GBPS])[0] for name, series in samples.items()}
        self.reader = max(medians, key=lambda name: medians[name])
        self._best = readers[self.reader]
        report.results["readers_gbps"] = medians
        said = ", ".join(f"{name} {gbps:.1f}" for name, gbps in medians.items())
        report.note(f"reading {self.size_bytes / 1e6:.0f} MB of DRAM, GB/s: {said}; below, {self.reader}")

    def gbps(self) -> float:
        """Bandwidth of one pass of the best reader, its threads awake."""
        time.sleep(SETTLE_S)
        self._best()
        return self._gbps(self._best)

    def cut(self, part_bytes: int) -> list[int]:
        """Addresses of parts that do not overlap, as many as there are."""
        stride = math.ceil(part_bytes / ALIGNMENT) * ALIGNMENT
        first = math.ceil(self.words.data_ptr() / ALIGNMENT) * ALIGNMENT
        end = self.words.data_ptr() + self.size_bytes
        return list(range(first, end - stride + 1, stride))

    def _gbps(self, reader: Callable[[], object]) -> float:
        start = time.perf_counter()
        reader()
        return self.size_bytes / 1e9 / (time.perf_counter() - start)

    def _readers(self) -> dict[str, Callable[[], object]]:
        parts = np.array_split(self.words.numpy(), torch.get_num_threads())
        readers: dict[str, Callable[[], object]] = {
            "torch int64 sum": self.words.sum,
            "torch int64 max": self.words.max,
            "numpy sums": lambda: list(self._executor.map(np.sum, parts)),
        }
        if (read := _compiled_reader()) is not None:
            readers["C, 4 streams a thread"] = lambda: list(
                self._executor.map(lambda part: read(part.ctypes.data, len(part)), parts)
            )
        return readers


def _compiled_reader() -> Callable[[int, int], int] | None:
    """`read_memory.c`, where there is a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    source = Path(__file__).with_name("read_memory.c")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "read_memory.so"
        command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", str(source), "-o", str(target)]
        if subprocess.run(command, capture_output=True).returncode:
            return None
        read = ctypes.CDLL(str(target)).read_memory
    read.restype, read.argtypes = ctypes.c_uint64, [ctypes.c_void_p, ctypes.c_size_t]
    return read


def kernels() -> tuple[native.Native, int]:
    """The native library and its best instruction set; ends the script where there is none."""
    library, isa = native.library(), native.isa()
    if library is None or isa is None:
        raise SystemExit("these are figures of the native kernels, which are not built or switched off (WATERFILL_ISA)")
    return library, library.isas[isa]


def packed_products(memory: Memory, codec_name: str, shape: Shape, tokens: int = 1) -> ColdProduct:
    """Products with random codes. The library is called as `waterfill.kernels` calls it, its arguments made before."""
    library, isa = kernels()
    rows, width = shape
    step, table = get_codec(codec_name).memory.new_table(library, isa)
    codes_bytes = library.codes_bytes(table=table, rows=rows, width=width)
    scales = torch.full((library.scales_count(rows=rows, width=width),), 0.01, dtype=torch.float16)
    places = memory.cut(codes_bytes + scales.nbytes)
    for place in places:  # scales beside the codes: every call reads its own
        ctypes.memmove(place + codes_bytes, scales.data_ptr(), scales.nbytes)
    x, y = torch.randn(tokens, width), torch.empty(tokens, rows)
    results = native.addresses_of([y.data_ptr()])
    sizes = codes_bytes, scales.numel()
    views = [native.MatrixView(rows, width, step, 1.0, table, place, place + codes_bytes, *sizes) for place in places]
    kept = x, y, results
    calls = [partial(_multiply, library, isa, native.matrices_of([view]), kept) for view in views]
    return ColdProduct(codec_name, rows * width * len(calls), (codes_bytes + scales.nbytes) * len(calls), calls)


def _multiply(library: native.Native, isa: int, matrix: Any, kept: tuple[Any, ...]) -> None:
    x, _, results, *_ = kept
    library.matmul(isa, matrix, x.data_ptr(), results, dtype=native.FLOAT32, tokens=len(x))


def interleave(
    report: BenchmarkReport, what: str, memory: Memory, products: Sequence[TimedProduct], effort: Effort
) -> Series:
    """For every product ns/weight, GB/s, and the share that these are of the bandwidth just before and after."""

    def one_round() -> Round:
        figures = {}
        before = memory.gbps()
        for product in products:
            time.sleep(SETTLE_S)
            seconds = product.seconds()
            after = memory.gbps()
            gbps = product.size_bytes / 1e9 / seconds
            share = gbps / ((before + after) / 2)
            figures[product.name] = {NS: seconds * 1e9 / product.weights, GBPS: gbps, SHARE: share}
            before = after
        return figures

    return undisturbed(report, what, effort, one_round)
