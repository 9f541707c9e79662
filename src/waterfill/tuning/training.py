"""The loop: AdamW by a loss on batches, looked at on held-out windows now and then; the best state is what remains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from waterfill.base.errors import WaterfillError
from waterfill.base.progress import Progress, stage
from waterfill.tuning.losses import Loss
from waterfill.tuning.texts import Lessons

WARM_SHARE = 0.05  # of the steps, in which the rate rises; it falls as a cosine then, to a tenth
LEAST_RATE = 0.1
LOOKS = 10  # at the held-out windows, over all steps
PATIENCE = 3  # looks without a better one, after which training ends
NORM = 1.0  # that gradients are clipped to, all together


class Trained(Protocol):
    """What of a model is trained. Parameters are float32; a state is what would be stored."""

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """All of it."""

    def state(self) -> list[Tensor]:
        """The parameters as they would be stored, in copies."""


@dataclass(frozen=True)
class Outcome:
    """How training went: losses on the held-out windows, nats per token."""

    before: float
    after: float  # of the best state, which the parameters are in
    best_step: int
    steps: int  # that were made
    looks: tuple[tuple[int, float], ...]  # (steps made, loss)


def train(
    model: Any,
    trained: Trained,
    lessons: Lessons,
    loss: Loss,
    *,
    rate: float,
    patience: int = PATIENCE,
    progress: Progress | None = None,
) -> Outcome:
    """Train, and leave the parameters in the best state that was looked at: never worse than they were.

    Raises:
        WaterfillError: the loss is not finite before the first step.
    """
    parameters = trained.parameters
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    total = len(lessons.batches)
    every = max(1, total // LOOKS)
    before = held_loss(model, trained, lessons, loss)
    if not math.isfinite(before):
        raise WaterfillError(
            f"the model's loss on the held-out text is {before}; check the artifact with waterfill eval"
        )
    looks, best = [(0, before)], (before, 0, trained.state())
    made = 0
    with stage(progress, "tuning", total) as advance:
        for made, batch in enumerate(lessons.batches, 1):
            for group in optimizer.param_groups:
                group["lr"] = rate * schedule(made, total)
            step(model, parameters, optimizer, loss, batch)
            if made % every == 0 or made == total:
                looks.append((made, held_loss(model, trained, lessons, loss)))
                if looks[-1][1] < best[0]:
                    best = (looks[-1][1], made, trained.state())
                elif len(looks) - 1 - [at for at, _ in looks].index(best[1]) >= patience:
                    break
            advance()
    put(parameters, best[2])
    return Outcome(before, best[0], best[1], made, tuple(looks))


def step(model: Any, parameters: Sequence[Tensor], optimizer: Any, loss: Loss, batch: Any) -> float:
    """One step. A loss or gradient that is not finite moves nothing."""
    optimizer.zero_grad(set_to_none=True)
    value = loss(model, batch)
    value.backward()
    norm = torch.nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], NORM)
    if bool(torch.isfinite(norm)):
        optimizer.step()
    return float(value.detach())


def schedule(made: int, total: int) -> float:
    """The share of the rate at step `made`, from 1 to `total`."""
    warm = max(1, round(WARM_SHARE * total))
    if made <= warm:
        return made / warm
    return LEAST_RATE + (1 - LEAST_RATE) * (1 + math.cos(math.pi * (made - warm) / max(1, total - warm))) / 2


@torch.no_grad()
def held_loss(model: Any, trained: Trained, lessons: Lessons, loss: Loss) -> float:
    """Of the state as it would be stored, on the held-out windows; the parameters stay what they are."""
    exact = [parameter.detach().clone() for parameter in trained.parameters]
    put(trained.parameters, trained.state())
    total = sum(float(loss(model, (window,))) for window in lessons.held) / len(lessons.held)
    put(trained.parameters, exact)
    return total


@torch.no_grad()
def put(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Give parameters these values."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
