"""Coefficients to plan with, of matrices that the probe reached hardly or not at all.

A router sends a token to few of its experts, and text passes no vision tower. Where no token came by, alpha and beta
are zero, which says nothing: another text may come by. So what is planned with lies between what was measured and what
is usual among like matrices,

    alpha = m measured + (1 - m) prior        m = n / (n + HALF (1 - n / N))

for a matrix that n of the probe's N tokens reached; beta likewise. What every token reached is as it was measured.

The prior is the mean, per weight, of the closest like matrices that some token reached. Names make matrices alike that
differ in numbers, the last of them first: the experts of one module, then those of all layers. A kind of which nothing
was reached, a tower for one, takes the mean over its role, or else over all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from waterfill.base.errors import WaterfillError
from waterfill.planning.inventory import PlannedMatrix
from waterfill.planning.loss import Coefficients

HALF = 64  # tokens that make a measurement count as much as the prior, of a matrix that few of all tokens reach


@dataclass(frozen=True)
class Evidence:
    """Coefficients to plan a matrix with, and what they rest on."""

    coefficients: Coefficients
    measured: float = 1.0  # share of the measurement in them
    like: str | None = None  # the matrices that the rest is taken from, in words or as a pattern of names


def weigh(matrices: Sequence[PlannedMatrix], measured: Mapping[str, Coefficients], tokens: int) -> dict[str, Evidence]:
    """Evidence by name of all matrices that a probe of `tokens` predicted positions has `measured`.

    Raises:
        WaterfillError: it reached none of them.
    """
    known = [matrix for matrix in matrices if matrix.name in measured]
    usual = _Usual(known, measured)
    return {matrix.name: _weighed(matrix, measured[matrix.name], tokens, usual) for matrix in known}


def _weighed(matrix: PlannedMatrix, c: Coefficients, tokens: int, usual: _Usual) -> Evidence:
    if c.tokens is None or c.tokens >= tokens:
        return Evidence(c)
    share = c.tokens / (c.tokens + HALF * (1 - c.tokens / tokens))
    alpha, beta, like = usual.of(matrix)
    mixed = Coefficients(share * c.alpha + (1 - share) * alpha, share * c.beta + (1 - share) * beta, tokens=c.tokens)
    return Evidence(mixed, share, like)


class _Usual:
    """Mean alpha and beta per weight of the matrices that were reached, by every kind that they belong to."""

    def __init__(self, matrices: Sequence[PlannedMatrix], measured: Mapping[str, Coefficients]) -> None:
        gathered: dict[str, list[tuple[float, float]]] = {}
        for matrix in matrices:
            c, weights = measured[matrix.name], math.prod(matrix.shape)
            if c.tokens != 0:
                for kind in _kinds(matrix):
                    gathered.setdefault(kind, []).append((max(c.alpha, 0.0) / weights, max(c.beta, 0.0) / weights))
        self._means = {
            kind: [math.fsum(v) / len(v) for v in zip(*all_, strict=True)] for kind, all_ in gathered.items()
        }

    def of(self, matrix: PlannedMatrix) -> tuple[float, float, str]:
        """alpha, beta, and the closest kind that they are of."""
        kind = next((kind for kind in _kinds(matrix) if kind in self._means), None)
        if kind is None:
            raise WaterfillError(
                f"no token of the probe reached {matrix.name}, nor any other of the matrices that are left to be "
                "packed, so nothing says what they may lose; keep fewer tensors, or measure on a text that uses them"
            )
        alpha, beta = self._means[kind]
        weights = math.prod(matrix.shape)
        return alpha * weights, beta * weights, kind


def _kinds(matrix: PlannedMatrix) -> Iterator[str]:
    """From the closest to the widest."""
    parts = matrix.name.split(".")
    for i in reversed(range(len(parts))):
        if parts[i].isdecimal():
            parts[i] = "*"
            yield ".".join(parts)
    yield f"all {matrix.role} matrices"
    yield "all matrices"
