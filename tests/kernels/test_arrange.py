"""The kernels' layout, read back as native/src/layout.hpp describes it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn.functional import pad

from tests.support.kernel_samples import every_isa, same_bits, stored
from waterfill.codecs.grids import available
from waterfill.codecs.indices import unpack
from waterfill.kernels import cpu as native
from waterfill.kernels.reference import Packed

CHUNK, TILE = 128, 4
CODECS = [*(f"higgs-p{p}-n{n}" for p, n in available()), "levels-8", "levels-16"]
# one weight; whole chunks; the end of a row within a chunk, a word or a byte; several groups
SHAPES = [(1, 1), (4, 512), (7, 172), (5, 1025), (6, 2561)]


def tiled(matrix: torch.Tensor) -> torch.Tensor:
    """`[rows, parts, ...]` -> `[tile, part, row in tile, ...]`, the rows that are missing to a whole tile zero."""
    padding = torch.zeros(-len(matrix) % TILE, *matrix.shape[1:], dtype=matrix.dtype)
    return torch.cat([matrix, padding]).unflatten(0, (-1, TILE)).transpose(1, 2)


def planes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes `[..., 128]` -> uint8 `[..., 16 * bits]`."""
    if bits == 16:
        return torch.stack([codes & 255, codes >> 8], -1).flatten(-2).to(torch.uint8)
    parts = []
    for width in (8, 4, 2, 1):
        if bits & width:
            field = codes & ((1 << width) - 1)
            order = (CHUNK // 8, 8) if width == 1 else (8 // width, -1)
            field = field.unflatten(-1, order)
            field = field if width == 1 else field.transpose(-1, -2)
            parts.append((field << torch.arange(0, 8, width)).sum(-1).to(torch.uint8))
            codes = codes >> width
    return torch.cat(parts, -1)


def chunked(codes: torch.Tensor, filler: int = 0) -> torch.Tensor:
    return pad(codes, (0, -codes.shape[1] % CHUNK), value=filler).unflatten(1, (-1, CHUNK))


def layouts(packed: Packed) -> Iterator[torch.Tensor]:
    """The layouts that an instruction set may ask for."""
    codec, rows = packed.codec, packed.shape[0]
    bits = (codec.n - 1).bit_length()
    codes = unpack(
        packed.codes[: rows * codec.row_bytes(packed.shape[1])].view(rows, -1), -(-packed.shape[1] // codec.p), codec.n
    )
    if codec.name.startswith("levels"):
        half = codec.n // 2
        yield tiled(planes(chunked(codes, half), bits))
        yield tiled(planes(chunked(codes ^ half), bits))
        return
    yield tiled(planes(chunked(codes), bits))
    if codec.p == 1:
        even, odd = pad(codes, (0, codes.shape[1] % 2)).unflatten(1, (-1, 2)).unbind(-1)
        yield tiled(planes(chunked(codes).unflatten(2, (-1, 2)).transpose(2, 3).flatten(2), bits))
        if bits <= 3:
            yield tiled(planes(chunked(even | odd << bits), 2 * bits))


@every_isa
@pytest.mark.parametrize("shape", SHAPES)
def test_every_byte_is_the_documented_one(isa: str, shape: tuple[int, int]) -> None:
    for name in CODECS:
        packed = stored(name, *shape)
        arranged = native.arrange(packed, isa)
        candidates = [layout.flatten() for layout in layouts(packed)]
        assert any(torch.equal(arranged.codes[: len(layout)], layout) for layout in candidates), name
        assert same_bits(arranged.scales, tiled(packed.scales[..., None]).flatten()), name
