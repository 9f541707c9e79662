"""Arithmetic on packed matrices in plain torch: the definition that faster kernels are tested against.

The codes stay packed. A product rotates the activations once and multiplies them with tiles of decoded rows in the
rotated basis, since <x, W'> = <Hx, HW'>; scratch is bounded by TILE_WEIGHTS whatever the size of the matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from waterfill.codecs import MemoryForm
from waterfill.codecs.hadamard import groups, rotate, unrotate
from waterfill.codecs.integers import EXACT_WORDS, LIMITS

TILE_WEIGHTS = 1 << 20  # 4 MiB of float32, and 8 MiB of indices while they are unpacked


STORED = "stored"


class Packed(NamedTuple):
    """A packed matrix as kernels see it."""

    codec: MemoryForm
    scales: torch.Tensor  # float16 [out, groups]
    codes: torch.Tensor  # uint8 [out * row_bytes (+ padding)]
    exponent: int
    shape: tuple[int, int]  # (out, in)
    layout: str = STORED  # of scales and codes: as in the artifact, or an instruction set's


def matmul(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """x W^T: `[..., in]` -> `[..., out]`, computed in float32."""
    out_features, width = packed.shape
    rotated = rotate(x.reshape(-1, width).to(torch.float32))
    product = torch.cat([rotated @ tile.T for _, _, tile in tiles(packed)], dim=1)
    return product.to(x.dtype).reshape(*x.shape[:-1], out_features)


def rows(packed: Packed, ids: torch.Tensor) -> torch.Tensor:
    """Rows of W by index: int64 `[...]` -> float32 `[..., in]`. Only these rows are decoded."""
    width = packed.shape[1]
    flat = ids.reshape(-1)
    if bool((flat < 0).any()):  # indexing would count them from the end
        raise IndexError(f"row {int(flat.min())} is outside a matrix of {packed.shape[0]} rows")
    wanted, place = torch.unique(flat, return_inverse=True)
    row_bytes = packed.codec.row_bytes(width)
    codes = packed.codes[: packed.shape[0] * row_bytes].view(-1, row_bytes)[wanted]
    decoded = unrotate(packed.codec.decode_rotated(codes, packed.scales[wanted], packed.exponent, width))
    return decoded[place].reshape(*ids.shape, width)


def tiles(packed: Packed) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Decoded blocks of rows in the rotated basis: (first row, last row + 1, float32 `[rows, in]`)."""
    out_features, width = packed.shape
    row_bytes = packed.codec.row_bytes(width)
    step = max(1, TILE_WEIGHTS // width)
    for start in range(0, out_features, step):
        stop = min(start + step, out_features)
        codes = packed.codes[start * row_bytes : stop * row_bytes]
        yield start, stop, packed.codec.decode_rotated(codes, packed.scales[start:stop], packed.exponent, width)


def matmul_integer(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """What the native kernels compute, to the bit: activations and grid as integers, sums within a group exact.

    Activations get one scale per token and group, their largest magnitude over that of `LIMITS`, or NaN where one
    of them is not finite. A group of 12-bit integers is summed in parts of 512, which are added as float32.
    """
    precision = packed.codec.precision
    limit = torch.tensor(LIMITS[precision], dtype=torch.float32)
    out_features, width = packed.shape
    rotated = rotate(x.reshape(-1, width).to(torch.float32))
    codes = packed.codes[: out_features * packed.codec.row_bytes(width)].view(out_features, -1)
    units, unit = packed.codec.whole_numbers(codes, width)
    units = units.to(torch.float64)  # which adds them exactly
    step = torch.tensor(unit * 2.0**packed.exponent, dtype=torch.float32)
    total = torch.zeros(len(rotated), out_features)
    for at, group in enumerate(groups(width)):
        part = rotated[:, group.start : group.stop]
        largest = part.abs().amax(1, keepdim=True)
        usable = (largest > 1e-30) & largest.isfinite()
        scale = torch.where(usable, largest / limit, largest * 0)  # NaN where the group has NaN or infinity
        whole = torch.where(usable, (part * (limit / largest)).round(), 0).to(torch.float64)
        span = EXACT_WORDS if precision == 16 else group.size
        sums = torch.zeros(len(rotated), out_features)
        for start in range(0, group.size, span):
            stop = min(start + span, group.size)
            exact = whole[:, start:stop] @ units[:, group.start + start : group.start + stop].T
            sums += exact.to(torch.float32)
        total += sums * ((packed.scales[:, at].to(torch.float32) * step) * scale)
    return total.to(x.dtype).reshape(*x.shape[:-1], out_features)
