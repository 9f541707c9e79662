"""Orthonormal block Walsh-Hadamard transforms for any width, with no stored padding.

After the transform a row of weights looks Gaussian, which is what lets one grid serve every matrix (HIGGS, arXiv
2411.17525, §3). A row is cut into *groups*, each with one scale. A group of 2^k <= 1024 coordinates is transformed by
one Hadamard matrix. Any other group of m coordinates is covered by three overlapping *windows* of the largest power of
two below m: first, last, first again. Fixed pseudo-random signs come before every window: without them a row with the
structure of a Walsh function, such as a constant one, would stay structured, and the second window would largely undo
the first. A product of orthonormal maps is orthonormal, so nothing is padded, no block is small, and noise that is
isotropic in a rotated group is isotropic in its weights.

    width 4096   4 groups of 1024
    width 11008  10 groups of 1024 and one of 768 (windows 0:512, 256:768, 0:512)
    width 4100   3 groups of 1024 and one of 1028 (windows 0:1024, 4:1028, 0:1024)
    width 172    1 group (windows 0:128, 44:172, 0:128)

The transform is made of additions, sign changes and multiplications by constants in a fixed order, so it gives the
same bits on every machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from waterfill.base import native
from waterfill.base.lazy import torch

MAX_BLOCK = 1024


@dataclass(frozen=True)
class Group:
    """Consecutive coordinates `start:stop` of a row that share a scale; `windows` are transformed in order."""

    start: int
    stop: int
    windows: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        return self.stop - self.start


@lru_cache(maxsize=1024)
def groups(width: int) -> tuple[Group, ...]:
    """Cut a row of `width` coordinates into groups of 1024, the last one of 512 to 1535 (of `width` when below 1024).

    A remainder under 512 joins its neighbour rather than stand alone: a small group would pay 16 bits of scale for
    few weights, and a small Hadamard block does not make them Gaussian.
    """
    if width < 1:
        raise ValueError(f"a row has at least one coordinate, got width {width}")
    count = max(1, (width + MAX_BLOCK // 2) // MAX_BLOCK)
    bounds = [*range(0, count * MAX_BLOCK, MAX_BLOCK), width]
    return tuple(Group(a, b, _windows(a, b)) for a, b in pairwise(bounds))


def _windows(start: int, stop: int) -> tuple[tuple[int, int], ...]:
    size = stop - start
    block = min(MAX_BLOCK, 1 << (size.bit_length() - 1))
    first, last = (start, start + block), (stop - block, stop)
    return (first,) if first == last else (first, last, first)


@lru_cache(maxsize=1024)
def signs(size: int, window: int) -> torch.Tensor:
    """Fixed +-1 float32 `[size]` that a group is multiplied with before window number `window`.

    The top bit of a multiplicative hash of the coordinate: reproducible anywhere in three lines, and unstructured, as
    it must be (the Rudin-Shapiro sequence, itself a quadratic form, leaves heavy-tailed columns unmixed).
    """
    with torch.inference_mode(mode=False):  # a tensor made in it could never take part in a backward pass
        index = torch.arange(size, dtype=torch.int64, device="cpu") + (window + 1) * 7919
        mixed = (index * 0x9E3779B1) & 0xFFFFFFFF
        mixed = ((mixed ^ (mixed >> 15)) * 0x85EBCA77) & 0xFFFFFFFF
        return 1.0 - 2.0 * (mixed >> 31).to(torch.float32)


def fwht_(x: torch.Tensor) -> torch.Tensor:
    """Orthonormal Walsh-Hadamard transform of the last axis (Sylvester order), in place.

    Args:
        x: floating point `[..., n]` with n a power of two; may be a slice of a larger tensor.
    """
    n = x.shape[-1]
    if n & (n - 1) or n == 0:
        raise ValueError(f"the Walsh-Hadamard transform needs a power of two, got {n}")
    half = 1
    while half < n:
        pairs = x.unflatten(-1, (n // (2 * half), 2, half))
        upper, lower = pairs[..., 0, :], pairs[..., 1, :]
        difference = upper - lower
        upper.add_(lower)
        lower.copy_(difference)
        half *= 2
    return x.mul_(1.0 / math.sqrt(n))


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Block-Hadamard transform of the last axis: `[..., width]` -> a new tensor of the same shape and dtype."""
    return _transform(x, inverse=False)


def unrotate(x: torch.Tensor) -> torch.Tensor:
    """Inverse of `rotate`: the same windows and signs in reverse order, since each is its own inverse."""
    return _transform(x, inverse=True)


def _transform(x: torch.Tensor, *, inverse: bool) -> torch.Tensor:
    fast = rotate_natively(x, inverse=inverse)
    return _transform_in_torch(x, inverse=inverse) if fast is None else fast


def rotate_natively(x: torch.Tensor, *, inverse: bool) -> torch.Tensor | None:
    """Of float32 on the CPU, by the library, to the same bits; None where it cannot."""
    isa = native.isa()
    if isa is None or x.dtype != torch.float32 or x.device.type != "cpu" or x.numel() == 0 or x.requires_grad:
        return None
    library = native.library()
    assert library is not None
    result = x.clone(memory_format=torch.contiguous_format)
    width = x.shape[-1]
    library.rotate(library.isas[isa], result.data_ptr(), rows=x.numel() // width, width=width, inverse=inverse)
    return result


def _transform_in_torch(x: torch.Tensor, *, inverse: bool) -> torch.Tensor:
    result = x.clone(memory_format=torch.contiguous_format)
    last = groups(x.shape[-1])[-1]
    if last.start:  # every group but the last is a whole 1024-block: one batched transform
        _step(result[..., : last.start].unflatten(-1, (-1, MAX_BLOCK)), 0, slice(None), inverse)
    tail = result[..., last.start :]
    steps = list(enumerate(last.windows))
    for at, (start, stop) in reversed(steps) if inverse else steps:
        _step(tail, at, slice(start - last.start, stop - last.start), inverse)
    return result


def _step(group: torch.Tensor, at: int, window: slice, inverse: bool) -> None:
    """Flip the signs of `group` `[..., size]` and transform its window number `at`, in place; or undo both."""
    flips = signs(group.shape[-1], at).to(group)
    if not inverse:
        group.mul_(flips)
    fwht_(group[..., window])
    if inverse:
        group.mul_(flips)
