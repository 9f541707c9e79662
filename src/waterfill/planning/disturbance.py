"""Noise as a plan's codecs would make it, and what sequences lose with it in all matrices at once.

    plan ──► scale and power of each matrix's noise ──► model with that noise ──► KL(model || disturbed) by sequence

In each group of a row the noise has its share of the group's power, as rotated quantisation's has. Where errors are fed
back it is white, too, and has as much less power as feedback leaves of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from waterfill.codecs import get_codec
from waterfill.codecs.hadamard import groups
from waterfill.files.architecture import Matrix, parameters_of
from waterfill.files.model_calls import read
from waterfill.planning.costs import matrix_view
from waterfill.planning.estimators import check_probabilities, group_power
from waterfill.planning.loss import projection
from waterfill.planning.plan import TensorPlan
from waterfill.planning.sensitivity import Sensitivity

Losses = tuple[tuple[float, ...], ...]
"""Nats per token, of each sequence, by disturbance."""

POOL = 1 << 22  # normal numbers that the noise of all matrices is taken from, at other places for every row
MOST_POWER = 0.1  # of even noise, as a share of the weights': where all is still in proportion
STRIDE = 1_000_003  # between the places of neighbouring rows: a prime


class Noise(NamedTuple):
    """Of one matrix: its weights times `scale`, and noise of so much `power`, as a share of theirs."""

    scale: float
    power: float


@dataclass(frozen=True, eq=False)
class Disturbance:
    """Of all matrices that lose anything, by name."""

    noise: Mapping[str, Noise]

    @staticmethod
    def of(tensors: Sequence[TensorPlan]) -> Disturbance:
        """What a plan does to its matrices."""
        return Disturbance({tensor.name: _noise(tensor) for tensor in tensors if tensor.packed})

    @staticmethod
    def even(matrices: Sequence[Matrix], sensitivity: Sensitivity, loss: float) -> Disturbance:
        """Noise that every weight is to lose the same by, in all `loss` nats per token, or less where that is much for
        a matrix: what an optimal allocation leaves (docs/design.md §5)."""
        total = sum(math.prod(matrix.shape) for matrix in matrices)
        noise = {}
        for matrix in matrices:
            alpha, share = sensitivity.tensors[matrix.name].alpha, math.prod(matrix.shape) / total
            noise[matrix.name] = Noise(1.0, min(loss * share / alpha, MOST_POWER) if alpha > 0 else MOST_POWER)
        return Disturbance(noise)

    @cached_property
    def digest(self) -> str:
        """Of all its noise."""
        return blake2b(repr(sorted(self.noise.items())).encode(), digest_size=8).hexdigest()

    def predicted(self, sensitivity: Sensitivity) -> float:
        """What sensitivities add up to, nats per token; of products that no errors are fed back in."""
        return math.fsum(
            max(sensitivity.tensors[name].alpha, 0.0) * noise.power
            + max(sensitivity.tensors[name].beta, 0.0) * (1 - noise.scale) ** 2
            for name, noise in self.noise.items()
        )


def _noise(tensor: TensorPlan) -> Noise:
    t2 = get_codec(tensor.codec).distortion(tensor.shape)
    u = projection(t2, tensor.rho)
    left = 1.0 if tensor.feedback is None else tensor.feedback
    return Noise(u, u * u * t2 / (1 - t2) * left)


@torch.no_grad()
def losses(
    model: Any,
    matrices: Sequence[Matrix],
    part: Tensor,
    disturbances: Sequence[Disturbance],
    seed: int,
    *,
    lead: int = 0,
) -> Losses:
    """KL(model || disturbed) of each sequence, nats per token, by disturbance.

    Args:
        model: from `load_blockwise`.
        part: token ids, int64 `[sequences, length]`.
        seed: of the noise, the same numbers for every disturbance.
        lead: tokens at the beginning of each that only give context.

    Raises:
        WaterfillError: logits are not finite.
    """
    numbers = _Numbers(seed)
    reference = read(model, part)[:, lead:-1]
    lost = []
    for disturbance in disturbances:
        with disturbed(model, matrices, disturbance, numbers):
            other = read(model, part)[:, lead:-1]
        lost.append(tuple(divergence(a, b) for a, b in zip(reference, other, strict=True)))
    return tuple(lost)


def divergence(reference: Tensor, other: Tensor) -> float:
    """KL, the mean over logits `[tokens, vocabulary]`, nats per token.

    Raises:
        WaterfillError: they are not finite.
    """
    p, q = (logits.to(torch.float32).log_softmax(-1) for logits in (reference, other))
    difference = (p - q).masked_fill_(p == -math.inf, 0)  # tokens that a model never writes
    check_probabilities(difference)
    return float(difference.mul_(p.exp_()).sum(-1).double().mean())


class _Numbers:
    """Standard normal numbers for any rows of any matrix, the same ones whoever asks."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._pool = torch.randn(POOL, generator=torch.Generator().manual_seed(seed % 2**64))

    def of(self, name: str, rows: Tensor, width: int) -> Tensor:
        """float32 `[rows, width]`."""
        places = POOL - width
        first = Random(f"{self._seed} {name}").randrange(places)
        return self._pool.as_strided((places, width), (1, 1))[(first + rows * STRIDE) % places]


@contextmanager
def disturbed(model: Any, matrices: Sequence[Matrix], disturbance: Disturbance, numbers: _Numbers) -> Iterator[None]:
    """Have the model compute with disturbed weights inside of the block."""
    by_parameter: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        if matrix.name in disturbance.noise:
            by_parameter.setdefault(matrix.parameter, []).append(matrix)

    def change(name: str, weight: Tensor, rows: Tensor | None) -> Tensor:
        those = by_parameter.get(name, ())
        if len(those) == 1 and those[0].expert is None and not those[0].transposed:
            return noisy(those[0], weight, rows)
        changed = weight.clone() if those else weight
        for matrix in those:
            view = matrix_view(changed, matrix)
            view.copy_(noisy(matrix, view, rows))
        return changed

    def noisy(matrix: Matrix, weight: Tensor, rows: Tensor | None) -> Tensor:
        drawn = numbers.of(matrix.name, torch.arange(len(weight)) if rows is None else rows, weight.shape[1])
        return _with_noise(weight.to(torch.float32), disturbance.noise[matrix.name], drawn).to(weight.dtype)

    if model.blockwise is not None:
        with model.blockwise.changed(change):
            yield
        return
    parameters = parameters_of(model)  # by all their names
    before = {name: parameters[name].data for name in by_parameter}
    try:
        for name, weight in before.items():
            parameters[name].data = change(name, weight, None)
        yield
    finally:
        for name, weight in before.items():
            parameters[name].data = weight


def _with_noise(weight: Tensor, noise: Noise, drawn: Tensor) -> Tensor:
    """float32 `[rows, width]`; `drawn` is used up."""
    sigma = (group_power(weight) * noise.power).sqrt()
    for number, group in enumerate(groups(weight.shape[1])):
        drawn[:, group.start : group.stop].mul_(sigma[:, number, None])
    return drawn.add_(weight, alpha=noise.scale)
