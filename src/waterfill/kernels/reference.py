"""Arithmetic on packed matrices in plain torch: the definition that faster kernels are tested against.

The codes stay packed. A product rotates the activations once and multiplies them with tiles of decoded rows in the
rotated basis, since <x, W'> = <Hx, HW'>; scratch is bounded by TILE_WEIGHTS whatever the size of the matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from waterfill.codecs import Higgs
from waterfill.hadamard import rotate, unrotate

TILE_WEIGHTS = 1 << 20  # 4 MiB of float32, and 8 MiB of indices while they are unpacked


class Packed(NamedTuple):
    """A packed matrix as kernels see it."""

    codec: Higgs
    scales: torch.Tensor  # float16 [out, groups]
    codes: torch.Tensor  # uint8 [out * row_bytes (+ padding)]
    exponent: int
    shape: tuple[int, int]  # (out, in)


def matmul(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """x W^T: `[..., in]` -> `[..., out]`, computed in float32."""
    out_features, width = packed.shape
    rotated = rotate(x.reshape(-1, width).to(torch.float32))
    product = torch.cat([rotated @ tile.T for _, _, tile in _tiles(packed)], dim=1)
    return product.to(x.dtype).reshape(*x.shape[:-1], out_features)


def rows(packed: Packed, ids: torch.Tensor) -> torch.Tensor:
    """Rows of W by index: int64 `[...]` -> float32 `[..., in]`. Only these rows are decoded."""
    width = packed.shape[1]
    flat = ids.reshape(-1)
    wanted, place = torch.unique(flat, return_inverse=True)
    row_bytes = packed.codec.row_bytes(width)
    codes = packed.codes[: packed.shape[0] * row_bytes].view(-1, row_bytes)[wanted]
    decoded = unrotate(packed.codec.decode_rotated(codes, packed.scales[wanted], packed.exponent, width))
    return decoded[place].reshape(*ids.shape, width)


def dense(packed: Packed) -> torch.Tensor:
    """W in its own basis, float32 `[out, in]`."""
    weight = torch.empty(packed.shape, dtype=torch.float32)
    for start, stop, tile in _tiles(packed):
        weight[start:stop] = unrotate(tile)
    return weight


def _tiles(packed: Packed) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Decoded blocks of rows in the rotated basis: (first row, last row + 1, float32 `[rows, in]`)."""
    out_features, width = packed.shape
    row_bytes = packed.codec.row_bytes(width)
    step = max(1, TILE_WEIGHTS // width)
    for start in range(0, out_features, step):
        stop = min(start + step, out_features)
        codes = packed.codes[start * row_bytes : stop * row_bytes]
        yield start, stop, packed.codec.decode_rotated(codes, packed.scales[start:stop], packed.exponent, width)
