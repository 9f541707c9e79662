"""The door as torch operators, `torch.ops.waterfill.*`: torch.compile and export see one node with a known shape.

A packed matrix travels as two tensors (scales, codes) and four constants (codec name, exponent, out_features, layout).
`layout` decides who computes: "stored" is the torch reference, an instruction set's name the native library. Gradients
flow to the activations, not to the weights.
"""

from __future__ import annotations

from typing import Any

import torch

from waterfill.codecs import get_codec
from waterfill.codecs.hadamard import groups, rotate, unrotate
from waterfill.kernels import cpu, reference
from waterfill.kernels.reference import STORED, Packed

_MATRIX = "Tensor scales, Tensor codes, str codec, int exponent, int out_features"
_library = torch.library.Library("waterfill", "DEF")
_library.define(f"matmul(Tensor x, {_MATRIX}, str layout) -> Tensor")
_library.define(
    "matmul_many(Tensor x, Tensor[] scales, Tensor[] codes, str[] codecs, int[] exponents, int[] out_features, "
    "str layout) -> Tensor[]"
)
_library.define(f"matmul_backward(Tensor gradient, {_MATRIX}, int in_features, str layout) -> Tensor")
_library.define(f"rows(Tensor ids, {_MATRIX}, int in_features, str layout) -> Tensor")


def matmul(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """x W^T: `[..., in]` of any float dtype -> `[..., out]` of the same dtype."""
    _check_width(x, packed)
    product: torch.Tensor = torch.ops.waterfill.matmul.default(x, *_constants(packed), packed.layout)
    return product


def matmul_many(x: torch.Tensor, matrices: list[Packed]) -> list[torch.Tensor]:
    """`matmul` with each of several matrices of one layout, sharing the rotation of x."""
    for packed in matrices:
        _check_width(x, packed)
    scales, codes, codecs, exponents, rows = (list(column) for column in zip(*map(_constants, matrices), strict=True))
    products: list[torch.Tensor] = torch.ops.waterfill.matmul_many.default(
        x, scales, codes, codecs, exponents, rows, matrices[0].layout
    )
    return products


def rows(packed: Packed, ids: torch.Tensor) -> torch.Tensor:
    """Rows of W by index: int64 `[...]` -> float32 `[..., in]`."""
    weights: torch.Tensor = torch.ops.waterfill.rows.default(ids, *_constants(packed), packed.shape[1], packed.layout)
    return weights


def matmul_backward(gradient: torch.Tensor, packed: Packed) -> torch.Tensor:
    """gradient W: `[..., out]` of any float dtype -> `[..., in]` of the same dtype, what `matmul` gives back to x."""
    of_x: torch.Tensor = torch.ops.waterfill.matmul_backward.default(
        gradient, *_constants(packed), packed.shape[1], packed.layout
    )
    return of_x


def scale_gradient(x: torch.Tensor, gradient: torch.Tensor, packed: Packed) -> torch.Tensor:
    """Of a loss by the logarithm of every scale, float32 `[out, groups]`.

    A product is a sum over groups, y_r = sum_g y_rg, and a scale multiplies its group's part alone: the gradient is
    sum_t dy_tr y_trg. Parts are computed by tiles of decoded rows; the gradient of the weights is never made.

    Args:
        x: what was multiplied, `[..., in]`.
        gradient: of the loss by the product, `[..., out]`.
    """
    rotated = rotate(_flat(x).detach().to(torch.float32))
    flat = _flat(gradient).detach().to(torch.float32)
    result = torch.empty(packed.shape[0], len(groups(packed.shape[1])))
    for start, stop, tile in rotated_tiles(packed):
        for at, group in enumerate(groups(packed.shape[1])):
            part = rotated[:, group.start : group.stop] @ tile[:, group.start : group.stop].T
            result[start:stop, at] = part.mul_(flat[:, start:stop]).sum(0)
    return result


def _check_width(x: torch.Tensor, packed: Packed) -> None:
    """The operators take the width from x: with another one they would read beyond the matrix."""
    if x.shape[-1] != packed.shape[1]:
        raise ValueError(f"x has {x.shape[-1]} features, but the matrix multiplies {packed.shape[1]}")


def _constants(packed: Packed) -> tuple[torch.Tensor, torch.Tensor, str, int, int]:
    return packed.scales, packed.codes, packed.codec.name, packed.exponent, packed.shape[0]


def _packed(
    width: int, scales: torch.Tensor, codes: torch.Tensor, codec: str, exponent: int, out_features: int, layout: str
) -> Packed:
    return Packed(get_codec(codec).memory, scales, codes, exponent, (out_features, width), layout)


def _matmul(x: torch.Tensor, *constants: Any) -> torch.Tensor:
    packed = _packed(x.shape[-1], *constants)
    if packed.layout == STORED:
        return reference.matmul(x, packed)
    return _shaped(cpu.matmul_many(_flat(x), [packed])[0], x)


def _matmul_many(x: torch.Tensor, *constants: Any) -> list[torch.Tensor]:
    columns, layout = constants[:-1], constants[-1]
    matrices = [_packed(x.shape[-1], *(*matrix, layout)) for matrix in zip(*columns, strict=True)]
    if layout == STORED:
        return [reference.matmul(x, packed) for packed in matrices]
    return [_shaped(y, x) for y in cpu.matmul_many(_flat(x), matrices)]


def _rows(ids: torch.Tensor, *constants: Any) -> torch.Tensor:
    *matrix, in_features, layout = constants
    packed = _packed(in_features, *(*matrix, layout))
    if packed.layout == STORED:
        return reference.rows(packed, ids)
    return cpu.rows(packed, ids.reshape(-1)).reshape(*ids.shape, in_features)


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def _shaped(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return y.to(x.dtype).reshape(*x.shape[:-1], y.shape[-1])


def _matmul_fake(x: torch.Tensor, *constants: Any) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], constants[-2])


def _matmul_many_fake(x: torch.Tensor, *constants: Any) -> list[torch.Tensor]:
    return [x.new_empty(*x.shape[:-1], rows) for rows in constants[-2]]


def _rows_fake(ids: torch.Tensor, *constants: Any) -> torch.Tensor:
    return ids.new_empty(*ids.shape, constants[-2], dtype=torch.float32)


def _matmul_backward(gradient: torch.Tensor, *constants: Any) -> torch.Tensor:
    """gradient W: an operator too, so that a compiler traces through a backward pass."""
    *matrix, in_features, layout = constants
    packed = _packed(in_features, *(*matrix, layout))
    flat = gradient.reshape(-1, packed.shape[0]).to(torch.float32)
    total = flat.new_zeros(len(flat), in_features)
    for start, stop, tile in rotated_tiles(packed):
        total += flat[:, start:stop] @ tile
    return unrotate(total).to(gradient.dtype).reshape(*gradient.shape[:-1], in_features)


def _matmul_backward_fake(gradient: torch.Tensor, *constants: Any) -> torch.Tensor:
    return gradient.new_empty(*gradient.shape[:-1], constants[-2])


def _keep_matrix(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, scales, codes, *ctx.constants, ctx.layout = inputs
    ctx.width = x.shape[-1]
    ctx.save_for_backward(scales, codes)


def _gradient(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    backward = torch.ops.waterfill.matmul_backward.default
    of_x = backward(gradient, *ctx.saved_tensors, *ctx.constants, ctx.width, ctx.layout)
    return (of_x, *(None for _ in range(6)))


def _keep_matrices(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    x, scales, codes, *ctx.constants, ctx.layout = inputs
    ctx.width = x.shape[-1]
    ctx.save_for_backward(*scales, *codes)


def _gradient_of_many(ctx: Any, gradients: list[torch.Tensor | None]) -> tuple[Any, ...]:
    backward = torch.ops.waterfill.matmul_backward.default
    count, saved = len(gradients), ctx.saved_tensors
    matrices = zip(saved[:count], saved[count:], *ctx.constants, strict=True)
    parts = [
        backward(gradient, *matrix, ctx.width, ctx.layout)
        for gradient, matrix in zip(gradients, matrices, strict=True)
        if gradient is not None
    ]
    return (sum(parts) if parts else None, [None] * count, [None] * count, None, None, None, None)


def rotated_tiles(packed: Packed) -> Any:
    """(first row, last row + 1, float32 `[rows, in]`) of blocks of rows, decoded in the rotated basis."""
    if packed.layout == STORED:
        yield from reference.tiles(packed)
        return
    step = max(1, reference.TILE_WEIGHTS // packed.shape[1])
    for start in range(0, packed.shape[0], step):
        stop = min(start + step, packed.shape[0])
        yield start, stop, cpu.rows(packed, torch.arange(start, stop), rotated=True)


_library.impl("matmul", _matmul, "CPU")
_library.impl("matmul_many", _matmul_many, "CPU")
_library.impl("matmul_backward", _matmul_backward, "CPU")
_library.impl("rows", _rows, "CPU")
torch.library.register_fake("waterfill::matmul", _matmul_fake, lib=_library)
torch.library.register_fake("waterfill::matmul_many", _matmul_many_fake, lib=_library)
torch.library.register_fake("waterfill::matmul_backward", _matmul_backward_fake, lib=_library)
torch.library.register_fake("waterfill::rows", _rows_fake, lib=_library)
torch.library.register_autograd("waterfill::matmul", _gradient, setup_context=_keep_matrix, lib=_library)
torch.library.register_autograd("waterfill::matmul_many", _gradient_of_many, setup_context=_keep_matrices, lib=_library)
