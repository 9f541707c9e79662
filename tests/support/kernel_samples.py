"""Shorthands for the tests of kernels: packed matrices of random bytes, instruction sets, comparison to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import pytest
import torch

from waterfill import kernels
from waterfill.base import native
from waterfill.codecs import Encoded, TableCodec, get_codec, scale_exponent
from waterfill.codecs.hadamard import groups, rotate
from waterfill.kernels import cpu, reference
from waterfill.kernels.reference import Packed

LIBRARY = native.library()
ISAS = list(LIBRARY.isas) if LIBRARY else []
NOT_BUILT = "the native library was not built"
needs_native = pytest.mark.skipif(not ISAS, reason=NOT_BUILT)
needs_engine = pytest.mark.skipif(native.isa() is None, reason=f"{NOT_BUILT}, or is switched off")
every_isa = pytest.mark.parametrize("isa", ISAS or [pytest.param("", marks=pytest.mark.skip(reason=NOT_BUILT))])
EXPONENT = -12


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@lru_cache(maxsize=64)
def stored(codec: str, out_features: int, width: int, seed: int = 0) -> Packed:
    """A matrix as in an artifact: every byte is equally likely, also those that no encoder writes, and some scales are
    0 or below the normal range of fp16."""
    found, generator = get_codec(codec), seeded(seed)
    assert isinstance(found, TableCodec)
    size = found.layout((out_features, width))["codes"].shape
    codes = torch.randint(256, size, generator=generator, dtype=torch.uint8)
    if codec == "levels-16":  # 12-bit numbers
        levels = torch.randint(-2047, 2048, (size[0] // 2,), generator=generator, dtype=torch.int32)
        codes = (levels.to(torch.int16) ^ -0x8000).view(torch.uint8)
    scales = torch.rand(out_features, len(groups(width)), generator=generator) + 0.5
    rare = torch.randint(40, scales.shape, generator=generator).sub_(36).relu_()
    scales *= torch.tensor([1.0, 100.0, 1e-6, 0.0])[rare]
    return Packed(found, scales.half(), codes, EXPONENT, (out_features, width))


@lru_cache(maxsize=64)
def encoded(codec: str, out_features: int, width: int) -> tuple[Encoded, torch.Tensor]:
    """A random matrix, encoded by a codec of any kind; and decoded by it."""
    weight = torch.randn(out_features, width, generator=seeded(1))
    matrix = get_codec(codec).encode(weight, exponent=scale_exponent(float(weight.abs().max())))
    return matrix, get_codec(codec).decode(matrix)


def in_memory(codec: str, layout: str, out_features: int, width: int) -> tuple[Packed, torch.Tensor]:
    """The same matrix as it is multiplied, in memory of its own; and its decoded weights."""
    (matrix, weight), found = encoded(codec, out_features, width), get_codec(codec)
    buffers = found.to_memory(matrix.buffers, matrix.shape, matrix.exponent)
    packed = Packed(found.memory, buffers["scales"].clone(), buffers["codes"].clone(), matrix.exponent, matrix.shape)
    return packed if layout == reference.STORED else cpu.arrange(packed, layout), weight


def activations(tokens: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(tokens, width, generator=seeded(seed)).to(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether all bits agree, those of -0 and NaN included."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32 if x.element_size() == 4 else torch.int16)


def exact(x: torch.Tensor, packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:
    """x W^T in float64 by torch alone, and the sum of the products' magnitudes, which bounds any rounding."""
    rotated = rotate(x.double())
    weight = torch.cat([tile for _, _, tile in reference.tiles(packed)]).double()
    return rotated @ weight.T, rotated.abs() @ weight.abs().T


@contextmanager
def one_thread() -> Iterator[None]:
    """Where other processes keep the cores busy, threads wait for each other far longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def nothing_decided() -> Iterator[None]:
    """Forget which library, instruction set and implementation were chosen, before and after."""
    caches = (native.library, native.isa, kernels.implementation, kernels._say_once)
    try:
        for cache in caches:
            cache.cache_clear()
        yield
    finally:
        for cache in caches:
            cache.cache_clear()
