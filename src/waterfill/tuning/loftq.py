"""LoftQ's start of an adapter (arXiv 2310.08659): the best approximation of what quantisation took from each weight.

    W - W_packed = U S V'    B = U_r S_r^(1/2)    A = S_r^(1/2) V_r'

LoftQ itself goes back and forth between quantising W - BA and this; the codes here are those of an artifact and stay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from waterfill.base.progress import Progress, stage
from waterfill.files.architecture import describe, read_rows
from waterfill.files.checkpoint import Checkpoint
from waterfill.tuning.parts import Adapter


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B `[out, rank]` and A `[rank, in]` with the product that is nearest to a matrix `[out, in]`."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    b, a = u[:, :rank] * root, root[:, None] * vh[:rank]
    missing = rank - len(root)  # of a matrix smaller than the rank
    return torch.nn.functional.pad(b, (0, missing)), torch.nn.functional.pad(a, (0, 0, 0, missing))


@torch.no_grad()
def start_by_loftq(adapter: Adapter, checkpoint: Checkpoint, rank: int, progress: Progress | None = None) -> None:
    """Give every layer of the adapter the nearest of its rank to original weight minus packed one."""
    matrices = {matrix.name: matrix for matrix in describe(checkpoint).matrices}
    with stage(progress, "starting from what was lost", len(adapter.layers)) as advance:
        for name, layer in adapter.layers.items():
            original = read_rows(checkpoint, matrices[name], 0, matrices[name].shape[0]).to(torch.float32)
            adapter.set_layer(name, *low_rank(original - layer.base_layer.dense(), rank))
            advance()
