"""What one backward pass says of every matrix: sums over the groups of its rows, from gradients as they come.

    gradient of a matrix, or of some of its rows ───────────────────┐
    a product's input and the gradient of what it gave ──► of the   ├──► across, along
                                        rows that matter most ──────┘

A product says all that is wanted without the whole gradient, which is a third of a pass. `along` follows from what
goes back to the input anyway; `across` is estimated without bias from a quarter of the rows, which are drawn by what
they are likely to cost: squared norms of the row's weights times those of its gradients (sampled matrix products,
Drineas et al. 2006).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from random import Random

import torch

from waterfill.codecs.groups import group_sizes, group_sums
from waterfill.files.architecture import Matrix
from waterfill.files.blockwise import CHUNK_WEIGHTS

LEAST_ROWS = 256  # of a product that are looked at; all where there are no more
ROWS_SHARE = 4  # one row of so many
FLOOR = 0.05  # of the mean cost, that every row is taken to have: no row is out of reach


class Costs:
    """Sums over the groups of every matrix. Which rows are drawn depends on the seed and the matrix's name."""

    def __init__(self, matrices: Sequence[Matrix], seed: int = 0) -> None:
        self.across = {matrix.name: 0.0 for matrix in matrices}  # of (gradient . noise)^2
        self.along = {matrix.name: 0.0 for matrix in matrices}  # of gradient . weight
        self._seed = seed
        self._by_parameter: dict[str, list[Matrix]] = {}
        for matrix in matrices:
            self._by_parameter.setdefault(matrix.parameter, []).append(matrix)

    def add(self, name: str, weight: torch.Tensor, gradient: torch.Tensor, sign: int) -> None:
        """A parameter's, by its state-dict name; `sign` -1 takes back what was added."""
        for matrix in self._by_parameter.get(name, ()):
            views = matrix_view(weight, matrix), matrix_view(gradient, matrix)
            for w, g in zip(*(view.split(_chunk_rows(view)) for view in views), strict=True):
                w, g = w.to(torch.float32), g.to(torch.float32)
                self.across[matrix.name] += sign * float(row_costs(w, g).sum())
                self.along[matrix.name] += sign * float((g * w).sum(1).double().sum())

    def add_product(
        self, name: str, weight: torch.Tensor, x: torch.Tensor, slope: torch.Tensor, back: torch.Tensor
    ) -> None:
        """A parameter's that is one matrix `[rows, in]`, or some of its rows.

        Args:
            x: what was multiplied with it, `[tokens, in]`.
            slope: the gradient of the product, `[tokens, rows]`.
            back: the gradient of `x` that comes through it, `slope @ weight`.
        """
        for matrix in self._by_parameter.get(name, ()):
            offset = Random(f"{self._seed} {name}").random()
            self.along[matrix.name] += float((back * x).sum(1, dtype=torch.float32).double().sum())
            for rows, chances in _some_rows(weight, slope, offset):
                gradient = slope[:, rows].T @ x
                costs = row_costs(weight[rows].to(torch.float32), gradient.to(torch.float32))
                self.across[matrix.name] += float((costs / chances).sum())


def _chunk_rows(view: torch.Tensor) -> int:
    return max(1, CHUNK_WEIGHTS // view.shape[1])


def _some_rows(weight: torch.Tensor, slope: torch.Tensor, offset: float) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Numbers of rows, and the chances that each of them had; a chunk of them at a time."""
    count = len(weight)
    wanted = max(LEAST_ROWS, -(-count // ROWS_SHARE))
    if count <= wanted:
        rows, chances = torch.arange(count), torch.ones(count, dtype=torch.float64)
    else:
        norms = (torch.linalg.vector_norm(m, dim=d, dtype=torch.float32) for m, d in ((weight, 1), (slope, 0)))
        chances = inclusion((next(norms) * next(norms)).double().square(), wanted)
        rows = drawn_rows(chances, offset)
        chances = chances[rows]
    yield from zip(rows.split(_chunk_rows(weight)), chances.split(_chunk_rows(weight)), strict=True)


def inclusion(costs: torch.Tensor, wanted: int) -> torch.Tensor:
    """Chances of being drawn, float64 as `costs`, in proportion to them and at most 1, that add up to `wanted`."""
    costs = costs + FLOOR * costs.mean()
    if not 0 < float(costs.sum()) < math.inf:
        return torch.full_like(costs, wanted / len(costs))
    certain = torch.zeros(len(costs), dtype=torch.bool)
    while True:
        rest = wanted - int(certain.sum())
        chances = torch.where(certain, 1.0, costs * (rest / costs[~certain].sum()))
        over = chances > 1
        if not bool(over.any()):
            return chances
        certain |= over


def drawn_rows(chances: torch.Tensor, offset: float) -> torch.Tensor:
    """Systematic sampling: where the sums of chances, from an offset in [0, 1) on, pass a whole number."""
    passed = (chances.cumsum(0) + offset).floor()
    return (passed.diff(prepend=passed.new_zeros(1)) > 0).nonzero()[:, 0]


def matrix_view(parameter: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """A view `[out, in]` of the matrix inside its module parameter."""
    part = stored_part(parameter, matrix)
    return part.T if matrix.transposed else part


def stored_part(parameter: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """The same as the parameter holds it."""
    return parameter if matrix.expert is None else parameter[matrix.expert]


def row_costs(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """E (gradient . noise)^2 for noise as `orthogonal` makes it, of each group's own power; summed over the groups of
    each row, float64 `[rows]`."""
    power, slope = group_sums(weight.square()), group_sums(gradient * weight)
    across = power * group_sums(gradient.square()) - slope.square()
    return (across.clamp_min(0) / (group_sizes(weight.shape[1], weight.dtype) - 1).clamp_min(1)).double().sum(1)
