"""Encoding a matrix by the trellis code, stream by stream, within the bytes that were promised.

    rows ──rotate──► targets, one per stream ──step of a rate──► paths of levels ──► streams ──► too large? another step
                                      ▲                               │
                                      └─── error feedback, lane by lane of columns (`codecs.feedback`)

With feedback all streams of a block, or all steps that are tried for one stream, are searched together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from waterfill.base.errors import WaterfillError
from waterfill.base.lazy import torch
from waterfill.codecs.contract import Encoder, Piece, Shape
from waterfill.codecs.entropy import lanes_for
from waterfill.codecs.feedback import Feedback, interleaved, order_of
from waterfill.codecs.groups import TINY, group_sizes, group_sums, per_weight
from waterfill.codecs.hadamard import rotate
from waterfill.codecs.trellis import bitstream
from waterfill.codecs.trellis.code import Levels, search
from waterfill.codecs.trellis.curves import curve
from waterfill.codecs.trellis.sizes import streams

MOST_RATE = 9.0
MOST_NARROW = 5.0  # rate beyond which the levels of 8 bits no longer reach to the ends of a Gaussian
SCALE_STEPS = 8  # per octave; finer steps cost more than the rate that they save
BLOCK_STREAMS = 4  # encoded with one step, side by side
FED_BACK_STREAMS = 16  # with error feedback: one lane of each is searched at a time
FIT_ATTEMPTS = 10
FIT_SLACK = 1e-4  # of the bytes: near enough
FED_BACK_SLACK = 2e-4  # of a matrix's bytes: with error feedback it takes longer to come so near
FIRST_SLACK = 0.01  # of the first stream's, that says what rate to begin with
LADDER = (-1.5, -0.5, 0.5, 1.5)  # rates that are tried together with error feedback, in steps
LADDER_STEP, LADDER_FINER = 0.04, 20.0  # bits of the first steps; how much finer they get

Floats = npt.NDArray[np.float32]


class Coding(NamedTuple):
    """How streams are coded."""

    name: str  # of the codec
    states: int
    wide: bool
    rate: float  # bits per weight for symbols
    noise: float | None = None  # relative, that moments are damped for; None: its own
    attempts: int = FIT_ATTEMPTS  # to come near the bytes that were promised


@dataclass(frozen=True, eq=False)
class _Target:
    """Rows of one stream, ready to be coded."""

    rotated: torch.Tensor  # float32 [rows, width]
    x: Floats  # normalised, padded to lanes
    scale_codes: npt.NDArray[np.int64]  # [rows, groups]
    scale_bits: int
    unit: float  # standard deviation that code 1 stands for

    @property
    def side_bytes(self) -> int:
        return bitstream.HEADER_BYTES + -(-self.scale_codes.size * self.scale_bits // 8)

    @cached_property
    def deviations(self) -> torch.Tensor:
        """That the scale codes stand for, float32 `[rows, width]`: 0 of groups of zeros."""
        values = bitstream.scale_values(self.scale_codes, self.unit).astype(np.float32)
        return per_weight(torch.from_numpy(values), self.rotated.shape[1])


class _Try(NamedTuple):
    nominal: float  # rate that the step was chosen for
    coded: bitstream.CodedLevels
    size_bytes: int


class StreamEncoder(Encoder):
    """Encodes a matrix of this shape into `total_bytes`."""

    def __init__(
        self,
        shape: Shape,
        total_bytes: int,
        coding: Coding,
        exponent: int,
        rho: float,
        feedback: Feedback | None,
    ) -> None:
        self._coding, self._exponent, self._rho, self._feedback = coding, exponent, rho, feedback
        self._curve, self._width = curve(coding.states), shape[1]
        self._total = total_bytes
        self._rows_left = shape[0]
        self._most = MOST_RATE if coding.wide else MOST_NARROW
        self._nominal = min(coding.rate, self._most)
        self._ends: list[int] = []
        self._at = 4 * len(streams(shape))
        self._started = False
        self._restored: list[torch.Tensor] | None = None
        together = BLOCK_STREAMS if feedback is None else FED_BACK_STREAMS
        self.block_rows = together * bitstream.stream_rows(shape[1])

    def add(self, rows: torch.Tensor) -> Iterator[Piece]:
        yield from self._add(rotate(rows.to(torch.float32) * 2.0**-self._exponent))

    def restored(self, rotated: torch.Tensor) -> tuple[list[Piece], torch.Tensor]:
        """The next rows, in the rotated basis and divided by 2^exponent, and what the decoder makes of them there."""
        self._restored = []
        pieces = list(self._add(rotated))
        return pieces, torch.cat(self._restored)

    def _add(self, rotated: torch.Tensor) -> Iterator[Piece]:
        targets = [_target(part) for part in rotated.split(bitstream.stream_rows(self._width))]
        last = len(rotated) == self._rows_left
        closing = targets.pop() if last else None
        if targets:
            yield from self._block(targets)
        if closing is not None:
            limit_bytes = self._total - self._at
            slack = FIT_SLACK if self._feedback is None else FED_BACK_SLACK * self._total / max(limit_bytes, 1)
            yield from self._write(closing, self._fit(closing, limit_bytes, slack))

    def _block(self, targets: list[_Target]) -> Iterator[Piece]:
        if not self._started:
            slack = 20 * FIT_SLACK if self._feedback is None else FIRST_SLACK
            self._nominal = self._fit(targets[0], self._share(len(targets[0].rotated)), slack).nominal
            self._started = True
        tries = self._tries([(target, self._nominal) for target in targets])
        rows = sum(len(target.rotated) for target in targets)
        excess = sum(one.size_bytes for one in tries) - self._share(rows)
        for target, one in zip(targets, tries, strict=True):
            yield from self._write(target, one)
        # What went wrong is corrected over the rows that are left, and what made it go wrong from now on.
        drift = 8 * excess / (rows * self._width)
        left = max(self._rows_left * self._width, 1)
        self._nominal = min(max(self._nominal - drift - 8 * excess / left, 0.02), self._most)

    def _share(self, rows: int) -> float:
        """Bytes that the next so many rows may have."""
        return (self._total - self._at) * rows / self._rows_left

    def _fit(self, target: _Target, limit_bytes: float, slack: float) -> _Try:
        """The stream of the greatest rate within the limit, near enough."""
        nominal, best, step = self._nominal, None, LADDER_STEP
        low, high = 0.0, math.inf
        for _ in range(self._coding.attempts):
            tries = self._tries([(target, each) for each in self._ladder(nominal, step)])
            for one in tries:
                if one.size_bytes <= limit_bytes:
                    low = max(low, one.nominal)
                    if best is None or one.size_bytes > best.size_bytes:
                        best = one
                else:
                    high = min(high, one.nominal)
            if best is not None:
                unused_bytes = limit_bytes - best.size_bytes
                if unused_bytes <= max(slack * limit_bytes, 2) or best.nominal >= self._most:
                    break
            nearest = min(tries, key=lambda one: abs(limit_bytes - one.size_bytes))
            unused_bytes = limit_bytes - nearest.size_bytes
            following = nearest.nominal + 8 * (unused_bytes - slack * limit_bytes / 2) / target.rotated.numel()
            if not low < following < high:
                following = (low + high) / 2 if high < math.inf else following
            nominal, step = min(max(following, 0.0), self._most), step / LADDER_FINER
        while best is None:  # never for weights: a target of zeros costs next to nothing
            nominal = max(nominal - 0.5, -8.0)
            (one,) = self._tries([(target, nominal)])
            best = one if one.size_bytes <= limit_bytes or nominal <= -8.0 else None
        if best.size_bytes > limit_bytes:
            raise WaterfillError(
                f"{self._coding.name} leaves {limit_bytes:.0f} bytes for weights that take {best.size_bytes} at least; "
                "choose a higher rate"
            )
        return best

    def _ladder(self, nominal: float, step: float) -> list[float]:
        """Rates that are tried together: with feedback several cost little more than one."""
        if self._feedback is None:
            return [nominal]
        return sorted({min(max(nominal + step * each, 0.0), self._most) for each in LADDER})

    def _tries(self, wanted: Sequence[tuple[_Target, float]]) -> list[_Try]:
        """Code targets with the steps of these rates; below 0, with ever shorter targets."""
        states, wide = self._coding.states, self._coding.wide
        rates = [max(nominal, 0.0) for _, nominal in wanted]
        steps = [self._curve.step(rate) for rate in rates]
        shrinks = [
            (1 - self._curve.t2(rate)) * 2.0 ** min(nominal, 0.0)
            for rate, (_, nominal) in zip(rates, wanted, strict=True)
        ]
        targets = [target for target, _ in wanted]
        bounds = bitstream.bounds(states, wide)
        paths: Sequence[Levels | None] = [None] * len(wanted)
        if self._feedback is not None:
            noise = self._coding.noise
            noise = self._curve.t2(self._coding.rate) if noise is None else noise
            paths = _fed_back(targets, steps, shrinks, self._feedback, noise, states, bounds)

        def code(target: _Target, nominal: float, step: float, shrink: float, path: Levels | None) -> _Try:
            levels = path
            if levels is None:
                levels = search(target.x * np.float32(shrink / step), states, lanes_for(len(target.x)), *bounds)
            coded = bitstream.code(target.x, levels, states, wide, 4 * step, as_levels=path is not None)
            return _Try(nominal, coded, target.side_bytes + len(coded.tables) + len(coded.payload))

        with ThreadPoolExecutor(max(1, min(torch.get_num_threads(), len(wanted)))) as pool:
            return list(pool.map(code, targets, [nominal for _, nominal in wanted], steps, shrinks, paths))

    def _write(self, target: _Target, one: _Try) -> Iterator[Piece]:
        rows, width = target.rotated.shape
        values = torch.from_numpy(one.coded.values[: rows * width].astype(np.float32)).view(rows, width)
        gain = gain_of(target.rotated, values * target.deviations, self._rho, self._feedback)
        unit = float(np.float32(target.unit * gain))
        scales = bitstream.scale_values(target.scale_codes, unit).astype(np.float32)
        restored = values * per_weight(torch.from_numpy(scales), width)
        if self._restored is not None:
            self._restored.append(restored)
        error = target.rotated - restored
        unit_power = 4.0**self._exponent
        self.noise_power += float(error.double().square().sum()) * unit_power
        self.power += float(target.rotated.double().square().sum()) * unit_power
        data = bitstream.write(one.coded, unit, target.scale_codes, target.scale_bits)
        yield Piece("streams", self._at, data)
        self._at += len(data)
        self._ends.append(self._at)
        self._rows_left -= rows

    def finish(self) -> Iterator[Piece]:
        yield Piece("streams", 0, np.array(self._ends, "<u4").tobytes())
        yield Piece("streams", self._at, bytes(self._total - self._at))


def _target(rotated: torch.Tensor) -> _Target:
    """Normalise rows of one stream by scales of eighths of an octave."""
    rows, width = rotated.shape
    deviation = (group_sums(rotated.double().square()) / group_sizes(width, torch.float64)).sqrt().numpy()
    largest = float(deviation.max())
    used = deviation > largest * 2.0 ** (-(2**bitstream.MOST_SCALE_BITS - 3) / SCALE_STEPS)
    unit = float(np.float32(deviation[used].min())) if largest else 0.0
    codes = np.zeros(deviation.shape, np.int64)
    if largest:
        codes[used] = np.rint(SCALE_STEPS * np.log2(deviation[used] / unit)).astype(np.int64) + 1
    bits = 0 if (codes == 1).all() else int(codes.max()).bit_length()
    scale = np.where(codes > 0, unit * 2.0 ** ((codes - 1) / SCALE_STEPS), np.inf).astype(np.float32)
    x = np.zeros(bitstream.padded(rows * width), np.float32)
    x[: rows * width] = (rotated / per_weight(torch.from_numpy(scale), width)).reshape(-1).numpy()
    return _Target(rotated, x, codes, bits, unit)


def _fed_back(
    targets: Sequence[_Target],
    steps: Sequence[float],
    shrinks: Sequence[float],
    feedback: Feedback,
    t2: float,
    states: int,
    bounds: tuple[int, int],
) -> list[Levels]:
    """Paths of targets of as many rows each, `[rows * width]`: of all of them one lane of columns after the other.

    A lane's path goes through all rows before the next lane begins, so that its levels are known by then. `t2` is about
    how much noise they have.
    """
    rows, width = targets[0].rotated.shape
    count, blocks = len(targets), interleaved(width, lanes_for(rows * width))
    order, lanes = order_of(blocks, width), 1 << (count - 1).bit_length()
    weights = _side_by_side([target.rotated for target in targets], order, lanes)
    deviations = _side_by_side([target.deviations for target in targets], order, lanes)
    unit = deviations * _padded(steps, lanes)  # that a level is worth, of 1
    shortened = _padded(shrinks, lanes) / unit.clamp_min(TINY)
    errors, paths, end = torch.empty(width, rows, lanes), np.empty((width, rows, lanes), np.int16), 0
    for push in feedback.pushes(blocks, t2):
        size = push.shape[1]
        here = slice(end, end + size)
        wanted = torch.mm(push.T, errors.view(width, -1)[:end]).view(size, rows, lanes)
        wanted.add_(weights[here]).mul_(shortened[here])
        x = wanted.transpose(0, 1).reshape(-1)  # row after row
        levels = search(x.numpy(), states, lanes, *bounds).reshape(rows, size, lanes)
        paths[here] = levels.swapaxes(0, 1)
        torch.sub(weights[here], torch.from_numpy(paths[here]) * unit[here], out=errors[here])
        end += size
    place = order.argsort().numpy()
    return [path[:, place].reshape(-1) for path in paths.transpose(2, 1, 0)[:count]]


def _padded(numbers: Sequence[float], lanes: int) -> torch.Tensor:
    """One for each lane that is searched, float32 `[lanes]`."""
    return torch.tensor([*numbers, *[1.0] * (lanes - len(numbers))], dtype=torch.float32)


def _side_by_side(rows: Sequence[torch.Tensor], order: torch.Tensor, lanes: int) -> torch.Tensor:
    """Rows of targets with their columns in this order, `[width, rows, lanes]`; one for all if they are the same."""
    if all(some is rows[0] for some in rows):
        return rows[0].T[order][:, :, None]
    together = torch.zeros(len(order), len(rows[0]), lanes)
    together[:, :, : len(rows)] = torch.stack(list(rows), 2).transpose(0, 1)[order]
    return together


def gain_of(rotated: torch.Tensor, values: torch.Tensor, rho: float, feedback: Feedback | None) -> float:
    """What `values` are multiplied with: u |w|^2 / <w, q>, u = 1 / (1 + rho tau) (`planning.loss`), as one group; with
    feedback in the norm of its moments."""
    if feedback is None:
        norm, inner = float(rotated.double().square().sum()), float((rotated.double() * values).sum())
        power = float(values.double().square().sum())
    else:
        weighed = rotated @ feedback.moments
        norm, inner = (float(torch.dot(weighed.view(-1), other.reshape(-1))) for other in (rotated, values))
        power = float(torch.dot((values @ feedback.moments).view(-1), values.reshape(-1)))
    if inner <= 0 or norm * power <= 0:
        return 0.0
    tau = max(norm * power / inner**2 - 1, 0.0)
    return norm / inner / (1 + rho * tau)
