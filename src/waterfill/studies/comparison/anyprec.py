"""Any-Precision LLM (arXiv 2402.10517): levels of each row by weighted k-means, each bit splitting every level in two.

    weights, squared gradients ──k-means──► 8 levels of a row ──2-means of each──► 16 ──► … ──► 256
                                               index >> (8 - b)  ◄──── of b bits ◄──── index of 8 bits

A weight counts by its squared gradient of the loss on calibration tokens, summed over sequences (the diagonal of the
empirical Fisher matrix). k-means of numbers in order needs sums up to every number only; the seed begins where levels
are densest for a source of many levels (Panter and Dite 1951) and goes through Lloyd's iterations, a split in two is
the best of all.

No library of its own runs on a CPU, so the method is implemented here. A model of b bits is charged what running it
takes: b planes of bits, and its table of 2^b fp16 levels per row. One file for all of them has every plane, and the
tables of all precisions.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor

from waterfill.files.architecture import parameters_of
from waterfill.files.artifact import Buffer
from waterfill.files.model_calls import read
from waterfill.planning.costs import matrix_view
from waterfill.studies.comparison.base import Candidate, Method, Put, StudiedModel, Unavailable
from waterfill.studies.comparison.stored import QuantisedMatrix, quantised, run_quantiser

SEED_BITS, MOST_BITS = 3, 8
TINY = torch.finfo(torch.float64).tiny
ITERATIONS = 50  # of Lloyd's, at most
BITS = (3, 4, 6, 8)


def run(bits: int, subject: StudiedModel, put: Put) -> Candidate:
    """All matrices."""
    importance = iter(squared_gradients(subject))

    def quantiser(weight: Tensor) -> QuantisedMatrix:
        levels, index = nested_levels(weight, next(importance), bits)
        planes = Buffer("planes", "U8", (bits, weight.shape[0], -(-weight.shape[1] // 8)))
        return quantised(levels.gather(1, index), {"planes": planes, "levels": levels.half()})

    return run_quantiser(quantiser, subject, put)


def squared_gradients(subject: StudiedModel) -> list[Tensor]:
    """Of every matrix, float32 `[out, in]`, summed over sequences of the calibration tokens."""
    model = copy.deepcopy(subject.model).requires_grad_(True)
    parameters = parameters_of(model)
    matrices = subject.architecture.matrices
    wanted = {matrix.parameter: parameters[matrix.parameter] for matrix in matrices}
    sums = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in wanted.items()}
    with torch.enable_grad():
        for sequence in subject.calibration_tokens():
            logits = read(model, sequence[None])[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, sequence[1:])
            gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
            for name, gradient in zip(wanted, gradients, strict=True):
                if gradient is not None:
                    sums[name] += gradient.detach().float().square()
    if not all(bool(total.isfinite().all()) for total in sums.values()):
        raise Unavailable("gradients on the calibration tokens are not finite")
    return [matrix_view(sums[matrix.parameter], matrix) for matrix in matrices]


def nested_levels(weight: Tensor, importance: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Levels of `bits` bits of each row, float32 `[rows, 2^bits]` as fp16 holds them, and the index of every weight,
    int64 `[rows, in]`.

    Args:
        weight, importance: `[rows, in]`; rows of no importance count all weights the same.
    """
    values, order = weight.double().sort(dim=1)
    counts = importance.double().gather(1, order) * (values != 0)
    counts = torch.where(counts.sum(1, keepdim=True) > 0, counts, 1.0)
    sums = _Sums(values, counts)
    index = seed(sums)
    for b in range(SEED_BITS, bits):
        index = split(sums, index, 1 << b)
    levels = sums.means(index, 1 << bits)
    in_place = torch.empty_like(index).scatter_(1, order, index)
    return levels.half().float(), in_place


class _Sums:
    """Values of rows in order, `[rows, count]`, what each counts, and sums of both by cluster."""

    def __init__(self, values: Tensor, counts: Tensor) -> None:
        self.values, self.counts = values, counts
        self.weighed = values * counts

    def of(self, index: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
        """What the members of each cluster count, and their weighed sum, `[rows, clusters]`."""
        empty = self.values.new_zeros(len(index), clusters)
        return empty.scatter_add(1, index, self.counts), empty.scatter_add(1, index, self.weighed)

    def means(self, index: Tensor, clusters: int) -> Tensor:
        """Of each cluster, `[rows, clusters]`; one that nobody counts in has the mean of its members, or that of the
        cluster that it was split from."""
        count, total = self.of(index, clusters)
        plain = self.values.new_zeros(len(index), clusters)
        members = plain.scatter_add(1, index, torch.ones_like(self.values))
        mean = plain.scatter_add(1, index, self.values) / members.clamp_min(1)
        found = torch.where(count > 0, total / count.clamp_min(TINY), mean)
        if clusters == 1:
            return found
        parent = self.means(index // 2, clusters // 2).repeat_interleave(2, dim=1)
        return torch.where(members > 0, found, parent)


def seed(sums: _Sums) -> Tensor:
    """Weighted k-means of 2^SEED_BITS levels: the index of each value in order, int64 `[rows, count]`."""
    clusters = 1 << SEED_BITS
    density = sums.counts.clamp_min(0).pow(1 / 3).cumsum(1)
    share = density / density[:, -1:].clamp_min(TINY)
    index = (share * clusters).long().clamp(0, clusters - 1)
    for _ in range(ITERATIONS):
        levels = sums.means(index, clusters).sort(dim=1).values
        borders = (levels[:, 1:] + levels[:, :-1]) / 2
        following = torch.searchsorted(borders.contiguous(), sums.values.contiguous())
        if torch.equal(following, index):
            break
        index = following
    return index


def split(sums: _Sums, index: Tensor, clusters: int) -> Tensor:
    """Every cluster in two where that leaves least: index of twice as many clusters, 2c and 2c + 1 of cluster c; one
    that cannot be split is 2c + 1."""
    count, total = sums.of(index, clusters)
    left_count, left_total = _up_to(sums.counts, count, index), _up_to(sums.weighed, total, index)
    right_count, right_total = count.gather(1, index) - left_count, total.gather(1, index) - left_total
    least = 1e-12 * count.gather(1, index)  # what sums are off by
    usable = (left_count > least) & (right_count > least)
    # What two means explain of the sum of squares, which is the same however a cluster is split.
    explained = left_total.square() / left_count.clamp_min(TINY) + right_total.square() / right_count.clamp_min(TINY)
    explained = torch.where(usable, explained, -1.0)
    best = torch.full_like(count, -2.0).scatter_reduce(1, index, explained, "amax").gather(1, index)
    positions = torch.arange(index.shape[1]).expand_as(index)
    chosen = torch.where(usable & (explained >= best), positions, -1)
    last = torch.full_like(count, -1, dtype=torch.int64).scatter_reduce(1, index, chosen, "amax").gather(1, index)
    return 2 * index + (positions > last).long()


def _up_to(values: Tensor, of_clusters: Tensor, index: Tensor) -> Tensor:
    """Sums of a cluster's values up to each of them, which is one of the sum."""
    before = of_clusters.cumsum(1) - of_clusters
    return values.cumsum(1) - before.gather(1, index)


METHODS = tuple(
    Method(
        name=f"anyprec-{bits}",
        title=f"Any-Precision, {bits} bits",
        family="Any-Precision",
        run=partial(run, bits),
        package="waterfill",
        calibrated=True,
        options=f"seed {SEED_BITS} bits",
    )
    for bits in BITS
)
