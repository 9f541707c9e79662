"""GPTQ through gptqmodel's own algorithm, on the CPU, layer after layer on the calibration tokens."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from waterfill.files.architecture import Matrix
from waterfill.files.artifact import Buffer
from waterfill.studies.comparison.base import Candidate, Method, Put, StudiedModel
from waterfill.studies.comparison.layerwise import round_layers
from waterfill.studies.comparison.peers import library
from waterfill.studies.comparison.stored import QuantisedMatrix, quantised

GROUP = 128
BITS = (2, 3, 4, 8)


def run(bits: int, subject: StudiedModel, put: Put) -> Candidate:
    """All linear matrices at `bits`, groups of 128, scales and zero points per group."""
    package = library("gptqmodel.quantization.gptq", "gptqmodel")
    config = library("gptqmodel.quantization", "gptqmodel").QuantizeConfig

    def solver(_: Matrix, module: nn.Linear) -> _Solver | None:
        return _Solver(package, config, module, bits) if module.in_features % 8 == 0 else None

    return round_layers(subject, put, solver)


class _Solver:
    def __init__(self, package: Any, config: Any, module: nn.Linear, bits: int) -> None:
        self._bits, self._group = bits, GROUP if module.in_features % GROUP == 0 else -1
        settings = _quietly(config, bits=bits, group_size=self._group, desc_act=False, offload_to_disk=False)
        self._solver = _quietly(package.GPTQ, module, settings)
        self._solver.quantizer.configure(perchannel=True)

    def see(self, x: Tensor, output: Tensor) -> None:
        self._solver.add_batch(x, output)

    def solve(self, weight: Tensor) -> QuantisedMatrix:
        solved, *_ = _quietly(self._solver.quantize)
        rows, width = weight.shape
        return quantised(solved.float().view_as(weight), _buffers(rows, width, self._bits, self._group))


def _buffers(rows: int, width: int, bits: int, group: int) -> dict[str, Buffer]:
    """As a GPTQ checkpoint has them: packed codes and zero points, fp16 scales, the group of each column."""
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
