"""The one door to arithmetic on packed matrices: whoever multiplies goes through here.

    artifact ──Packed("stored")──► arrange ──Packed(instruction set)──► matmul, matmul_many, rows, dense

Which implementation runs is decided once per process: the native library with the best instruction set, or the torch
reference, which is always there (`native.isa` says why). Whoever opens a model calls `set_up`, which says so once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import lru_cache

import torch

from waterfill.base import native as library
from waterfill.codecs import MemoryForm
from waterfill.codecs.hadamard import unrotate
from waterfill.kernels import cpu
from waterfill.kernels.cpu import DTYPES
from waterfill.kernels.ops import matmul, matmul_backward, matmul_many, rotated_tiles, rows, scale_gradient
from waterfill.kernels.reference import STORED, Packed

__all__ = [
    "DTYPES",
    "STORED",
    "Packed",
    "arrange",
    "dense",
    "implementation",
    "log_slow",
    "matmul",
    "matmul_backward",
    "matmul_many",
    "rows",
    "scale_gradient",
    "scales_of",
    "set_scales",
    "set_up",
    "usable",
]

_log = logging.getLogger("waterfill.kernels")


@lru_cache(maxsize=1)
def implementation() -> str:
    """Who multiplies: an instruction set of the native library, or "stored", the torch reference."""
    return library.isa() or STORED


def set_up() -> None:
    """Before a model's first product: share torch's threads, and say once which native kernels multiply."""
    isa = implementation()
    if isa != STORED:
        library.share_threads()
        _say_once(isa)


@lru_cache(maxsize=1)
def _say_once(isa: str) -> None:
    _log.info("packed matrices are multiplied by the native kernels, %s", isa)


def usable(layout: str) -> bool:
    """Whether matrices in that layout can be multiplied in this process."""
    native = library.library()
    return layout == STORED or (native is not None and layout in native.isas)


def arrange(packed: Packed) -> Packed:
    """A matrix as stored -> in the layout that `implementation` multiplies from."""
    layout = implementation()
    if layout == STORED or packed.layout != STORED or packed.codes.device.type != "cpu":
        return packed
    return cpu.arrange(packed, layout)


def scales_of(packed: Packed) -> torch.Tensor:
    """Scales as they are stored, float16 `[out, groups]`, whatever the layout."""
    return packed.scales.clone() if packed.layout == STORED else cpu.scales_of(packed)


def set_scales(packed: Packed, scales: torch.Tensor) -> None:
    """Give a matrix other scales, float16 `[out, groups]`, in place: who shares its memory multiplies with them too."""
    if packed.layout == STORED:
        packed.scales.copy_(scales)
    else:
        cpu.set_scales(packed, scales)


def log_slow(codecs: Iterable[MemoryForm]) -> None:
    """Say once which of a model's codecs the native kernels multiply slowly."""
    slow = sorted({codec.name for codec in codecs if not codec.in_registers(implementation())})
    if slow:
        _log.info(
            "%s: tables too large for registers, multiplied several times more slowly than others "
            "(packing with --codec fast avoids them)",
            ", ".join(slow),
        )


def dense(packed: Packed) -> torch.Tensor:
    """W itself, float32 `[out, in]`."""
    weight = torch.empty(packed.shape, dtype=torch.float32)
    for start, stop, tile in rotated_tiles(packed):
        weight[start:stop] = unrotate(tile)
    return weight
