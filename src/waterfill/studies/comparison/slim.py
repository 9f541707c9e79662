"""SliM-LLM (arXiv 2405.14917), as its code has it: groups of 128 columns get one bit more or less by salience.

    salience of each group ──► the i least salient N - 1 bits, the i most salient N + 1, the others N
                               i by the divergence of the softmax of outputs, rounded to nearest
    bits ──► GPTQ's loop, ranges of each row and group by a search that minimises |error|^2.4

No library of its own runs on a CPU, so the method is implemented here. Stored, and counted: codes at each group's bits,
fp16 scales, zero points of 4 bits (fp16 means of 1-bit groups), two bits per group for its bits.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from waterfill.files.architecture import Matrix
from waterfill.files.artifact import Buffer
from waterfill.studies.comparison.base import Candidate, Method, Put, StudiedModel
from waterfill.studies.comparison.columns import GROUP, Inputs, inverse_factor, round_columns, salience
from waterfill.studies.comparison.layerwise import round_layers
from waterfill.studies.comparison.stored import QuantisedMatrix, quantised

BITS = (2, 3)
SAMPLE = 1024  # tokens that divergences are measured on
NORM = 2.4  # of errors, in the search for ranges
RANGES = tuple(1 + step / 500 for step in range(-50, 51))  # times the range of a row and group


def run(bits: int, subject: StudiedModel, put: Put) -> Candidate:
    """All linear matrices at `bits` on average."""

    def solver(_: Matrix, module: nn.Linear) -> _Solver:
        return _Solver(module.in_features, bits)

    return round_layers(subject, put, solver)


class _Solver(Inputs):
    def __init__(self, width: int, bits: int) -> None:
        super().__init__(width, SAMPLE)
        self._bits = bits

    def solve(self, weight: Tensor) -> QuantisedMatrix:
        factor = inverse_factor(self.moments)
        bits = group_bits(weight, salience(weight, factor), self.some, self._bits)
        rounded = round_columns(weight, factor, partial(_start, bits), within=True)
        return quantised(rounded, _buffers(weight.shape[0], weight.shape[1], bits))


def group_bits(weight: Tensor, salient: Tensor, x: Tensor, bits: int) -> list[int]:
    """Bits of each group of columns, `bits` on average of whole groups: as many groups get one less as get one more."""
    groups = _groups(weight.shape[1])
    order = sorted(range(len(groups)), key=lambda g: float(salient[:, groups[g]].mean()))
    target = (x @ weight.T).log_softmax(1)
    best, least = [bits] * len(groups), float("inf")
    for moved in range(1, len(groups) // 2):
        trial = [bits] * len(groups)
        for g in order[:moved]:
            trial[g] = bits - 1
        for g in order[-moved:]:
            trial[g] = bits + 1
        nearest = torch.cat([to_nearest(weight[:, c], b) for c, b in zip(groups, trial, strict=True)], dim=1)
        outputs = (x @ nearest.T).log_softmax(1)
        divergence = float((outputs.exp() * (outputs - target)).sum(1).mean())  # of the rounded from the original
        if divergence < least:
            best, least = trial, divergence
    return best


def to_nearest(weight: Tensor, bits: int) -> Tensor:
    """Rows `[rows, columns]`, each in its range; of one bit, the mean and as much on either side of it."""
    if bits == 1:
        mean = weight.mean(1, keepdim=True)
        return mean + weight.abs().mean(1, keepdim=True) * _sign(weight - mean)
    return _rounded(weight, *_range(weight, bits), bits)


def _range(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Step and zero point, `[rows, 1]`; 0 lies in every range."""
    low, high = weight.amin(1, keepdim=True).clamp_max(0), weight.amax(1, keepdim=True).clamp_min(0)
    step = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(torch.float16).tiny)
    return step, (-low / step).round()


def _rounded(weight: Tensor, step: Tensor, zero: Tensor, bits: int) -> Tensor:
    return ((weight / step + zero).round().clamp(0, 2**bits - 1) - zero) * step


def _start(bits: list[int], now: Tensor, block: slice) -> _Step:
    return _Step(now, bits[block.start // GROUP])


class _Step:
    """How columns of one group are rounded: by what it was when its turn came."""

    def __init__(self, now: Tensor, bits: int) -> None:
        self._bits = bits
        if bits == 1:
            self._zero = now.mean(1).half().float()
            self._step = now.abs().mean(1).half().float()
            return
        step, zero = _range(now, bits)
        least = torch.full((len(now),), torch.inf)
        best = step.clone()
        for share in RANGES:
            trial = (step * share).half().float().clamp_min(torch.finfo(torch.float16).tiny)
            error = (now - _rounded(now, trial, zero, bits)).abs().pow(NORM).sum(1)
            better = error < least
            least, best[better] = torch.where(better, error, least), trial[better]
        self._step, self._zero = best[:, 0], zero[:, 0]

    def __call__(self, column: Tensor, k: int) -> Tensor:
        if self._bits == 1:
            return self._zero + self._step * _sign(column - self._zero)
        return _rounded(column, self._step, self._zero, self._bits)


def _sign(values: Tensor) -> Tensor:
    """Without a zero."""
    return torch.where(values >= 0, 1.0, -1.0)


def _groups(width: int) -> list[slice]:
    return [slice(first, min(first + GROUP, width)) for first in range(0, width, GROUP)]


def _buffers(rows: int, width: int, bits: list[int]) -> dict[str, Buffer]:
    columns = [group.stop - group.start for group in _groups(width)]
    codes = rows * sum(count * each for count, each in zip(columns, bits, strict=True))
    zeros = rows * sum(16 if each == 1 else 4 for each in bits)
    return {
        "codes": Buffer("codes", "U8", (-(-codes // 8),)),
        "scales": Buffer("scales", "F16", (rows, len(bits))),
        "zeros": Buffer("zeros", "U8", (-(-zeros // 8),)),
        "bits": Buffer("bits", "U8", (-(-2 * len(bits) // 8),)),
    }


METHODS = tuple(
    Method(
        name=f"slim-{bits}",
        title=f"SliM-LLM {bits} bits",
        family="SliM-LLM",
        run=partial(run, bits),
        package="waterfill",
        calibrated=True,
        options=f"group {GROUP}",
    )
    for bits in BITS
)
