"""What noise in a head costs, and by which tokens. One that is the embedding too costs the rest looked up.

Noise n in the row of token v adds n'x to its logit, independently of other rows, and KL is half the variance of what is
added, by the probabilities p. With noise of as much power in each group g of a row as its weights have, d of them, that
is the sum over tokens, tokens v and groups of

    1/2 p_v (1 - p_v) |w_vg|^2 / d_g |x_g|^2

so a token counts with as much as its prediction leaves open, and x's moments weighed so are those that the loss is of.
It takes a pass forward, of few tokens, and no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from waterfill.codecs.groups import TINY, group_sizes, group_sums, per_weight
from waterfill.files.architecture import Matrix, read_rows
from waterfill.files.blockwise import CHUNK_WEIGHTS
from waterfill.files.checkpoint import Checkpoint
from waterfill.files.model_calls import read
from waterfill.planning.probe import lead_of


@torch.no_grad()
def weighed_moments(model: Any, checkpoint: Checkpoint, matrix: Matrix, tokens: Tensor) -> Tensor:
    """Second moments of what the head multiplies, float32 `[in, in]`, on token ids `[sequences, length]`: their trace
    is the alpha of products, in nats per token that a probe counts."""
    seen: list[Tensor] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, inputs, output: seen.extend((inputs[0], output)))
    try:
        logits = read(model, tokens)
    finally:
        handle.remove()
    powers, counted = _powers(checkpoint, matrix), slice(lead_of(tokens.shape[1]), -1)
    parts = [
        _weighed(powers, *(part[counted].to(torch.float32) for part in sequence))
        for sequence in zip(*seen, logits, strict=True)
    ]
    x = torch.cat(parts)
    return x.T @ x / (2 * len(x))


def _powers(checkpoint: Checkpoint, matrix: Matrix) -> Tensor:
    """Mean squares of the groups of rows, float32 `[rows, groups]`."""
    height, width = matrix.shape
    step = max(1, CHUNK_WEIGHTS // width)
    parts = (read_rows(checkpoint, matrix, at, min(at + step, height)) for at in range(0, height, step))
    sums = torch.cat([group_sums(part.to(torch.float32).square()) for part in parts])
    return sums / group_sizes(width, torch.float32)


def _weighed(powers: Tensor, x: Tensor, products: Tensor, logits: Tensor) -> Tensor:
    """x `[tokens, in]`, as long as what noise adds to the logits of each of its tokens is wide."""
    # Some models scale, or cap, what the head gives: by so much on the whole.
    slope = (logits * products).sum(1) / products.square().sum(1).clamp_min(TINY)
    p = logits.softmax(1)
    variances = (p * (1 - p)) @ powers[: p.shape[1]]
    return x * per_weight(variances.sqrt() * slope[:, None], x.shape[1])
