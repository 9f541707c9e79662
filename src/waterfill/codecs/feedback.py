"""Error feedback: what rounding one block of columns loses is made up for in the blocks that are rounded after it.

With the second moments H of what a matrix is multiplied with, an error E costs tr(E H E'). Columns are encoded block by
block, and H = U U', U block upper triangular in their order, gives for each block

    target  =  weights + E[earlier] P        P = U[earlier, block] U[block, block]^-1

which is the least that is left of the errors so far (LDLQ with blocks: Chee et al., arXiv 2307.13304; Tseng et al.,
arXiv 2406.11235; of single columns it is GPTQ, arXiv 2210.17323). Noise Z of the encoder then costs the sum over blocks
of tr(Z U[block, block] U[block, block]' Z'), where without feedback it costs tr(Z H Z').

Where noise is strong, targets with the errors of many columns in them would be much larger than weights: moments are
damped in proportion to it.

All of this is in the rotated basis, in which codecs work.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import NamedTuple

from waterfill.base.errors import WaterfillError
from waterfill.base.lazy import torch
from waterfill.codecs.groups import TINY
from waterfill.codecs.hadamard import rotate

DAMPING = 0.03  # of the mean moment, that is added to each, at least: what was seen little of may come (design.md §5)
ATTEMPTS = 4  # each with ten times the damping, where rounding makes moments indefinite
DRAWS = 64  # rows of noise that an expected loss is averaged over

Blocks = tuple[slice, ...]


def interleaved(width: int, count: int) -> Blocks:
    """Every `count`-th column from each of the first `count`; none where they would not be as many each."""
    return tuple(slice(first, width, count) for first in range(count)) if width % count == 0 else ()


def runs(width: int, length: int) -> Blocks:
    """Neighbouring columns, `length` at a time."""
    return tuple(slice(first, min(first + length, width)) for first in range(0, width, length))


class Left(NamedTuple):
    """What feedback leaves of the loss that noise costs, and what it makes of the noise's power; 1: nothing changes."""

    loss: float  # of products
    noise: float
    alpha: float | None = None  # of products alone, of a matrix whose rows are looked up as well (`planning.head`)
    early: tuple[float, float] | None = None  # loss and noise of stages that others follow (`codecs.nested`)

    def share_of(self, alpha: float) -> float:
        """What is left of all that noise costs a matrix of this alpha; looked up, more noise costs more."""
        if self.alpha is None or alpha <= 0:
            return self.loss
        products = min(self.alpha / alpha, 1.0)
        return products * self.loss + (1 - products) * self.noise


class Feedback:
    """Error feedback for all matrices that are multiplied with the same.

    Args:
        moments: second moments of what the matrices are multiplied with, float32 `[in, in]`, in any unit.
        damping: share of their mean that is added to each, at least.

    Raises:
        WaterfillError: moments are not finite.
    """

    def __init__(self, moments: torch.Tensor, damping: float = DAMPING) -> None:
        if not bool(moments.isfinite().all()):
            raise WaterfillError("moments of a matrix's inputs are not finite; calibrate on another text")
        self.moments = _rotated(moments)
        self._damping = damping
        self._solved: dict[tuple[str, int], list[torch.Tensor]] = {}
        self.remembered = 1  # solutions, each as large as the moments

    @cached_property
    def mean(self) -> float:
        """Of the moments of single columns."""
        return float(self.moments.diagonal().double().mean())

    def pushes(self, blocks: Blocks, t2: float = 0.0) -> list[torch.Tensor]:
        """P of each block, float32 `[columns of the blocks before, columns]`, for an encoder of distortion `t2`."""
        octave = self._octave(t2)
        key = repr(blocks), octave  # slices are not hashable
        if key not in self._solved:
            while len(self._solved) >= self.remembered:
                del self._solved[next(iter(self._solved))]
            self._solved[key] = self._solve(blocks, self._damping * 2**octave)
        return self._solved[key]

    def _octave(self, t2: float) -> int:
        """How often damping is doubled: in such steps, matrices of like rates have the same."""
        noise = t2 / max(1 - t2, TINY)
        return max(0, round(math.log2(noise / self._damping))) if noise > 0 else 0

    def _solve(self, blocks: Blocks, damping: float) -> list[torch.Tensor]:
        upper = self._factor(order_of(blocks, len(self.moments)), damping)
        pushes, end = [], 0
        for size in map(len, columns_of(blocks, len(self.moments))):
            here = slice(end, end + size)
            pushes.append(torch.linalg.solve_triangular(upper[here, here], upper[:end, here], upper=True, left=False))
            end += size
        return pushes

    def _factor(self, order: torch.Tensor, damping: float) -> torch.Tensor:
        """U, upper triangular, of damped moments in this order of columns."""
        backwards = order.flip(0)
        moments = self.moments[backwards[:, None], backwards]
        for attempt in range(ATTEMPTS):
            damped = moments.clone()
            damped.diagonal().add_(damping * 10**attempt * self.mean or 1.0)
            lower, failed = torch.linalg.cholesky_ex(damped)
            if not failed:
                upper: torch.Tensor = lower.flip(0, 1)
                return upper
        raise WaterfillError("moments of a matrix's inputs have no factor; calibrate on another text")

    def cost(self, errors: torch.Tensor) -> float:
        """tr(E H E') of errors `[rows, in]`, rotated."""
        return float(((errors @ self.moments) * errors).double().sum())

    def left(self, blocks: Blocks, others: Feedback | None = None, t2: float = 0.0) -> Left:
        """Of white noise, as draws of it have it; in the moments that this was made of, or in others; of feedback that
        is damped for an encoder of distortion `t2`."""
        width = len(self.moments)
        noise = torch.randn(DRAWS, width, generator=torch.Generator().manual_seed(0))
        errors, end = torch.empty(DRAWS, width), 0
        order = order_of(blocks, width)
        for push in self.pushes(blocks, t2):
            here = slice(end, end + push.shape[1])
            errors[:, here] = noise[:, here] - errors[:, :end] @ push
            end = here.stop
        in_place = torch.empty_like(errors)
        in_place[:, order] = errors
        other = others or self
        total = other.mean * float(noise.double().square().sum())
        return Left(other.cost(in_place) / total if total else 1.0, float(errors.square().sum() / noise.square().sum()))


def expected(
    first: torch.Tensor,
    second: torch.Tensor,
    blocks: Blocks,
    weighed: torch.Tensor | None = None,
    early_t2: float | None = None,
) -> Left:
    """Of feedback by moments of two halves of a text together, on text that it was not made of.

    Moments of n tokens flatter themselves, and do worse on others, by about as much: in proportion to 1 / n. So of the
    way from what all of them say of themselves to what either half does to the other, two thirds are to be gone.

    Args:
        weighed: moments that the loss is of, where they are others, of some tokens of the second half; their trace
            is the alpha of products.
        early_t2: what moments are damped for in stages that others follow, if that is asked for.
    """
    all_of_it = Feedback(first + second)
    if weighed is None:
        halves, judges = (Feedback(first), Feedback(second)), None
        crossed = sum(one.left(blocks, other).loss for one, other in zip(halves, reversed(halves), strict=True)) / 2
    else:
        judges = Feedback(weighed)
        crossed = Feedback(first).left(blocks, judges).loss
    own = all_of_it.left(blocks, judges)
    alpha = None if weighed is None else float(weighed.trace())
    beyond = max(crossed - own.loss, 0.0) * 2 / 3
    left = Left(own.loss + beyond, own.noise, alpha)
    if early_t2 is None:
        return left
    damped = all_of_it.left(blocks, judges, early_t2)
    return left._replace(early=(damped.loss + beyond, damped.noise))


def columns_of(blocks: Blocks, width: int) -> list[range]:
    """The columns of each block."""
    return [range(*block.indices(width)) for block in blocks]


def order_of(blocks: Blocks, width: int) -> torch.Tensor:
    """All columns, block after block, int64 `[width]`."""
    return torch.tensor([column for columns in columns_of(blocks, width) for column in columns])


def _rotated(moments: torch.Tensor) -> torch.Tensor:
    half = rotate(moments.to(torch.float32))
    return rotate(half.T.contiguous())
