"""Does the lossless codec reach the entropy of exponents, and how do its size and speed compare with ZipNN's?

Weights of the example model in its own bfloat16 and converted, and Gaussian ones. The yardstick is the entropy of each
tensor's exponents with sign and mantissa as they are; streams include every header. Everything is decoded and compared.
ZipNN (`pip install zipnn`) runs with one thread and its own defaults, on the same bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.shared.report import EXAMPLE_MODEL, BenchmarkReport, parse_arguments
from waterfill import api
from waterfill.base import native
from waterfill.codecs import lossless
from waterfill.files.architecture import describe
from waterfill.files.checkpoint import open_checkpoint

MANTISSA = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}
ZIPNN_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
WITHIN = 1.02


@dataclass(frozen=True)
class Compressed:
    """One coder on one set of tensors."""

    size_bytes: int
    encode_s: float
    decode_s: float


def main() -> None:
    arguments = parse_arguments(
        __doc__, model={"type": Path, "default": EXAMPLE_MODEL, "help": "whose weights are coded"}
    )
    report = BenchmarkReport("lossless coding of weights")
    repetitions = 2 if arguments.quick else 7
    threads = torch.get_num_threads()
    report.note(f"kernels: {native.isa()}, {threads} thread{'s' if threads > 1 else ''}; best of {repetitions}")
    if not find_spec("zipnn"):
        report.note("ZipNN is not installed (pip install zipnn): its columns are empty")
    sources = {"example model": weights(arguments.model)}
    size = 1 << (22 if arguments.quick else 24)
    sources["Gaussian"] = {"w": 0.02 * torch.randn(size, generator=torch.Generator().manual_seed(0))}
    rows, planes = [], []
    for name, tensors in sources.items():
        for dtype in MANTISSA:
            converted = {key: tensor.to(dtype) for key, tensor in tensors.items()}
            rows.append(compare(report, f"{name}, {str(dtype).removeprefix('torch.')}", converted, repetitions))
            planes.append(by_plane(name, dtype, converted))
    columns = ["weights", "MB", "entropy %", "waterfill %", "ZipNN %", "over entropy", "over ZipNN"]
    columns += ["encode MB/s", "decode MB/s", "ZipNN encode MB/s", "ZipNN decode MB/s"]
    report.table("share of the bytes that is left, and bytes of weights per second", columns, rows, key="comparison")
    report.table(
        "entropy of each plane of bytes, in bits per number: what is left raw is near 8 bits",
        ["weights", "exponent", "mantissa, sign", "could be saved by coding the latter, %"],
        planes,
        key="planes",
    )
    whole_model(report, arguments.model)
    report.save(arguments.json)


def weights(model: Path) -> Mapping[str, torch.Tensor]:
    checkpoint = open_checkpoint(model)
    return {name: checkpoint.read(name).clone() for name in checkpoint.tensors}


def compare(report: BenchmarkReport, name: str, tensors: Mapping[str, torch.Tensor], repetitions: int) -> list[Any]:
    """One row of the table, and its criteria."""
    original = sum(tensor.nbytes for tensor in tensors.values())
    ideal = sum(map(ideal_bytes, tensors.values()))
    own = measure(
        tensors,
        lossless.encode,
        len,
        lambda data, like: lossless.decode(data, tuple(like.shape), like.dtype),
        repetitions,
    )
    key = name.replace(",", "").replace(" ", "_")
    report.criterion(f"{key}_over_entropy", own.size_bytes / ideal, f"<= {WITHIN}", own.size_bytes / ideal <= WITHIN)
    row: list[Any] = [name, original / 1e6, 100 * ideal / original, 100 * own.size_bytes / original]
    if not find_spec("zipnn"):
        return [*row, None, own.size_bytes / ideal, None, *speeds(original, own), None, None]
    peer = measure(tensors, *zipnn(next(iter(tensors.values())).dtype), repetitions)
    ratio = own.size_bytes / peer.size_bytes
    report.criterion(f"{key}_over_zipnn", ratio, f"<= {WITHIN}", ratio <= WITHIN)
    row += [100 * peer.size_bytes / original, own.size_bytes / ideal, ratio]
    return [*row, *speeds(original, own), *speeds(original, peer)]


def speeds(original: int, measured: Compressed) -> list[float]:
    return [original / measured.encode_s / 1e6, original / measured.decode_s / 1e6]


def measure(
    tensors: Mapping[str, torch.Tensor],
    encode: Callable[[torch.Tensor], Any],
    size: Callable[[Any], int],
    decode: Callable[[Any, torch.Tensor], torch.Tensor],
    repetitions: int,
) -> Compressed:
    """Sizes and best times of all tensors together. Raises RuntimeError if one does not come back to the bit."""
    total, encode_s, decode_s = 0, math.inf, math.inf
    for _ in range(repetitions):
        total, times = 0, [0.0, 0.0]
        for name, tensor in tensors.items():
            given = tensor.clone()  # ZipNN reorders the bytes of what it is given
            start_s = time.perf_counter()
            data = encode(given)
            times[0] += time.perf_counter() - start_s
            total += size(data)
            start_s = time.perf_counter()
            decoded = decode(data, tensor)
            times[1] += time.perf_counter() - start_s
            if not torch.equal(raw(decoded), raw(tensor)):
                raise RuntimeError(f"{name} did not come back to the bit")
        encode_s, decode_s = min(encode_s, times[0]), min(decode_s, times[1])
    return Compressed(total, encode_s, decode_s)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def zipnn(
    dtype: torch.dtype,
) -> tuple[Callable[[torch.Tensor], Any], Callable[[Any], int], Callable[..., torch.Tensor]]:
    from zipnn import ZipNN

    coder = ZipNN(input_format="byte", bytearray_dtype=ZIPNN_DTYPES[dtype], threads=1)

    def encode(tensor: torch.Tensor) -> Any:
        return coder.compress(raw(tensor).numpy().data)

    def decode(data: Any, like: torch.Tensor) -> torch.Tensor:
        return torch.frombuffer(bytearray(coder.decompress(data)), dtype=like.dtype)

    return encode, len, decode


def exponents(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    bits = 8 * tensor.element_size()
    values = raw(tensor).numpy().view(f"<u{tensor.element_size()}").astype(np.int64)
    return values >> MANTISSA[tensor.dtype] & ((1 << (bits - 1 - MANTISSA[tensor.dtype])) - 1)


def entropy(symbols: np.ndarray[Any, Any]) -> float:
    share = np.bincount(symbols) / len(symbols)
    share = share[share > 0]
    return -float((share * np.log2(share)).sum())


def ideal_bytes(tensor: torch.Tensor) -> float:
    """With ideally coded exponents, and mantissas coded as far as they hold no information at all: trailing zeros."""
    mantissa = MANTISSA[tensor.dtype]
    values = raw(tensor).numpy().view(f"<u{tensor.element_size()}")
    used = int(np.bitwise_or.reduce(values)) & ((1 << mantissa) - 1)
    zeros = mantissa if used == 0 else (used & -used).bit_length() - 1
    return tensor.numel() * (entropy(exponents(tensor)) + 1 + mantissa - zeros) / 8


def by_plane(name: str, dtype: torch.dtype, tensors: Mapping[str, torch.Tensor]) -> list[Any]:
    """Entropies of the first plane and of the rest, all tensors together, and what coding the rest would save."""
    sums, count = np.zeros(dtype.itemsize), 0
    for tensor in tensors.values():
        planes = lossless._planes(raw(tensor).numpy(), dtype.itemsize)
        sums += tensor.numel() * np.array([entropy(plane) for plane in planes])
        count += tensor.numel()
    bits = sums / count
    rest = ", ".join(f"{value:.3f}" for value in bits[1:])
    left = sum(8 - value for value in bits[1:] if 8 - value <= 8 / lossless.WORTH)
    return [f"{name}, {str(dtype).removeprefix('torch.')}", float(bits[0]), rest, 100 * left / (8 * dtype.itemsize)]


def whole_model(report: BenchmarkReport, model: Path) -> None:
    """`--lossless`: weight files with all headers against the entropy, and the time of planning."""
    start_s = time.perf_counter()
    plan = api.plan(model, lossless=True)
    elapsed_s = time.perf_counter() - start_s
    checkpoint = open_checkpoint(model)
    ideal = sum(ideal_bytes(checkpoint.read(name)) for name in checkpoint.tensors)
    tensors = len(describe(checkpoint).tensors)
    report.table(
        "waterfill plan --lossless",
        ["tensors", "original MB", "packed MB", "share %", "bits per weight", "over entropy", "s"],
        [
            [
                tensors,
                plan.original_bytes / 1e6,
                plan.size_bytes / 1e6,
                100 * plan.size_bytes / plan.original_bytes,
                plan.bits,
                plan.size_bytes / ideal,
                elapsed_s,
            ]
        ],
        key="whole_model",
    )
    report.criterion(
        "whole_model_over_entropy", plan.size_bytes / ideal, f"<= {WITHIN}", plan.size_bytes / ideal <= WITHIN
    )


if __name__ == "__main__":
    main()
