"""A matrix at several rates, of which a lower one is read by reading less: `nested-s256-r2.2000-3.0000-4.5000`.

    stored, of each stage: streams U8, as a trellis has them; gains F16 [streams], of the level that ends with it

    W' = gain * (stage 1 + … + stage k)        in the rotated basis, of level k

A name with fewer rates is that of a lower level, whose buffers are the first ones of the whole (`at`). Rates are of all
that a level reads. Two that are equal have one stage: a matrix may take the same at both.

Feedback makes noise stronger, and of another colour, for what products lose. The next stage has to code that noise and
does not know its colour: what feedback gained below is lost above. So below moments are damped more (`EARLY_NOISE`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from waterfill.base.errors import ArtifactError, WaterfillError
from waterfill.base.lazy import torch
from waterfill.codecs.contract import (
    BufferLayout,
    Codec,
    Encoded,
    Encoder,
    MemoryForm,
    Shape,
    Stages,
    get_codec,
)
from waterfill.codecs.decoded import rounded
from waterfill.codecs.entropy import MOST_LANES
from waterfill.codecs.feedback import Blocks, Feedback, interleaved
from waterfill.codecs.groups import per_weight
from waterfill.codecs.hadamard import groups, unrotate
from waterfill.codecs.nested.encoding import NestedEncoder, gains_key, streams_key
from waterfill.codecs.parts import Parts
from waterfill.codecs.trellis import bitstream
from waterfill.codecs.trellis.code import CODES
from waterfill.codecs.trellis.codec import LEAST_RATE, RATE_DIGITS, Trellis, trellis
from waterfill.codecs.trellis.curves import curve
from waterfill.codecs.trellis.encoding import MOST_RATE, Coding, StreamEncoder
from waterfill.codecs.trellis.sizes import least_bytes, side_bits_of, stream_bytes, streams
from waterfill.codecs.whole import encode_whole

STATES = 256  # every stage adds to the distance from the bound: as little as there is
MOST_LEVELS = 8
NARROW_RATE = 4.0  # up to which eight bits in memory add little to what is lost
ATTEMPTS = 3  # to fill a stage's bytes: what residuals are worth is known less well
EARLY_NOISE = 0.2  # that moments are damped for in stages that others follow


class Nested(Codec):
    """Codec `nested-s{states}-r{rate}-{rate}-…`."""

    def __init__(self, states: int, ladder: tuple[float, ...]) -> None:
        self.states, self.ladder, self.level_count = states, ladder, len(ladder)
        self.name = nested_name(ladder, states)

    def at(self, level: int) -> Nested:
        return nested(nested_name(self.ladder[:level], self.states))

    @cached_property
    def stages(self) -> Mapping[int, tuple[float, Trellis]]:
        """By level: the rate below it, and the trellis of what it adds; none where it adds nothing."""
        found, below = {}, 0.0
        for level, rate in enumerate(self.ladder, 1):
            if rate > below:
                found[level] = below, trellis(f"trellis-s{self.states}-r{rate - below:.{RATE_DIGITS}f}")
                below = rate
        return found

    @property
    def _last(self) -> int:
        return max(self.stages)

    def layout(self, shape: Shape) -> Mapping[str, BufferLayout]:
        layout = {}
        for stage in self.stages:
            layout[streams_key(stage)] = BufferLayout("U8", (self._stage_bytes(shape, stage),), 0)
            layout[gains_key(stage)] = BufferLayout("F16", (len(streams(shape)),), 0)
        return layout

    def _stage_bytes(self, shape: Shape, stage: int) -> int:
        """Of its streams: what its rate adds, less its gains, but for a stream's least size."""
        below, own = self.stages[stage]
        whole = stream_bytes(shape, below + own.rate) - (stream_bytes(shape, below) if below else 0)
        return max(whole - 2 * len(streams(shape)), least_bytes(shape))

    def _core_rate(self, shape: Shape, stage: int) -> float:
        """Bits per weight of a stage that are left for symbols, never less than 0.01."""
        bits = 8 * self._stage_bytes(shape, stage) - side_bits_of(shape)
        return max(bits / math.prod(shape), 0.01)

    def distortion(self, shape: Shape) -> float:
        return self.distortions(shape)[-1]

    def distortions(self, shape: Shape, noises: tuple[float, float] = (1.0, 1.0)) -> list[float]:
        """Of every level. A stage leaves of its targets what a trellis leaves of a Gaussian; with feedback these are
        what was left before, and its own errors.

        Args:
            noises: what feedback makes of the power of noise, in stages that others follow and in the last.
        """
        left, power, found = 1.0, 1.0, []
        for level in range(1, self.level_count + 1):
            if level in self.stages:
                noise = noises[level == self._last]
                share = curve(self.states).t2(self._core_rate(shape, level))
                own = (noise - 1) * share if level > 1 else 0.0  # beside weights they are small
                left, power = power * share / max(1 - own, 0.1), noise
                power *= left
            found.append(min(left, 1.0))
        return found

    def along(self, shape: Shape) -> float:
        return len(groups(shape[1])) / shape[1]  # the gain is that of a whole stream

    def feedback(self, width: int) -> Blocks:
        return interleaved(width, MOST_LANES)  # as of a trellis

    def encoder(
        self, shape: Shape, *, exponent: int = 0, rho: float = 1.0, feedback: Feedback | None = None
    ) -> Encoder:
        errors = feedback if self.feedback(shape[1]) else None
        stages = {}
        for stage, (_, own) in self.stages.items():
            noise = self.distortion(shape) if stage == self._last else EARLY_NOISE
            coding = Coding(self.name, self.states, own.wide, self._core_rate(shape, stage), noise, ATTEMPTS)
            stages[stage] = StreamEncoder(shape, self._stage_bytes(shape, stage), coding, exponent, 1.0, errors)
        return NestedEncoder(stages, bitstream.stream_rows(shape[1]), exponent, rho, errors)

    def encode(self, weight: torch.Tensor, *, exponent: int = 0, rho: float = 1.0) -> Encoded:
        return encode_whole(self, weight, exponent=exponent, rho=rho)

    def decode(self, encoded: Encoded) -> torch.Tensor:
        return unrotate(self.restored(encoded.buffers, encoded.shape) * 2.0**encoded.exponent)

    def restored(self, buffers: Mapping[str, torch.Tensor], shape: Shape) -> torch.Tensor:
        """The rows in the rotated basis, divided by 2^exponent, float32 `[rows, in]`.

        Raises:
            ArtifactError: they are damaged.
        """
        total, weights = torch.zeros(shape), math.prod(shape)
        for stage, (_, own) in self.stages.items():
            codes, scales = own.to_levels(buffers[streams_key(stage)], shape)
            numbers = codes.numpy()[: weights * own.levels.bits // 8].view("<u2" if own.wide else np.uint8)
            levels = torch.from_numpy(numbers.astype(np.float32)) - own.levels.n // 2
            total += levels.view(shape) * per_weight(scales.to(torch.float32), shape[1])
        gains = buffers[gains_key(self._last)].flatten().to(torch.float32)
        if not bool(gains.isfinite().all()):
            raise ArtifactError("a gain of a nested matrix is damaged; fetch the artifact again, or pack again")
        each = bitstream.stream_rows(shape[1])
        return total * gains.repeat_interleave(each)[: shape[0], None]

    # ------------------------------------------------------------------------------------------------- to be multiplied

    @property
    def memory(self) -> MemoryForm:
        return get_codec("levels-8" if self.ladder[-1] <= NARROW_RATE else "levels-16").memory

    def to_memory(self, buffers: Mapping[str, torch.Tensor], shape: Shape, exponent: int) -> Mapping[str, torch.Tensor]:
        scales, codes = rounded(self.restored(buffers, shape), self.memory.precision)
        if not bool(scales.isfinite().all()):
            raise ArtifactError("a scale of a nested matrix is infinite; fetch the artifact again, or pack again")
        return {"scales": scales, "codes": codes}

    def native_fields(self, width: int) -> Mapping[str, int]:
        return {"states": self.states, "wide": int(self.stages[self._last][1].wide)}

    def native_stages(self) -> Stages:
        below = {streams_key(stage): own.wide for stage, (_, own) in self.stages.items() if stage != self._last}
        return Stages(below, gains_key(self._last))

    def parts(self, shape: Shape, weights: int) -> Parts:
        """The streams of the last stage, as large as they were packed; those below it stay in memory."""
        return Parts(streams_key(self._last), bitstream.stream_rows(shape[1]), row_bytes=0)

    def rows(
        self, buffers: Mapping[str, npt.NDArray[np.uint8]], shape: Shape, first: int, last: int
    ) -> Mapping[str, npt.NDArray[np.uint8]]:
        parts = self.parts(shape, 0)
        start, stop = first // parts.rows, -(-last // parts.rows)
        some = {}
        for key, data in buffers.items():
            if key.startswith("gains"):
                some[key] = data[2 * start : 2 * stop]
            else:
                bounds = parts.bounds(shape[0], data[: parts.index_bytes(shape[0])].tobytes())
                ends = (bounds[start + 1 : stop + 1] - bounds[start]).astype(np.uint32)
                some[key] = parts.alone(ends, data[bounds[start] : bounds[stop]])
        return some


def nested_name(ladder: Sequence[float], states: int = STATES) -> str:
    """Of the codec with these rates."""
    return f"nested-s{states}-r" + "-".join(f"{rate:.{RATE_DIGITS}f}" for rate in ladder)


@lru_cache(maxsize=1 << 15)
def nested(name: str) -> Nested:
    """Codec from its name."""
    match = re.fullmatch(r"nested-s([1-9][0-9]*)-r([0-9]\.[0-9]{4}(?:-[0-9]\.[0-9]{4})*)", name)
    rates = tuple(map(float, match[2].split("-"))) if match else ()
    steps = [round(b - a, RATE_DIGITS) for a, b in zip((0.0, *rates), rates, strict=False)]
    if (
        match is None
        or int(match[1]) not in CODES
        or not 1 <= len(rates) <= MOST_LEVELS
        or rates[-1] > MOST_RATE
        or not steps[0]
        or any(step and step < LEAST_RATE for step in steps)
    ):
        raise WaterfillError(
            f"codec {name!r} is not a nested codec; expected a name like nested-s256-r2.0000-3.0000-4.5000, with "
            f"{', '.join(map(str, CODES))} states and up to {MOST_LEVELS} rates from {LEAST_RATE} to {MOST_RATE}, each "
            f"equal to the one before or larger by {LEAST_RATE} at least"
        )
    return Nested(int(match[1]), rates)
