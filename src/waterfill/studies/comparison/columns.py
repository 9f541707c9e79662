"""Rounding columns one after the other, with what one loses made up for in the rest: GPTQ's loop (arXiv 2210.17323).

U is the upper Cholesky factor of the inverse of damped second moments. An error E of column j, divided by U[j, j],
takes E U[j, k] from every later column k. Whoever rounds says how a block of columns is rounded; within a block errors
may be made up for as well, or only in the columns after it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

GROUP = 128  # columns of a block
DAMPING = 0.01  # of the mean moment


class Inputs:
    """What a matrix is multiplied with: second moments of all tokens, and some of the inputs."""

    def __init__(self, width: int, sample: int = 0) -> None:
        self.moments = torch.zeros(width, width, dtype=torch.float64)
        self._sample, self._some = sample, [torch.zeros(0, width)]

    def see(self, x: Tensor, output: Tensor) -> None:
        """A part of the tokens, `[..., in]`."""
        rows = x.detach().flatten(0, -2).to(torch.float32)
        self.moments += (rows.T @ rows).double()
        missing = self._sample - sum(map(len, self._some))
        if missing > 0:
            self._some.append(rows[:missing].clone())

    @property
    def some(self) -> Tensor:
        """The first of them, float32 `[tokens, in]`."""
        return torch.cat(self._some)


def inverse_factor(moments: Tensor) -> Tensor:
    """U, float32 `[in, in]`. Columns that nothing is multiplied with count as if they were independent."""
    damped = moments.clone()
    dead = damped.diagonal() == 0
    damped.diagonal()[dead] = 1
    damped.diagonal().add_(DAMPING * float(moments.diagonal().mean()))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True).to(torch.float32)
    return factor


RoundBlock = Callable[[Tensor, slice], Callable[[Tensor, int], Tensor]]
"""Given a block of columns as they are by now `[rows, columns]`, and which those are: how the k-th of them is rounded,
`[rows]`, as it is by then."""


def round_columns(weight: Tensor, factor: Tensor, start: RoundBlock, *, within: bool) -> Tensor:
    """Round float32 `[rows, in]`; errors are made up for in later blocks, and `within` a block in its later columns."""
    left, rounded = weight.clone(), torch.empty_like(weight)
    for first in range(0, weight.shape[1], GROUP):
        block = slice(first, min(first + GROUP, weight.shape[1]))
        now, u = left[:, block].clone(), factor[block, block]
        step = start(now, block)
        errors = torch.empty_like(now)
        for k in range(now.shape[1]):
            reached = step(now[:, k], k)
            rounded[:, first + k] = reached
            errors[:, k] = (now[:, k] - reached) / u[k, k]
            if within:
                now[:, k:] -= errors[:, k, None] * u[None, k, k:]
        left[:, block.stop :] -= errors @ factor[block, block.stop :]
    return rounded


def salience(weight: Tensor, factor: Tensor) -> Tensor:
    """What it would cost to lose a weight, all others made up for: w^2 / U[j, j]^2, `[rows, in]`."""
    return (weight / factor.diagonal()).square()
