"""The one door to arithmetic on packed matrices: whoever multiplies goes through here.

Which implementation runs is decided once per process and logged once. The reference (vectorised torch) is always there.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from types import ModuleType

import torch

from waterfill.kernels import reference
from waterfill.kernels.reference import Packed

__all__ = ["Packed", "dense", "matmul", "rows"]

_log = logging.getLogger("waterfill.kernels")


@lru_cache(maxsize=1)
def _implementation() -> ModuleType:
    _log.info("packed matrices are multiplied by the torch reference; no native kernels are part of this version")
    return reference


def matmul(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """x W^T: activations `[..., in]` of any float dtype -> `[..., out]` of the same dtype."""
    product: torch.Tensor = _implementation().matmul(x, packed)
    return product


def rows(packed: Packed, ids: torch.Tensor) -> torch.Tensor:
    """Rows of W by index (embedding look-up): int64 `[...]` -> float32 `[..., in]`."""
    found: torch.Tensor = _implementation().rows(packed, ids)
    return found


def dense(packed: Packed) -> torch.Tensor:
    """W itself, float32 `[out, in]`."""
    weight: torch.Tensor = _implementation().dense(packed)
    return weight
