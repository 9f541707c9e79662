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
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from waterfill.base import native
from waterfill.base.errors import ArtifactError, WaterfillError
from waterfill.base.lazy import torch
from waterfill.codecs.contract import BufferLayout, Codec, Encoded, Encoder, Rates, Shape
from waterfill.codecs.entropy import MOST_LANES, DamagedError
from waterfill.codecs.feedback import Blocks, Feedback, interleaved
from waterfill.codecs.hadamard import groups
from waterfill.codecs.levels import Levels
from waterfill.codecs.parts import Parts
from waterfill.codecs.trellis import bitstream
from waterfill.codecs.trellis.code import CODES
from waterfill.codecs.trellis.curves import curve
from waterfill.codecs.trellis.encoding import MOST_RATE, Coding, StreamEncoder
from waterfill.codecs.trellis.sizes import side_bits_of, stream_bytes, streams
from waterfill.codecs.whole import encode_whole

STATES = 64  # unless a name says how many
RATE_DIGITS = 4
LEAST_RATE = 0.3
WIDE_RATE = 4.5  # above it levels take 16 bits when they are decoded


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
        bits = 8 * stream_bytes(shape, self.rate) - side_bits_of(shape)
        return max(bits / math.prod(shape), 0.01)

    def feedback(self, width: int) -> Blocks:
        return interleaved(width, MOST_LANES)  # one lane after the other

    def encoder(
        self, shape: Shape, *, exponent: int = 0, rho: float = 1.0, feedback: Feedback | None = None
    ) -> Encoder:
        coding = Coding(self.name, self.states, self.wide, self.core_rate(shape))
        errors = feedback if self.feedback(shape[1]) else None
        return StreamEncoder(shape, stream_bytes(shape, self.rate), coding, exponent, rho, errors)

    def encode(self, weight: torch.Tensor, *, exponent: int = 0, rho: float = 1.0) -> Encoded:
        return encode_whole(self, weight, exponent=exponent, rho=rho)

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


def _decode_reference(
    codec: Trellis,
    data: npt.NDArray[np.uint8],
    shape: Shape,
    codes: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.float16],
) -> None:
    count, width = streams(shape), shape[1]
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
