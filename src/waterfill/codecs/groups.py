"""Numbers per group of a row, and per weight: `[rows, groups]` and `[rows, width]`, one from the other.

The groups are those that the rotation leaves apart and that share a scale (`hadamard.groups`).
"""

from __future__ import annotations

from waterfill.base.lazy import torch
from waterfill.codecs.hadamard import groups

TINY = 1.1754943508222875e-38  # the least normal float32: what may be divided by


def group_sizes(width: int, dtype: torch.dtype) -> torch.Tensor:
    """Coordinates of each group of a row of `width`, `[groups]`."""
    return torch.tensor([group.size for group in groups(width)], dtype=dtype)


def group_sums(values: torch.Tensor) -> torch.Tensor:
    """`[rows, width]` -> sums per group `[rows, groups]`."""
    return torch.stack([values[:, g.start : g.stop].sum(1) for g in groups(values.shape[1])], dim=1)


def per_weight(values: torch.Tensor, width: int) -> torch.Tensor:
    """One value per group `[rows, groups]` -> one per weight `[rows, width]`."""
    if values.shape[1] == 1:
        return values.expand(-1, width)
    return values.repeat_interleave(group_sizes(width, torch.int64), dim=1)
