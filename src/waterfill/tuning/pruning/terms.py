"""Importance of parts from what passes say: each class hears of gradients, and adds up what its formula wants.

With w the weights of a part and g the gradient of the loss, by a sequence's mean negative log-probability:

    Fisher   1/2 E (sum w g)^2 over the columns of o or down, labels drawn from the model's own predictions
    First    sum |w g|, by the mean gradient                                       LLM-Pruner's Element, first order
    Second   sum w^2 E g^2                                                         its second-order term
    Mix      sum |w g - 1/2 w^2 E g^2|                                             Element, first and second order
    Vector   |sum w g| of each row (of q, k, v, gate, up) or column (of o, down)   LLM-Pruner's Vector

of which a part has the sum over all its rows, columns and biases (arXiv 2305.11627, §3.2).

Without a part's columns of o or down its rows have no effect. What a layer adds to the hidden state is linear in these
columns, so that their w g alone is the slope of the loss in the direction in which the whole part vanishes; that of its
rows would count the same effect again. KL is half the expected square of that slope to second order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from waterfill.files.skeleton import ModelTensor
from waterfill.tuning.pruning.selection import Scores
from waterfill.tuning.pruning.structure import KINDS, Kind, Member, Structure

Read = Callable[[ModelTensor], Tensor]
"""Gives the weights of a tensor."""


class Terms(ABC):
    """Hears of passes, one after the other, and scores parts in the end.

    Args:
        read: weights, for whoever needs them once more.
    """

    sampled: ClassVar[bool] = False  # labels are drawn from the model's own predictions; else the text has them
    outputs: ClassVar[bool] = False  # only products with o and down are of interest

    def __init__(self, structure: Structure, read: Read) -> None:
        self._structure, self._read = structure, read
        self._positions, self._sequences, self._of_pass = 0, 0, 1
        sizes = structure.sizes
        self._sums = {kind: torch.zeros(sizes.layers, sizes.parts(kind), dtype=torch.float64) for kind in KINDS}

    @property
    def members(self) -> tuple[Member, ...]:
        """Whose products are to be told of."""
        return tuple(each for each in self._structure.weights if each.last or not self.outputs)

    def begin(self, sequences: int, positions: int) -> None:
        """What follows is of a pass of so many sequences, which predict so many positions in all."""
        self._of_pass = sequences
        self._positions += positions
        self._sequences += sequences

    def add(self, name: str, weight: Tensor, gradient: Tensor, sign: int) -> None:
        """A gradient that comes by no product: these families have none of their projections."""
        raise NotImplementedError(name)

    def add_product(self, name: str, weight: Tensor, x: Tensor, slope: Tensor, back: Tensor) -> None:
        """As `planning.costs.Receiver` has it."""
        member = self._structure.members[name]
        self._add(member, *(each.to(torch.float32) for each in (weight, x, slope, back)))

    @abstractmethod
    def _add(self, member: Member, weight: Tensor, x: Tensor, slope: Tensor, back: Tensor) -> None:
        """Of one matrix `[rows, in]` and one pass, float32."""

    @abstractmethod
    def scores(self) -> Scores:
        """Of all passes."""

    def _count(self, member: Member, of_lines: Tensor) -> None:
        """Add figures of each row or column `[lines]` to those of the parts that they belong to."""
        self._sums[member.kind][member.layer] += of_lines.double().view(-1, member.width).sum(1)

    def _gradients(self, x: Tensor, slope: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Those of the loss of every sequence, by weights `[rows, in]` and by biases `[rows]`."""
        factor = -self._positions_each
        parts = zip(slope.chunk(self._of_pass), x.chunk(self._of_pass), strict=True)
        return [(s.T @ each / factor, s.sum(0) / factor) for s, each in parts]

    @property
    def _positions_each(self) -> float:
        return self._positions / self._sequences

    def _made(self, *, nats: bool = False) -> Scores:
        return Scores(self._sums["heads"], self._sums["channels"], nats)


class Fisher(Terms):
    sampled = True
    outputs = True

    def _add(self, member: Member, weight: Tensor, x: Tensor, slope: Tensor, back: Tensor) -> None:
        along = (x * back).view(self._of_pass, -1, member.parts, member.width).sum((1, 3), dtype=torch.float64)
        self._sums[member.kind][member.layer] += along.square().sum(0)

    def scores(self) -> Scores:
        for sums in self._sums.values():
            sums /= 2 * self._positions
        return self._made(nats=True)


class Second(Terms):
    def _add(self, member: Member, weight: Tensor, x: Tensor, slope: Tensor, back: Tensor) -> None:
        bias = self._structure.bias(member)
        b = None if bias is None or member.last else self._read(bias).to(torch.float32)
        for g, of_bias in self._gradients(x, slope):
            self._count(member, (weight * g).square().sum(1 - member.axis))
            if b is not None:
                self._count(member, (b * of_bias).square())

    def scores(self) -> Scores:
        for sums in self._sums.values():
            sums /= self._sequences
        return self._made()


class Vector(Terms):
    def __init__(self, structure: Structure, read: Read) -> None:
        super().__init__(structure, read)
        self._lines: dict[str, Tensor] = {}  # sums of w g by row or column, of a weight or bias

    def _add(self, member: Member, weight: Tensor, x: Tensor, slope: Tensor, back: Tensor) -> None:
        of_lines = x * back if member.last else slope * (x @ weight.T)
        self._keep(member.tensor.name, of_lines.sum(0, dtype=torch.float64))
        if (bias := self._structure.bias(member)) is not None and not member.last:
            self._keep(bias.name, (slope.sum(0) * self._read(bias)).double())

    def _keep(self, name: str, of_lines: Tensor) -> None:
        self._lines[name] = self._lines.get(name, torch.zeros_like(of_lines)) + of_lines

    def scores(self) -> Scores:
        for name, of_lines in self._lines.items():
            self._count(self._structure.members[name], of_lines.abs() / self._positions)
        return self._made()


class First(Terms):
    """Holds a gradient of every weight of the decoder layers in float32."""

    def __init__(self, structure: Structure, read: Read) -> None:
        super().__init__(structure, read)
        self._means: dict[str, Tensor] = {}  # sums of g, by tensor

    def _add(self, member: Member, weight: Tensor, x: Tensor, slope: Tensor, back: Tensor) -> None:
        bias = self._structure.bias(member)
        for g, of_bias in self._gradients(x, slope):
            self._keep(member.tensor.name, g)
            if bias is not None and not member.last:
                self._keep(bias.name, of_bias)

    def _keep(self, name: str, gradient: Tensor) -> None:
        _add_to(self._means, name, gradient)

    def scores(self) -> Scores:
        for name, total in self._means.items():
            member = self._structure.members[name]
            terms = self._of(name, self._read(member.tensor).to(torch.float32), total / self._sequences).abs()
            self._count(member, terms if terms.ndim == 1 else terms.sum(1 - member.axis))
        return self._made()

    def _of(self, name: str, weight: Tensor, mean: Tensor) -> Tensor:
        return weight * mean


class Mix(First):
    """Holds two."""

    def __init__(self, structure: Structure, read: Read) -> None:
        super().__init__(structure, read)
        self._squares: dict[str, Tensor] = {}  # sums of g^2

    def _keep(self, name: str, gradient: Tensor) -> None:
        super()._keep(name, gradient)
        _add_to(self._squares, name, gradient.square())

    def _of(self, name: str, weight: Tensor, mean: Tensor) -> Tensor:
        return weight * mean - 0.5 * weight.square() * self._squares[name] / self._sequences


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
        of_lines = terms if terms.ndim == 1 else terms.sum(1 - member.axis)
        sums[member.kind][member.layer] += of_lines.double().view(-1, member.width).sum(1)
    return Scores(sums["heads"], sums["channels"], nats=False)


def random_scores(structure: Structure, seed: int) -> Scores:
    """Uniform numbers."""
    generator, sizes = torch.Generator().manual_seed(seed % 2**64), structure.sizes

    def drawn(kind: Kind) -> Tensor:
        return torch.rand(sizes.layers, sizes.parts(kind), dtype=torch.float64, generator=generator)

    return Scores(drawn("heads"), drawn("channels"), nats=False)
