"""LLM-Pruner's importances (arXiv 2305.11627, §3.2), and simpler ones: classes that hear of gradients, and sum up what
their formulas want.

With w the weights of a part and g the gradient of a sequence's mean negative log-probability (E is the mean over them):

    First    sum |w E g|                           Element, first order
    Second   sum w^2 E g^2                         its second-order term
    Mix      sum |w E g - 1/2 w^2 E g^2|           Element, first and second order
    Vector   |sum w E g| of each row or column     Vector

of which a part has the sum over all its rows (of q, k, v, gate, up), columns (of o, down) and biases.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from waterfill.files.skeleton import ModelTensor
from waterfill.tuning.pruning.selection import Scores
from waterfill.tuning.pruning.structure import KINDS, Kind, Member, Structure

Read = Callable[[ModelTensor], Tensor]
"""Gives the weights of a tensor."""


class Terms(ABC):
    """Hears of passes of one sequence each, one after the other, and scores parts in the end.

    Args:
        read: weights, for whoever needs them once more.
    """

    def __init__(self, structure: Structure, read: Read) -> None:
        self._structure, self._read = structure, read
        self._sequences, self._positions = 0, 0  # a sequence's
        sizes = structure.sizes
        self._sums = {kind: torch.zeros(sizes.layers, sizes.parts(kind), dtype=torch.float64) for kind in KINDS}

    def begin(self, positions: int) -> None:
        """What follows is of the next sequence, which predicts so many positions, as all do."""
        self._sequences += 1
        self._positions = positions

    def add(self, name: str, weight: Tensor, gradient: Tensor, sign: int) -> None:
        """A member's gradient of the sum of log-probabilities; no part of it is taken back, as those of tables are."""
        w, g = weight.to(torch.float32), gradient.to(torch.float32)
        self._add(self._structure.members[name], w, g / -self._positions)

    @abstractmethod
    def _add(self, member: Member, w: Tensor, g: Tensor) -> None:
        """Of one weight or bias, float32: its gradient of the sequence's mean negative log-probability."""

    @abstractmethod
    def scores(self) -> Scores:
        """Of all sequences."""

    def _made(self, factor: float = 1.0) -> Scores:
        return Scores(self._sums["heads"] * factor, self._sums["channels"] * factor, nats=False)

    def _count(self, member: Member, of_lines: Tensor) -> None:
        """Add figures of each row or column to those of the parts that they belong to."""
        self._sums[member.kind][member.layer] += of_parts(member, of_lines)


class Second(Terms):
    def _add(self, member: Member, w: Tensor, g: Tensor) -> None:
        self._count(member, by_lines(member, (w * g).square()))

    def scores(self) -> Scores:
        return self._made(1 / self._sequences)


class Vector(Terms):
    def __init__(self, structure: Structure, read: Read) -> None:
        super().__init__(structure, read)
        self._lines: dict[str, Tensor] = {}  # sums of w g of rows or columns, by tensor

    def _add(self, member: Member, w: Tensor, g: Tensor) -> None:
        _add_to(self._lines, member.tensor.name, by_lines(member, w * g))

    def scores(self) -> Scores:
        for name, of_lines in self._lines.items():
            self._count(self._structure.members[name], of_lines.abs())
        return self._made(1 / self._sequences)


class First(Terms):
    """Holds a gradient of every weight of the decoder layers in float32."""

    def __init__(self, structure: Structure, read: Read) -> None:
        super().__init__(structure, read)
        self._gradients: dict[str, Tensor] = {}  # sums of g, by tensor

    def _add(self, member: Member, w: Tensor, g: Tensor) -> None:
        _add_to(self._gradients, member.tensor.name, g)

    def scores(self) -> Scores:
        for name, total in self._gradients.items():
            member = self._structure.members[name]
            terms = self._term(name, self._read(member.tensor).to(torch.float32), total / self._sequences)
            self._count(member, by_lines(member, terms.abs()))
        return self._made()

    def _term(self, name: str, w: Tensor, g: Tensor) -> Tensor:
        return w * g


class Mix(First):
    """Holds two."""

    def __init__(self, structure: Structure, read: Read) -> None:
        super().__init__(structure, read)
        self._squares: dict[str, Tensor] = {}  # sums of g^2, by tensor

    def _add(self, member: Member, w: Tensor, g: Tensor) -> None:
        super()._add(member, w, g)
        _add_to(self._squares, member.tensor.name, g.square())

    def _term(self, name: str, w: Tensor, g: Tensor) -> Tensor:
        return w * g - 0.5 * w.square() * self._squares[name] / self._sequences


def by_lines(member: Member, values: Tensor) -> Tensor:
    """Sums over each row or column that parts consist of, `[lines]`; a bias has one value each."""
    return values if values.ndim == 1 else values.sum(1 - member.axis)


def of_parts(member: Member, of_lines: Tensor) -> Tensor:
    """Sums over the rows or columns of each part, float64 `[parts]`."""
    return of_lines.double().view(-1, member.width).sum(1)


def _add_to(sums: dict[str, Tensor], name: str, more: Tensor) -> None:
    if name in sums:
        sums[name] += more
    else:
        sums[name] = more.clone()


def magnitudes(structure: Structure, read: Read, power: int) -> Scores:
    """Sum of |w|^power over all weights and biases of a part."""
    sizes = structure.sizes
    sums = {kind: torch.zeros(sizes.layers, sizes.parts(kind), dtype=torch.float64) for kind in KINDS}
    for member in structure.members.values():
        terms = read(member.tensor).to(torch.float32).abs().pow(power)
        sums[member.kind][member.layer] += of_parts(member, by_lines(member, terms))
    return Scores(sums["heads"], sums["channels"], nats=False)


def random_scores(structure: Structure, seed: int) -> Scores:
    """Uniform numbers."""
    generator, sizes = torch.Generator().manual_seed(seed % 2**64), structure.sizes

    def drawn(kind: Kind) -> Tensor:
        return torch.rand(sizes.layers, sizes.parts(kind), dtype=torch.float64, generator=generator)

    return Scores(drawn("heads"), drawn("channels"), nats=False)
