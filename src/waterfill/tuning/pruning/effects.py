"""What a model would lose without a part, to second order: the score that is a loss in nats.

    forward    x of each token, what o and down are multiplied with
    backward   g, the gradient there of the log-probability of labels drawn from the model's own predictions
    score      1/2 E sum over tokens (sum x g over the part's columns)^2 / predicted positions

Without its columns of o or down a part has no effect, and what a layer adds to the hidden state is linear in them. So
x g is exactly the slope of the log-probability as the part vanishes, but for its sign; w g of its rows of q, k, v, gate
or up would count the same effect again. With drawn labels the expected square of a slope is the Fisher information, of
which KL is half (`planning.sensitivity`): leaving a part out is t^2 = 1 of it.

What a part does at one token is taken to be independent of what it does at others. The square of a whole text's sum
would do without that, but has one sample for each text, and chose worse on as many texts (tried by hand).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from waterfill.tuning.pruning.selection import Scores
from waterfill.tuning.pruning.structure import KINDS, Member, Structure


class Effects:
    """Sums over the tokens of all passes."""

    def __init__(self, structure: Structure) -> None:
        self._members = [member for member in structure.members.values() if member.last]
        self._sums = {
            kind: torch.zeros(structure.sizes.layers, structure.sizes.parts(kind), dtype=torch.float64)
            for kind in KINDS
        }
        self._anchor = torch.zeros((), requires_grad=True)  # nothing else may be there to differentiate by

    @contextmanager
    def watched(self, model: Any) -> Iterator[None]:
        """Hear of the passes of a model inside of the block."""
        handles = [
            model.get_submodule(member.tensor.name.removesuffix(".weight")).register_forward_pre_hook(
                self._hook(member)
            )
            for member in self._members
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def scores(self, positions: int) -> Scores:
        """Of passes that predicted so many positions in all."""
        heads, channels = (self._sums[kind] / (2 * positions) for kind in KINDS)
        return Scores(heads, channels, nats=True)

    def _hook(self, member: Member) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...] | None]:
        def multiplied(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if not torch.is_grad_enabled():  # it is computed again on the way back
                return None
            x = inputs[0] if inputs[0].requires_grad else inputs[0] + self._anchor.to(inputs[0].dtype)
            values = x.detach()
            x.register_hook(lambda gradient: self._add(member, values, gradient))
            return (x,)

        return multiplied

    def _add(self, member: Member, x: Tensor, gradient: Tensor) -> None:
        """Of one product, `[…, in]`."""
        slopes = (x.to(torch.float32) * gradient.to(torch.float32)).view(-1, member.parts, member.width).sum(2)
        self._sums[member.kind][member.layer] += slopes.double().square().sum(0)
