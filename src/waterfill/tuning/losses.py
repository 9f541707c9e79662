"""What training makes less: the surprise at the next token, or the distance from a teacher's predictions.

The teacher reads every window once; its likeliest tokens are kept on disk (`evaluation.store`), and of all others their
probability together. KL over these, a sum of as many terms as were kept and one for the rest, is a lower bound on the
whole (merging tokens can only lose divergence), and what it misses is small where the rest is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from waterfill.evaluation.conventions import Window, stacked
from waterfill.evaluation.expected import Exact, TopK
from waterfill.evaluation.store import ReferenceStore
from waterfill.files.model_calls import read

Loss = Callable[[Any, Sequence[Window]], Tensor]
"""Of a model on some windows: nats per token."""

LEAST_REST = 1e-9  # probability of all tokens that were not kept, below which its logarithm is not asked for


def surprise(model: Any, some: Sequence[Window]) -> Tensor:
    """Mean negative log-probability of the next token."""
    ids = stacked(some)
    logits = read(model, ids)[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def distance_from(store: ReferenceStore) -> Loss:
    """KL from the predictions in a store to the model's."""

    def distance(model: Any, some: Sequence[Window]) -> Tensor:
        logits = read(model, stacked(some))[:, :-1]
        parts = [divergence(store.expected(window), row) for window, row in zip(some, logits, strict=True)]
        return torch.stack(parts).mean()

    return distance


def divergence(known: Any, logits: Tensor) -> Tensor:
    """Mean KL(known || model) of logits [targets, vocab], differentiable."""
    log_q = torch.log_softmax(logits.float(), dim=-1)
    if isinstance(known, Exact):
        log_p = torch.log_softmax(known.logits.float(), dim=-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert isinstance(known, TopK)
    tokens = known.tokens.long()
    log_p = (known.logits.double() - known.log_sum.double()[:, None]).float()
    taken = log_q.gather(1, tokens)
    kept = (log_p.exp() * (log_p - taken)).sum(-1)
    rest = known.rest.float().clamp_min(LEAST_REST)
    left = (1 - taken.exp().sum(-1)).clamp_min(LEAST_REST)
    return (kept + rest * (rest.log() - left.log())).mean()
