"""What `waterfill doctor` tells: versions, the machine, which kernels multiply here and why, whether they are right.

It needs torch and the grids, and looks at everything else from outside, so that it can report what is broken. A tiny
model goes through every way that tokens are made (`trial`), because a way that is not taken is slow, and nothing else.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from waterfill import kernels
from waterfill.base import machine, native, process
from waterfill.base.errors import WaterfillError, first_line
from waterfill.base.version import __version__
from waterfill.codecs import get_codec
from waterfill.codecs.hadamard import groups, rotate
from waterfill.kernels import cpu, reference
from waterfill.kernels.reference import STORED, Packed

READ_BYTES = 1 << 28  # more than most caches hold
READ_S = 0.3
# 8-bit and 12-bit integers, look-ups in memory, levels; and what is entropy-coded.
CHECKED_CODECS = ("higgs-p2-n16", "higgs-p1-n88", "higgs-p4-n256", "levels-8")
CHECKED_STREAMS = "trellis-s8-r3.0000"
LARGEST_ERROR = 0.03  # of a product, relative; activations of 8 bits leave 0.008
DEVELOPER_EXTRAS = ("dev", "test")


@dataclass(frozen=True)
class Diagnosis:
    """One machine and one installation."""

    waterfill: str
    python: str
    torch: str
    transformers: str | None
    cpu: str
    cores: int  # that this process may use
    threads: int
    memory_bytes: int | None
    read_bytes_per_s: float
    library: str | None
    problem: str | None  # why the library is not there or cannot be used
    instruction_sets: dict[str, bool]  # best first: whether this build and this machine both have it
    multiplies: str | None  # an instruction set, or "stored", the torch reference; None where the choice is refused
    why: str
    activations: str  # "integer" or "float", as they are multiplied
    ways: dict[str, str]  # by which a tiny model makes tokens: "right", or why it is not taken here
    error: str | None  # of the self-check
    healthy: bool
    extras: dict[str, list[str]]  # packages that are missing of each optional extra


def diagnose() -> Diagnosis:
    """Look, check and measure; takes some seconds, most of them to import transformers."""
    path, problem = _library()
    loaded = native.library() if problem is None else None
    usable = list(loaded.isas) if loaded else []
    multiplies, why = _choice(problem)
    ways: dict[str, str] = {}
    error = why if multiplies is None else _self_check(multiplies) or _try_ways(ways)
    return Diagnosis(
        waterfill=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=machine.package_version("transformers"),
        cpu=machine.cpu_name(),
        cores=process.usable_cpus(),
        threads=torch.get_num_threads(),
        memory_bytes=machine.memory_bytes(),
        read_bytes_per_s=read_bytes_per_s(),
        library=None if path is None else str(path),
        problem=problem,
        instruction_sets={name: name in usable for name in loaded.known()} if loaded else {},
        multiplies=multiplies,
        why=why,
        activations="integer" if multiplies not in (None, STORED) and _integers() else "float",
        ways=ways,
        error=error,
        healthy=error is None,
        extras=dict(_extras()),
    )


def read_bytes_per_s() -> float:
    """Bytes of memory read in a second by all threads: the best of some sums over an array."""
    data = torch.ones(min(READ_BYTES, (machine.memory_bytes() or READ_BYTES) // 8) // 8, dtype=torch.int64)
    until, best_s = time.perf_counter() + READ_S, float("inf")
    while (start_s := time.perf_counter()) < until:
        data.sum()
        best_s = min(best_s, time.perf_counter() - start_s)
    return data.nbytes / best_s


# ------------------------------------------------------------------------------------------------------------- kernels


def _library() -> tuple[Path | None, str | None]:
    """Path of the native library, and what is wrong with it."""
    try:
        native.load()
    except WaterfillError as error:
        return native.find(), str(error)
    return native.find(), None


def _choice(problem: str | None) -> tuple[str | None, str]:
    """Who multiplies, and why; None and an error where WATERFILL_ISA asks for what is not there."""
    wanted = os.environ.get(native.ISA_VARIABLE)
    try:
        chosen = native.isa()
    except WaterfillError as error:
        return None, str(error)
    if wanted:
        return chosen or STORED, f"{native.ISA_VARIABLE} is {wanted}"
    if chosen is None:
        return STORED, "the native library cannot be used" if problem else native.why_not()
    return chosen, "the best that this build and this machine share"


def _self_check(layout: str) -> str | None:
    """What is wrong with products in this layout, compared with float64 and, to the bit, with their definition."""
    whole = layout != STORED and _integers()
    try:
        for name in CHECKED_CODECS:
            packed = _random_matrix(name)
            matrix = packed if layout == STORED else cpu.arrange(packed, layout)
            for tokens in (1, 20):
                x = torch.randn(tokens, packed.shape[1], generator=torch.Generator().manual_seed(tokens))
                y = kernels.matmul(x, matrix)
                weight = torch.cat([tile for _, _, tile in reference.tiles(packed)]).double()
                exact = rotate(x.double()) @ weight.T  # torch alone: the library rotates float32 only
                if not (y - exact).norm() <= LARGEST_ERROR * exact.norm():
                    return f"a product of {tokens} tokens with {name} is wrong"
                if whole and not torch.equal(y, reference.matmul_integer(x, packed)):
                    return f"a product of {tokens} tokens with {name} differs from the reference in some bits"
        codec = get_codec(CHECKED_STREAMS)
        weight = torch.randn(20, 2100, generator=torch.Generator().manual_seed(0))
        encoded = codec.encode(weight)
        noise = float((codec.decode(encoded) - weight).square().sum())
        if abs(noise - encoded.noise_power) > LARGEST_ERROR * encoded.noise_power:
            return f"{CHECKED_STREAMS} decodes to something else than was encoded"
    except Exception as error:  # whatever fails here is the finding
        return f"{type(error).__name__}: {first_line(error)}"
    return None


def _try_ways(ways: dict[str, str]) -> str | None:
    """What is wrong with tokens of a tiny model; how each way went is noted in `ways`."""
    try:
        from waterfill.studies.diagnosis import trial

        trial.run(ways)
    except WaterfillError as error:
        return str(error)
    except Exception as error:  # whatever fails here is the finding
        return f"{type(error).__name__}: {first_line(error)}"
    return None


def _integers() -> bool:
    return not native.float_activations()


def _random_matrix(name: str, shape: tuple[int, int] = (40, 2100)) -> Packed:
    codec, generator = get_codec(name).memory, torch.Generator().manual_seed(0)
    codes = torch.randint(256, codec.layout(shape)["codes"].shape, generator=generator, dtype=torch.uint8)
    scales = torch.rand(shape[0], len(groups(shape[1])), generator=generator) + 0.5
    return Packed(codec, scales.half(), codes, 0, shape)


# -------------------------------------------------------------------------------------------------------- installation


def _extras() -> Iterator[tuple[str, list[str]]]:
    """(optional extra, those of its packages that are not installed), of this installation's own metadata."""
    try:
        about = metadata.metadata("waterfill")
    except metadata.PackageNotFoundError:  # run from its source
        return
    wanted = [re.match(r"([\w.-]+).*extra == ['\"]([\w-]+)['\"]", line) for line in about.get_all("Requires-Dist", [])]
    for extra in sorted(set(about.get_all("Provides-Extra", [])) - set(DEVELOPER_EXTRAS)):
        packages = [match[1] for match in wanted if match and match[2] == extra]
        yield extra, [package for package in packages if machine.package_version(package) is None]
