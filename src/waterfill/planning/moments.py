"""Second moments of what flows into each matrix, on calibration tokens: what calibrated rounding wants to know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from waterfill.files.architecture import Architecture, Matrix
from waterfill.files.model_calls import read


def module_of(architecture: Architecture, model: Any, matrix: Matrix) -> nn.Module | None:
    """The linear module that multiplies with a matrix; the head for a tied embedding; None for what is looked up."""
    if matrix.expert is not None:
        return None
    if matrix.role == "embedding":
        head = model.get_output_embeddings()
        return head if architecture.tied_head and isinstance(head, nn.Module) else None
    module = model.get_submodule(matrix.name)
    return module if isinstance(module, nn.Module) else None


@torch.no_grad()
def second_moments(model: Any, architecture: Architecture, tokens: Tensor) -> dict[str, Tensor]:
    """Mean square of each input, float32 [in], by matrix, on token ids [sequences, length]. llama.cpp's importance
    matrix."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2).to(torch.float32)
            sums[name] = sums.get(name, torch.zeros(x.shape[1])) + x.square().sum(0)
            counts[name] = counts.get(name, 0) + len(x)

        return hook

    handles = []
    for matrix in architecture.matrices:
        module = module_of(architecture, model, matrix)
        # llama.cpp measures no moments for token embeddings, and looks them up without
        if module is not None and matrix.role != "embedding":
            handles.append(module.register_forward_pre_hook(watch(matrix.name)))
    try:
        for sequence in tokens:
            read(model, sequence[None])
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / counts[name] for name, total in sums.items()}
