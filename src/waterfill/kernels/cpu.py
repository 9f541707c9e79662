"""Packed matrices through the native library: arranged once for the instruction set, then multiplied from.

    Packed, as stored ──arrange──► Packed, `layout` = the instruction set ──matmul, rows──► float32

Activations become integers too (`native/src/kernels.hpp` says exactly what is computed; `reference.matmul_integer` is
the same in torch). `WATERFILL_ACTIVATIONS=float` keeps them, for exactness, much slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from waterfill.base.native import DTYPES as LAZY_DTYPES
from waterfill.base.native import MatrixView, Native, addresses_of, library, matrices_of
from waterfill.base.native import float_activations as float_activations
from waterfill.codecs import MemoryForm
from waterfill.codecs.hadamard import groups
from waterfill.codecs.integers import native_table
from waterfill.kernels.reference import Packed

DTYPES = dict(LAZY_DTYPES)  # looked at for every product


def arrange(packed: Packed, isa: str) -> Packed:
    """A matrix as stored -> in the layout of an instruction set, in new memory of about the same size."""
    native, (out_features, width) = _native(), packed.shape
    codec = packed.codec
    _, table = native_table(codec, isa)
    codes_bytes = native.codes_bytes(table=table, rows=out_features, width=width)
    codes = torch.empty(codes_bytes, dtype=torch.uint8)
    scales = torch.empty(native.scales_count(rows=out_features, width=width), dtype=torch.float16)
    from_scales, from_codes = packed.scales.contiguous(), packed.codes.contiguous()  # alive until they are read
    stored = _view(from_scales, from_codes, codec, packed.exponent, packed.shape, isa)
    native.arrange(
        native.isas[isa],
        stored,
        **codec.native_fields(width),
        codes=codes.data_ptr(),
        scales=scales.data_ptr(),
    )
    return Packed(codec, scales, codes, packed.exponent, packed.shape, isa)


def scales_of(packed: Packed) -> torch.Tensor:
    """Scales of an arranged matrix as they are stored, float16 `[out, groups]`."""
    return _by_tiles(packed).transpose(1, 2).reshape(-1, len(groups(packed.shape[1])))[: packed.shape[0]].clone()


def set_scales(packed: Packed, scales: torch.Tensor) -> None:
    """Give an arranged matrix other scales, float16 `[out, groups]`, in place."""
    tiles = _by_tiles(packed)
    missing = tiles.shape[0] * tiles.shape[2] - len(scales)
    padded = torch.nn.functional.pad(scales, (0, 0, 0, missing))
    tiles.copy_(padded.view(tiles.shape[0], tiles.shape[2], -1).transpose(1, 2))


def _by_tiles(packed: Packed) -> torch.Tensor:
    """A view `[tiles, groups, rows of a tile]` of arranged scales: `arrange` keeps this order on every machine."""
    count = len(groups(packed.shape[1]))
    rows = _native().scales_count(rows=1, width=packed.shape[1]) // count
    return packed.scales.view(-1, count, rows)


def matmul_many(x: torch.Tensor, matrices: Sequence[Packed]) -> list[torch.Tensor]:
    """x `[tokens, in]` with each matrix `[out_i, in]`, all of one layout -> `[tokens, out_i]` of the dtype of x.

    Dtypes other than float32, bfloat16 and float16 give float32.

    The rotation of x is shared, and its integers among matrices of the same precision.
    """
    native, isa = _native(), _native().isas[matrices[0].layout]
    if x.device.type != "cpu":
        raise ValueError(f"the activations are on {x.device}, the packed weights on the CPU")
    x = x.detach().contiguous()
    if x.dtype not in DTYPES:
        x = x.to(torch.float32)
    exact = float_activations()
    dtype = torch.float32 if exact else x.dtype
    outputs = [torch.empty(x.shape[0], packed.shape[0], dtype=dtype) for packed in matrices]
    views = [view_of(packed) for packed in matrices]
    if exact:
        for view, y in zip(views, outputs, strict=True):
            places = x.data_ptr(), y.data_ptr()
            native.matmul_float(isa, view, *places, dtype=DTYPES[x.dtype], tokens=x.shape[0])
        return outputs
    results = addresses_of([y.data_ptr() for y in outputs])
    native.matmul(isa, matrices_of(views), x.data_ptr(), results, dtype=DTYPES[x.dtype], tokens=x.shape[0])
    return outputs


def rows(packed: Packed, ids: torch.Tensor, *, rotated: bool = False) -> torch.Tensor:
    """Rows by index: int64 `[count]` -> float32 `[count, in]`, in W's own basis or as they are stored."""
    native = _native()
    out_features, width = packed.shape
    ids = ids.detach().to(torch.int64).contiguous()
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= out_features):
        raise IndexError(f"row {int(ids.min())} or {int(ids.max())} is outside a matrix of {out_features} rows")
    out = torch.empty(len(ids), width, dtype=torch.float32)
    isa = native.isas[packed.layout]
    native.rows(isa, view_of(packed), ids.data_ptr(), out.data_ptr(), count=len(ids), rotated=rotated)
    return out


def _native() -> Native:
    native = library()
    assert native is not None  # a layout exists only where the library does
    return native


def view_of(packed: Packed) -> MatrixView:
    """The matrix as the library sees it: pointers, alive as long as the tensors are."""
    return _view(packed.scales, packed.codes, packed.codec, packed.exponent, packed.shape, packed.layout)


def _view(
    scales: torch.Tensor, codes: torch.Tensor, codec: MemoryForm, exponent: int, shape: tuple[int, int], isa: str
) -> MatrixView:
    places = (scales.data_ptr(), codes.data_ptr(), scales.numel(), codes.numel())
    return _cached_view(*places, *native_table(codec, isa), exponent, shape)


@lru_cache(maxsize=1 << 15)  # a view holds pointers only: equal arguments, equal view
def _cached_view(
    scales: int,
    codes: int,
    scales_count: int,
    codes_bytes: int,
    step: float,
    table: int,
    exponent: int,
    shape: tuple[int, int],
) -> MatrixView:
    unit = 2.0**exponent
    return MatrixView(*shape, step * unit, unit, table, codes, scales, codes_bytes, scales_count)
