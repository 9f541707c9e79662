"""Entropy-coded trellis quantisation, at any rate: `trellis-s64-r3.0000` has 64 states and 3 bits per weight, all told.

    weight [rows, in] --rotate--> --/ scale per (row, group)--> x --nearest path of levels--> symbols --rANS--> streams

    stored: streams U8: where each stream ends (4 bytes each), the streams (`bitstream.py`), zeros up to the size that
            was promised

The rate is a promise about bytes, and the step is what keeps it: every block of rows takes the step that the bytes left
over call for, the last stream the one that fits best. The least rate-distortion cost needs no rate in the search: with
a Gaussian's code lengths it is the nearest path to a target shortened by 1 - t2 (docs/design.md §4).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from waterfill.base import native
from waterfill.base.errors import ArtifactError, WaterfillError
from waterfill.base.lazy import torch
from waterfill.codecs.contract import BufferLayout, Codec, Encoded, Encoder, Parts, Piece, Rates, Shape
from waterfill.codecs.entropy import DamagedError, lanes_for
from waterfill.codecs.groups import group_sizes, group_sums, per_weight
from waterfill.codecs.hadamard import groups, rotate
from waterfill.codecs.levels import Levels
from waterfill.codecs.trellis import bitstream
from waterfill.codecs.trellis.code import CODES, search
from waterfill.codecs.trellis.curves import curve

STATES = 64  # unless a name says how many
RATE_DIGITS = 4
LEAST_RATE, MOST_RATE = 0.3, 9.0
WIDE_RATE = 4.5  # above it levels take 16 bits when they are decoded
MOST_NARROW = 5.0  # rate beyond which the levels of 8 bits no longer reach to the ends of a Gaussian
SCALE_STEPS = 8  # per octave; finer steps cost more than the rate that they save
TYPICAL_SCALE_BITS = 5
BLOCK_STREAMS = 4  # encoded with one step, side by side
FIT_ATTEMPTS = 10
SHAPES = 1 << 12  # of matrices, whose thousands of streams are counted once
FIT_SLACK = 1e-4  # of the bytes: near enough

Floats = npt.NDArray[np.float32]


class Trellis(Codec):
    """Codec `trellis-s{states}-r{rate}`."""

    def __init__(self, states: int, rate: float) -> None:
        self.states, self.rate = states, rate
        self.name = f"trellis-s{states}-r{rate:.{RATE_DIGITS}f}"
        self.wide = rate > WIDE_RATE
        self.levels = Levels(16 if self.wide else 8)
        self.rates = _rates(states)

    @property
    def memory(self) -> Levels:
        return self.levels

    def layout(self, shape: Shape) -> Mapping[str, BufferLayout]:
        return {"streams": BufferLayout("U8", (stream_bytes(shape, self.rate),), 0)}

    def distortion(self, shape: Shape) -> float:
        return curve(self.states).t2(self.core_rate(shape))

    def along(self, shape: Shape) -> float:
        return len(groups(shape[1])) / shape[1]  # the gain is that of a whole stream

    def core_rate(self, shape: Shape) -> float:
        """Bits per weight that are left for symbols when side information is taken off, never less than 0.01."""
        bits = 8 * stream_bytes(shape, self.rate) - _side_bits(shape)
        return max(bits / math.prod(shape), 0.01)

    def encoder(self, shape: Shape, *, exponent: int = 0, rho: float = 1.0) -> Encoder:
        return _Encoder(self, shape, exponent, rho)

    def encode(self, weight: torch.Tensor, *, exponent: int = 0, rho: float = 1.0) -> Encoded:
        shape = (weight.shape[0], weight.shape[1])
        encoder = self.encoder(shape, exponent=exponent, rho=rho)
        data = np.zeros(stream_bytes(shape, self.rate), np.uint8)
        for piece in chain(*map(encoder.add, weight.split(encoder.block_rows)), encoder.finish()):
            assert isinstance(piece.data, bytes)
            data[piece.offset_bytes : piece.offset_bytes + len(piece.data)] = np.frombuffer(piece.data, np.uint8)
        return Encoded(shape, {"streams": torch.from_numpy(data)}, exponent, encoder.noise_power, encoder.power)

    def decode(self, encoded: Encoded) -> torch.Tensor:
        codes, scales = self.to_levels(encoded.buffers["streams"], encoded.shape)
        return self.levels.decode(
            Encoded(encoded.shape, {"codes": codes, "scales": scales}, encoded.exponent, 0.0, 0.0)
        )

    def to_memory(self, buffers: Mapping[str, torch.Tensor], shape: Shape, exponent: int) -> Mapping[str, torch.Tensor]:
        codes, scales = self.to_levels(buffers["streams"], shape)
        return {"scales": scales, "codes": codes}

    def native_fields(self, width: int) -> Mapping[str, int]:
        return {"states": self.states, "wide": int(self.wide)}

    def parts(self, shape: Shape, weights: int) -> Parts:
        """The streams, as large as they were packed."""
        return Parts("streams", bitstream.stream_rows(shape[1]), row_bytes=0)

    def to_levels(self, streams: torch.Tensor, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode to buffers of `self.levels`: codes U8, scales F16 `[rows, groups]`.

        Raises:
            ArtifactError: a stream is damaged.
        """
        isa, data = native.isa(), streams.contiguous()
        layout = self.levels.layout(shape)
        codes = torch.empty(layout["codes"].shape, dtype=torch.uint8)
        codes[math.prod(shape) * self.levels.bits // 8 :] = 0  # alignment
        scales = torch.empty(layout["scales"].shape, dtype=torch.float16)
        if isa is None:
            _decode_reference(self, data.numpy(), shape, codes.numpy(), scales.numpy())
            return codes, scales
        library = native.library()
        assert library is not None
        damaged = library.trellis_decode(
            library.isas[isa],
            data.numpy(),
            states=self.states,
            wide=self.wide,
            shape=shape,
            codes=codes.numpy(),
            scales=scales.numpy().view(np.uint16),
        )
        if damaged is not None:
            raise _damaged(damaged)
        return codes, scales


def stream_bytes(shape: Shape, rate: float) -> int:
    """Bytes of the buffer: an even number, not above the rate but for a stream's least size."""
    return max(int(rate * math.prod(shape) / 16 + 1e-6) * 2, least_bytes(shape))


@lru_cache(maxsize=SHAPES)
def least_bytes(shape: Shape) -> int:
    """A size that surely suffices: side information and a hundredth of a bit per weight."""
    count = _streams(shape)
    bits = {rows: side_bits(rows, shape[1]) + 8 * 24 + 0.05 * rows * shape[1] for rows in set(count)}
    return 2 * math.ceil((sum(map(bits.__getitem__, count)) / 8 + 4 * len(count)) / 2)


@lru_cache(maxsize=SHAPES)
def _side_bits(shape: Shape) -> int:
    """Bits of a matrix that are not symbols, typically, and of its index."""
    count = _streams(shape)
    bits = {rows: side_bits(rows, shape[1]) for rows in set(count)}
    return sum(map(bits.__getitem__, count)) + 8 * 4 * len(count)


def side_bits(rows: int, width: int) -> int:
    """Bits of a stream that are not symbols, typically."""
    scales = TYPICAL_SCALE_BITS * rows * len(groups(width))
    return 8 * (bitstream.HEADER_BYTES + 4) + scales + 16 * lanes_for(rows * width)


def _streams(shape: Shape) -> list[int]:
    """Rows of each stream."""
    rows, each = shape[0], bitstream.stream_rows(shape[1])
    return [min(each, rows - first) for first in range(0, rows, each)]


class _Target(NamedTuple):
    """Rows of one stream, ready to be coded."""

    rotated: torch.Tensor  # float32 [rows, width]
    x: Floats  # normalised, padded to lanes
    scale_codes: npt.NDArray[np.int64]  # [rows, groups]
    scale_bits: int
    unit: float  # standard deviation that code 1 stands for

    @property
    def side_bytes(self) -> int:
        return bitstream.HEADER_BYTES + -(-self.scale_codes.size * self.scale_bits // 8)


class _Try(NamedTuple):
    nominal: float  # rate that the step was chosen for
    coded: bitstream.CodedLevels
    size_bytes: int


class _Encoder(Encoder):
    def __init__(self, codec: Trellis, shape: Shape, exponent: int, rho: float) -> None:
        self._codec, self._exponent, self._rho = codec, exponent, rho
        self._curve, self._width = curve(codec.states), shape[1]
        self._total = stream_bytes(shape, codec.rate)
        self._rows_left = shape[0]
        self._most = MOST_RATE if codec.wide else MOST_NARROW
        self._nominal = min(codec.core_rate(shape), self._most)
        self._ends: list[int] = []
        self._at = 4 * len(_streams(shape))
        self._started = False
        self.block_rows = BLOCK_STREAMS * bitstream.stream_rows(shape[1])

    def add(self, rows: torch.Tensor) -> Iterator[Piece]:
        rotated = rotate(rows.to(torch.float32) * 2.0**-self._exponent)
        targets = [_target(part) for part in rotated.split(bitstream.stream_rows(self._width))]
        last = len(rows) == self._rows_left
        closing = targets.pop() if last else None
        if targets:
            yield from self._block(targets)
        if closing is not None:
            yield from self._write(closing, self._fit(closing, self._total - self._at, FIT_SLACK))

    def _block(self, targets: list[_Target]) -> Iterator[Piece]:
        if not self._started:
            self._nominal = self._fit(targets[0], self._share(len(targets[0].rotated)), 20 * FIT_SLACK).nominal
            self._started = True
        with ThreadPoolExecutor(max(1, min(torch.get_num_threads(), len(targets)))) as pool:
            tries = list(pool.map(lambda target: self._try(target, self._nominal), targets))
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
        nominal, best = self._nominal, None
        low, high = 0.0, math.inf
        for _ in range(FIT_ATTEMPTS):
            one = self._try(target, nominal)
            unused_bytes = limit_bytes - one.size_bytes
            if unused_bytes >= 0:
                low = max(low, nominal)
                if best is None or one.size_bytes > best.size_bytes:
                    best = one
                if unused_bytes <= max(slack * limit_bytes, 2) or nominal >= self._most:
                    break
            else:
                high = min(high, nominal)
            following = nominal + 8 * (unused_bytes - slack * limit_bytes / 2) / target.rotated.numel()
            if not low < following < high:
                following = (low + high) / 2 if high < math.inf else following
            nominal = min(max(following, 0.0), self._most)
        while best is None:  # never for weights: a target of zeros costs next to nothing
            nominal = max(nominal - 0.5, -8.0)
            one = self._try(target, nominal)
            best = one if one.size_bytes <= limit_bytes or nominal <= -8.0 else None
        if best.size_bytes > limit_bytes:
            raise WaterfillError(
                f"{self._codec.name} leaves {limit_bytes:.0f} bytes for weights that take {best.size_bytes} at least; "
                "choose a higher rate"
            )
        return best

    def _try(self, target: _Target, nominal: float) -> _Try:
        """Code with the step of a rate; below 0, with ever shorter targets."""
        rate = max(nominal, 0.0)
        step, shrink = self._curve.step(rate), (1 - self._curve.t2(rate)) * 2.0 ** min(nominal, 0.0)
        least, most = bitstream.bounds(self._codec.states, self._codec.wide)
        lanes = lanes_for(len(target.x))
        levels = search(target.x * np.float32(shrink / step), self._codec.states, lanes, least, most)
        coded = bitstream.code(target.x, levels, self._codec.states, self._codec.wide, 4 * step)
        return _Try(nominal, coded, target.side_bytes + len(coded.tables) + len(coded.payload))

    def _write(self, target: _Target, one: _Try) -> Iterator[Piece]:
        rows, width = target.rotated.shape
        values = torch.from_numpy(one.coded.values[: rows * width].astype(np.float32)).view(rows, width)
        deviations = bitstream.scale_values(target.scale_codes, target.unit).astype(np.float32)
        unscaled = values * per_weight(torch.from_numpy(deviations), width)
        unit = float(np.float32(target.unit * _gain(target.rotated, unscaled, self._rho)))
        scales = bitstream.scale_values(target.scale_codes, unit).astype(np.float32)
        error = target.rotated - values * per_weight(torch.from_numpy(scales), width)
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


def _gain(rotated: torch.Tensor, values: torch.Tensor, rho: float) -> float:
    """What `values` are multiplied with: u |w|^2 / <w, q>, u = 1 / (1 + rho tau) (`planning.loss`), as one group."""
    norm, inner = float(rotated.double().square().sum()), float((rotated.double() * values).sum())
    power = float(values.double().square().sum())
    if inner <= 0 or norm * power <= 0:
        return 0.0
    tau = max(norm * power / inner**2 - 1, 0.0)
    return norm / inner / (1 + rho * tau)


def _decode_reference(
    codec: Trellis,
    data: npt.NDArray[np.uint8],
    shape: Shape,
    codes: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.float16],
) -> None:
    count, width = _streams(shape), shape[1]
    if len(data) < 4 * len(count):
        raise _damaged(0)
    ends = np.frombuffer(data, "<u4", len(count)).astype(np.int64)
    start, row = 4 * len(count), 0
    target = codes.view("<u2") if codec.wide else codes
    for i, (end, rows) in enumerate(zip(ends.tolist(), count, strict=True)):
        try:
            if not start <= end <= len(data):
                raise DamagedError("the index is damaged")
            levels, part = bitstream.read(data[start:end].tobytes(), rows, width, codec.states, codec.wide)
            if i == len(count) - 1 and data[end:].any():
                raise DamagedError("what follows the last stream is not zeros")
        except DamagedError as error:
            raise _damaged(i) from error
        target[row * width : (row + rows) * width] = (levels + codec.levels.n // 2).reshape(-1)
        scales[row : row + rows] = part
        start, row = end, row + rows


def _damaged(number: int) -> ArtifactError:
    return ArtifactError(
        f"stream {number} of an entropy-coded matrix is damaged; fetch the artifact again, or pack again"
    )


@lru_cache(maxsize=1 << 15)
def trellis(name: str) -> Trellis:
    """Codec from its name."""
    match = re.fullmatch(r"trellis-s([1-9][0-9]*)-r([0-9]\.[0-9]{4})", name)
    if match is None or int(match[1]) not in CODES or not LEAST_RATE <= float(match[2]) <= MOST_RATE:
        raise WaterfillError(
            f"codec {name!r} is not a trellis codec; expected a name like trellis-s64-r3.0000, with "
            f"{', '.join(map(str, CODES))} states and a rate from {LEAST_RATE} to {MOST_RATE}"
        )
    return Trellis(int(match[1]), float(match[2]))


def any_rate(name: str) -> Rates | None:
    """What "trellis" and "trellis-s8" stand for: every rate."""
    match = re.fullmatch(r"trellis(?:-s([0-9]+))?", name)
    return _rates(int(match[1] or STATES)) if match else None


def _rates(states: int) -> Rates:
    return Rates(f"trellis-s{states}-r{{:.{RATE_DIGITS}f}}", LEAST_RATE, MOST_RATE, 10.0**-RATE_DIGITS)
