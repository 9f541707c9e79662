"""Methods that round a model layer by layer: each layer on what the layers before it, rounded already, hand on.

    calibration tokens ──► inputs of a layer's matrices ──► each is rounded ──► the next layer

The head of a tied embedding is rounded as a head; an embedding that is only looked up stays as it is.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from waterfill.files.architecture import Matrix, parameters_of
from waterfill.files.artifact import Buffer
from waterfill.files.model_calls import read
from waterfill.planning.costs import matrix_view
from waterfill.planning.moments import module_of
from waterfill.studies.comparison.base import Candidate, Put, StudiedModel, Unavailable
from waterfill.studies.comparison.stored import QuantisedMatrix, as_it_is, file_bytes, kept_buffers


class Solver(Protocol):
    """Rounds one matrix, once it has seen what it is multiplied with."""

    def see(self, x: Tensor, output: Tensor) -> None:
        """Inputs `[..., in]` and outputs `[..., out]` of a part of the tokens."""

    def solve(self, weight: Tensor) -> QuantisedMatrix:
        """The matrix, float32 `[out, in]`, rounded."""


class _Enough(Exception):  # noqa: N818  # ends a forward pass whose rest is not needed
    pass


@torch.no_grad()
def round_layers(subject: StudiedModel, put: Put, solver: Callable[[Matrix, nn.Linear], Solver | None]) -> Candidate:
    """Every linear matrix that there is a solver for, in the model's order.

    Raises:
        Unavailable: there is none for any of them; or no calibration tokens.
    """
    tokens = subject.calibration_tokens()
    model = copy.deepcopy(subject.model)
    parameters = parameters_of(model)
    buffers: list[Buffer] = []
    payload, kept = 0, []
    for _, members in groupby(subject.architecture.matrices, key=_layer):
        matrices, solvers = list(members), {}
        for matrix in matrices:
            module = module_of(subject.architecture, model, matrix)
            if isinstance(module, nn.Linear) and (one := solver(matrix, module)) is not None:
                solvers[matrix.name] = module, one
        if solvers:
            _observe(model, tokens, solvers)
        for matrix in matrices:
            weight = matrix_view(parameters[matrix.parameter], matrix)
            if matrix.name not in solvers:
                result = as_it_is(weight, matrix)
                kept.append(matrix.name)
            else:
                result = solvers[matrix.name][1].solve(weight.to(torch.float32))
                weight.copy_(result.weight)
                put(matrix.name, result.weight)
            payload += result.size_bytes
            buffers += [Buffer(f"{matrix.name}.{key}", b.dtype, b.shape) for key, b in result.buffers.items()]
    if len(kept) == len(subject.architecture.matrices):
        raise Unavailable("it quantises linear layers only, and the model has none that it takes")
    weights = sum(math.prod(matrix.shape) for matrix in subject.architecture.matrices)
    return Candidate(
        size_bytes=file_bytes([*kept_buffers(subject.architecture), *buffers]),
        bits=8 * payload / weights,
        note=f"as they are: {', '.join(kept)}" if kept else "",
    )


def _layer(matrix: Matrix) -> str:
    """What matrices of one layer have in common: their name up to its first number."""
    parts = matrix.name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return matrix.name if at is None else ".".join(parts[: at + 1])


def _observe(model: Any, tokens: Tensor, watched: dict[str, tuple[nn.Linear, Solver]]) -> None:
    """Run the calibration tokens up to the last of the watched modules."""
    waiting: set[str] = set()

    def watch(name: str, solver: Solver) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            solver.see(inputs[0], output)
            waiting.discard(name)
            if not waiting:
                raise _Enough

        return hook

    handles = [module.register_forward_hook(watch(name, solver)) for name, (module, solver) in watched.items()]
    try:
        for sequence in tokens:
            waiting |= watched.keys()
            with contextlib.suppress(_Enough):
                read(model, sequence[None])
    finally:
        for handle in handles:
            handle.remove()
