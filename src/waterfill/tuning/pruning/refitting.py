"""What stays takes over from what goes: columns of o and down are fitted anew, by least squares.

With x what a matrix W is multiplied with, H = sum x x' over the tokens of a text and K the columns that stay, the
W_K that makes |W x - W_K x_K|^2 least over the text is W H_:K H_KK^-1. Optimal brain surgery of whole columns, as in
ZipLM (Kurtic et al., arXiv 2302.04089), updates what is left in the same way.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from waterfill.base import process
from waterfill.base.progress import Progress
from waterfill.files.architecture import Architecture, read_kept
from waterfill.files.checkpoint import Checkpoint
from waterfill.files.skeleton import ModelTensor
from waterfill.planning.moments import InputMoments
from waterfill.tuning.pruning.selection import Selection
from waterfill.tuning.pruning.structure import Structure

DAMPING = 0.01  # of the mean moment: weights stay where they are rather than follow what few tokens say
MOMENTS_SHARE = 0.25  # of the free memory, that moments may take


class Refitted:
    """Gives the columns that stay of each matrix, fitted anew; cheapest in the model's order.

    Args:
        tokens: int64 `[sequences, length]`, at least two sequences.
        dtype: that the model computes in.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        structure: Structure,
        selection: Selection,
        tokens: Tensor,
        dtype: torch.dtype,
        progress: Progress | None = None,
    ) -> None:
        self._checkpoint, self._structure, self._selection = checkpoint, structure, selection
        self._places = {layer: place for place, layer in enumerate(selection.layers)}
        outputs = {name for name, member in structure.members.items() if member.last}
        some = tuple(matrix for matrix in architecture.matrices if matrix.parameter in outputs)
        self._names = {matrix.parameter: matrix.name for matrix in some}
        self._moments = InputMoments(
            checkpoint,
            replace(architecture, tensors=some),
            tokens,
            dtype=dtype,
            limit_bytes=MOMENTS_SHARE * process.free_bytes(),
            progress=progress,
        )

    def __call__(self, tensor: ModelTensor) -> Tensor | None:
        """A matrix with the columns that stay, in its own dtype; None for one that nothing goes of, or that has no
        moments."""
        name = self._names.get(tensor.name)
        if name is None or name not in self._moments.names:
            return None
        member = self._structure.members[tensor.name]
        place = self._places.get(member.layer)
        if place is None or len(parts := self._selection.parts(place, member.kind)) == member.parts:
            return None
        weight = read_kept(self._checkpoint, tensor)
        return refitted(weight, self._moments.of(name).both, member.places(parts)).to(weight.dtype)


def refitted(weight: Tensor, moments: Tensor, kept: Tensor) -> Tensor:
    """The columns `kept` of a weight `[rows, in]`, fitted by moments `[in, in]`; float64 `[rows, kept]`.

    Ridge regression towards the weights as they are.
    """
    columns, w = moments[:, kept].double(), weight.double()
    inner = columns[kept]
    damping = DAMPING * float(inner.diagonal().mean())
    if damping == 0:  # nothing flows there
        return w[:, kept]
    aim = w @ columns + damping * w[:, kept]
    solved: Tensor = torch.linalg.solve(inner + damping * torch.eye(len(kept), dtype=inner.dtype), aim.T).T
    return solved
