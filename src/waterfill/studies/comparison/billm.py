"""BiLLM (arXiv 2402.04291): signs of weights, of a few columns twice.

    block of 128 columns ──► salient columns: signs of weights, then signs of what that leaves
                        └──► the others: two regions by size, signs in each, about the region's mean

How many columns, and where the border of the regions is, is searched for: in the paper by what is lost of the weights
(`billm`), in its code, with the metric of its published results, by what would be lost of their saliences in their
place (`billm-salience`). Errors are made up for in later blocks, not within one.

No library of its own runs on a CPU, so the method is implemented here. Stored, and counted: signs, second signs of
salient columns, a bit for the region of every other weight, a bit per column, and eight fp16 numbers per row and block.
The headline of 1.08 bits leaves out all but the signs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from waterfill.files.architecture import Matrix
from waterfill.files.artifact import Buffer
from waterfill.studies.comparison.base import Candidate, Method, Put, StudiedModel
from waterfill.studies.comparison.columns import GROUP, Inputs, inverse_factor, round_columns, salience
from waterfill.studies.comparison.layerwise import round_layers
from waterfill.studies.comparison.stored import QuantisedMatrix, quantised

MOST_SALIENT = 49  # columns of a block
BORDERS = tuple(step / 100 for step in range(10, 91))  # quantiles of saliences that are tried
SCALARS = 8  # per row and block: mean and size of each region, twice of salient columns
QUANTILE_SAMPLE = 1 << 16  # saliences that quantiles are taken of


class Regions(NamedTuple):
    """Where the weights of a block lie, bool `[rows, columns]`: each in one of them."""

    salient: Tensor
    near: Tensor  # of small salience
    far: Tensor


def run(by_salience: bool, subject: StudiedModel, put: Put) -> Candidate:
    """All linear matrices."""

    def solver(_: Matrix, module: nn.Linear) -> _Solver:
        return _Solver(module.in_features, by_salience)

    return round_layers(subject, put, solver)


class _Solver(Inputs):
    def __init__(self, width: int, by_salience: bool) -> None:
        super().__init__(width)
        self._by_salience, self._salient_columns = by_salience, 0

    def solve(self, weight: Tensor) -> QuantisedMatrix:
        factor = inverse_factor(self.moments)

        def start(now: Tensor, block: slice) -> Callable[[Tensor, int], Tensor]:
            salient = salience(now, factor[block, block])
            regions = find_regions(salient if self._by_salience else now, salient)
            self._salient_columns += int(regions.salient[0].sum())
            reached = binarised(now, regions)
            return lambda _, k: reached[:, k]

        rounded = round_columns(weight, factor, start, within=False)
        return quantised(rounded, _buffers(weight.shape[0], weight.shape[1], self._salient_columns))


def find_regions(values: Tensor, salient: Tensor) -> Regions:
    """Which columns, from the most salient on, and which border binarise `values` best, both `[rows, columns]`."""
    order = salient.sum(0).argsort(descending=True)
    count = min(_trials(values, order), key=lambda trial: trial[1])[0]
    inside = _first(order, count).expand_as(values)
    others = values[~inside].abs()
    borders = others[:: max(1, len(others) // QUANTILE_SAMPLE)].quantile(torch.tensor(BORDERS)).tolist()

    def split(border: float) -> tuple[Tensor, Tensor]:
        return ~inside & (values.abs() <= border), ~inside & (values.abs() > border)

    def error(border: float) -> float:
        near, far = split(border)
        return float(((values - once(values, near) - once(values, far)) * ~inside).square().sum())

    return Regions(inside, *split(min(borders, key=error)))


def _trials(values: Tensor, order: Tensor) -> Iterator[tuple[int, float]]:
    """Numbers of salient columns, and the squared error with each part binarised twice: as two regions will be."""
    for count in range(1, min(MOST_SALIENT, values.shape[1] - 1) + 1):
        inside = _first(order, count).expand_as(values)
        yield count, float((values - twice(values, inside) - twice(values, ~inside)).square().sum())


def _first(order: Tensor, count: int) -> Tensor:
    """Bool `[columns]`: the first of an order."""
    columns = torch.zeros(len(order), dtype=torch.bool)
    columns[order[:count]] = True
    return columns


def binarised(weight: Tensor, regions: Regions) -> Tensor:
    """A block, each region by itself."""
    return twice(weight, regions.salient) + once(weight, regions.near) + once(weight, regions.far)


def once(weight: Tensor, region: Tensor) -> Tensor:
    """Rows `[rows, columns]` in a region of them: the mean, and as much as the mean distance on either side; 0
    elsewhere."""
    count = region.sum(1, keepdim=True).clamp_min(1)
    mean = ((weight * region).sum(1, keepdim=True) / count).half().float()
    distance = (weight - mean) * region
    size = (distance.abs().sum(1, keepdim=True) / count).half().float()
    return (mean + size * torch.where(distance >= 0, 1.0, -1.0)) * region


def twice(weight: Tensor, region: Tensor) -> Tensor:
    """`once`, and what it leaves once more (residual binarisation)."""
    first = once(weight, region)
    return first + once((weight - first) * region, region)


def _buffers(rows: int, width: int, salient_columns: int) -> dict[str, Buffer]:
    blocks = -(-width // GROUP)
    signs, second, flags = rows * width, rows * salient_columns, rows * (width - salient_columns)
    return {
        "signs": Buffer("signs", "U8", (-(-signs // 8),)),
        "second": Buffer("second", "U8", (-(-second // 8),)),
        "regions": Buffer("regions", "U8", (-(-flags // 8),)),
        "columns": Buffer("columns", "U8", (-(-width // 8),)),
        "scalars": Buffer("scalars", "F16", (rows, blocks, SCALARS)),
    }


METHODS = tuple(
    Method(
        name=name,
        title=title,
        family="BiLLM",
        run=partial(run, by_salience),
        package="waterfill",
        calibrated=True,
        options=f"block {GROUP}",
    )
    for name, title, by_salience in (
        ("billm", "BiLLM, of the paper", False),
        ("billm-salience", "BiLLM, of its code", True),
    )
)
