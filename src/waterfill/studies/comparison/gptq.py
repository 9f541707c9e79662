"""GPTQ through gptqmodel's own algorithm, on the CPU, layer after layer on the calibration tokens.

Within a layer all matrices see what the layers before it, quantised already, hand on. The head of a tied embedding is
quantised as a head; an embedding that is only looked up stays as it is, as GPTQ leaves it.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from waterfill.files.architecture import Matrix, parameters_of
from waterfill.files.artifact import Buffer
from waterfill.files.model_calls import read
from waterfill.planning.costs import matrix_view
from waterfill.planning.moments import module_of
from waterfill.studies.comparison.base import Candidate, Method, Put, StudiedModel, Unavailable
from waterfill.studies.comparison.peers import library
from waterfill.studies.comparison.stored import as_it_is, file_bytes, kept_buffers, quantised

GROUP = 128
BITS = (2, 3, 4, 8)


class _Enough(Exception):  # noqa: N818  # ends a forward pass whose rest is not needed
    pass


@torch.no_grad()
def run(bits: int, subject: StudiedModel, put: Put) -> Candidate:
    """All linear matrices at `bits`, groups of 128, scales and zero points per group."""
    package = library("gptqmodel.quantization.gptq", "gptqmodel")
    config = library("gptqmodel.quantization", "gptqmodel").QuantizeConfig
    tokens = subject.calibration_tokens()
    model = copy.deepcopy(subject.model)
    parameters = parameters_of(model)
    buffers: list[Buffer] = []
    payload, kept = 0, []
    for _, members in groupby(subject.architecture.matrices, key=_layer):
        matrices = list(members)
        modules = {matrix.name: module_of(subject.architecture, model, matrix) for matrix in matrices}
        solvers = {
            name: _solver(package, config, module, bits)
            for name, module in modules.items()
            if isinstance(module, nn.Linear) and module.in_features % 8 == 0
        }
        if solvers:
            _observe(model, tokens, {name: (modules[name], solver) for name, solver in solvers.items()})
        for matrix in matrices:
            weight = matrix_view(parameters[matrix.parameter], matrix)
            if matrix.name not in solvers:
                result = as_it_is(weight, matrix)
                kept.append(matrix.name)
            else:
                group = GROUP if matrix.shape[1] % GROUP == 0 else -1
                solved, *_ = _quietly(solvers[matrix.name].quantize)
                result = quantised(solved.float().view_as(weight), _buffers(matrix, bits, group))
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


def _solver(package: Any, config: Any, module: nn.Linear, bits: int) -> Any:
    group = GROUP if module.in_features % GROUP == 0 else -1
    settings = _quietly(config, bits=bits, group_size=group, desc_act=False, offload_to_disk=False)
    solver = _quietly(package.GPTQ, module, settings)
    solver.quantizer.configure(perchannel=True)
    return solver


def _observe(model: Any, tokens: Tensor, watched: dict[str, tuple[Any, Any]]) -> None:
    """Run the calibration tokens up to the last of the watched modules."""
    waiting: set[str] = set()

    def watch(name: str, solver: Any) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            solver.add_batch(inputs[0], output)
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


def _buffers(matrix: Matrix, bits: int, group: int) -> dict[str, Buffer]:
    """As a GPTQ checkpoint has them: packed codes and zero points, fp16 scales, the group of each column."""
    rows, width = matrix.shape
    groups = width // group if group > 0 else 1
    return {
        "qweight": Buffer("qweight", "U8", (-(-rows * width * bits // 8),)),
        "qzeros": Buffer("qzeros", "U8", (-(-rows * groups * bits // 8),)),
        "scales": Buffer("scales", "F16", (rows, groups)),
        "g_idx": Buffer("g_idx", "I32", (width,)),
    }


def _quietly(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Without the library's tables and bars on standard output."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return function(*arguments, **options)


METHODS = tuple(
    Method(
        name=f"gptq-{bits}",
        title=f"GPTQ {bits} bits",
        family="GPTQ",
        run=partial(run, bits),
        package="gptqmodel",
        calibrated=True,
        options=f"group {GROUP}",
    )
    for bits in BITS
)
