"""Matrices that can be multiplied from their codes: scales per row and group, codes that index a table of points.

    stored: scales F16 [rows, groups], codes U8 [rows * row_bytes]

Every row begins on a byte and is independent of the others.

The scale that is stored is not the one used for finding codes. Codes are found at the group's RMS, for which tables are
made; the stored scale then carries the gain (`waterfill.planning.loss`), computed exactly for each group.

fp16 scales are kept in their best range by one power of two per tensor, `exponent`: |weight| <= 2^(exponent + 12).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property, partial

from waterfill.base.lazy import torch
from waterfill.base.native import Native
from waterfill.codecs.contract import BufferLayout, Codec, Encoded, Encoder, PointForm, RowEncoder, Shape
from waterfill.codecs.feedback import Feedback
from waterfill.codecs.groups import TINY, group_sizes, group_sums, per_weight
from waterfill.codecs.hadamard import groups, rotate, unrotate
from waterfill.codecs.indices import pack, radix_word, row_bytes, unpack
from waterfill.codecs.integers import integer_grid, new_point_table, register_table

HEADROOM_BITS = 12  # a group's RMS stays under 2^12, which leaves fp16 (65504) room for any sensible gain
MIN_MAGNITUDE_BITS = -100  # below 2^-100 weights may as well be zero, and 2^-exponent has to be a float32
MAX_SCALE = 65504.0  # of fp16
MIN_COSINE = 1e-2  # squared cosine under which a group's codes say nothing about it (all zeros): stored as zero


def scale_exponent(largest: float) -> int:
    """The power of two by which scales are divided, from the tensor's largest magnitude."""
    return max(math.frexp(largest)[1], MIN_MAGNITUDE_BITS) - HEADROOM_BITS if largest > 0 else 0


class ScaledCodec(Codec):
    """Codes of rows, and a scale for each of their groups. `name` gives all of it."""

    @abstractmethod
    def row_bytes(self, width: int) -> int:
        """Bytes of codes per row of `width` weights."""

    @abstractmethod
    def coded(
        self, rotated: torch.Tensor, deviations: torch.Tensor, feedback: Feedback | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and the RMS of each weight's group, both `[rows, width]` -> what their codes decode to where the RMS is
        1, in any unit, float32 `[rows, width]`, and the codes, uint8 `[rows, row_bytes]`."""

    def layout(self, shape: Shape) -> Mapping[str, BufferLayout]:
        rows, width = shape
        parts = len(groups(width))
        row = self.row_bytes(width)
        total = rows * row
        return {
            "scales": BufferLayout("F16", (rows, parts), 2 * parts),
            "codes": BufferLayout("U8", (total + total % 2,), row),  # even, so that fp16 buffers stay aligned
        }

    def encoder(
        self, shape: Shape, *, exponent: int = 0, rho: float = 1.0, feedback: Feedback | None = None
    ) -> Encoder:
        errors = feedback if self.feedback(shape[1]) else None
        encode = partial(self.encode, exponent=exponent, rho=rho, feedback=errors)
        return RowEncoder(encode, self.layout(shape), shape)

    def encode(
        self, weight: torch.Tensor, *, exponent: int = 0, rho: float = 1.0, feedback: Feedback | None = None
    ) -> Encoded:
        rows, width = weight.shape
        rotated = rotate(weight.to(torch.float32) * 2.0**-exponent)
        norms = group_sums(rotated.square())  # [rows, groups]
        rms = (norms / group_sizes(width, torch.float32)).sqrt()
        points, codes = self.coded(rotated, per_weight(rms, width), feedback)
        if feedback is None:
            scales = _scales(rotated, points, norms, rho)
        else:
            scales = _common_gains(rotated, points, rms, rho, feedback)
        error = rotated - points * per_weight(scales.to(torch.float32), width)
        unit_power = 4.0**exponent
        return Encoded(
            shape=(rows, width),
            buffers={"scales": scales, "codes": codes.flatten()},
            exponent=exponent,
            noise_power=float(error.double().square().sum()) * unit_power,
            power=float(norms.double().sum()) * unit_power,
        )


class TableCodec(ScaledCodec, PointForm):
    """Vectors of `p` weights, each one of `n` points."""

    @cached_property
    def points(self) -> torch.Tensor:
        """`array` as a tensor."""
        with torch.inference_mode(mode=False):  # as in `hadamard.signs`
            return torch.from_numpy(self.array)

    def row_bytes(self, width: int) -> int:
        return row_bytes(-(-width // self.p), self.n)

    def native_fields(self, width: int) -> Mapping[str, int]:
        word_indices, word_bytes = radix_word(self.n) or (0, 0)
        return {"word_indices": word_indices, "word_bytes": word_bytes, "row_bytes": self.row_bytes(width)}

    def coded(
        self, rotated: torch.Tensor, deviations: torch.Tensor, feedback: Feedback | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if feedback is None:
            indices = self.nearest(rotated / deviations.clamp_min(TINY))
        else:
            indices = self._fed_back(rotated, deviations, feedback)
        return self.vectors(indices, rotated.shape[1]), pack(indices, self.n)

    def _fed_back(self, rotated: torch.Tensor, deviations: torch.Tensor, feedback: Feedback) -> torch.Tensor:
        """Indices int64 `[rows, vectors]` of rows that are encoded block of columns after block."""
        width = rotated.shape[1]
        blocks, t2 = self.feedback(width), self.distortion((len(rotated), width))
        indices = torch.empty(len(rotated), -(-width // self.p), dtype=torch.int64)
        errors = torch.empty_like(rotated)
        for block, push in zip(blocks, feedback.pushes(blocks, t2), strict=True):
            wanted = rotated[:, block] + errors[:, : block.start] @ push
            some = self.nearest(wanted / deviations[:, block].clamp_min(TINY))
            first = block.start // self.p
            indices[:, first : first + some.shape[1]] = some
            errors[:, block] = rotated[:, block] - self.vectors(some, push.shape[1]) * deviations[:, block]
        return indices

    @abstractmethod
    def nearest(self, unit: torch.Tensor) -> torch.Tensor:
        """Index of the point nearest to each p-vector of `unit`, rows whose groups have an RMS of 1, `[rows, width]` ->
        int64 `[rows, vectors]`."""

    def decode(self, encoded: Encoded) -> torch.Tensor:
        codes, scales = encoded.buffers["codes"], encoded.buffers["scales"]
        return unrotate(self.decode_rotated(codes, scales, encoded.exponent, encoded.shape[1]))

    def decode_rotated(self, codes: torch.Tensor, scales: torch.Tensor, exponent: int, width: int) -> torch.Tensor:
        rows = scales.shape[0]
        per_row = self.row_bytes(width)
        packed = codes.flatten()[: rows * per_row].view(rows, per_row)
        indices = unpack(packed, -(-width // self.p), self.n)
        return self.vectors(indices, width) * per_weight(scales.to(torch.float32) * 2.0**exponent, width)

    def whole_numbers(self, codes: torch.Tensor, width: int) -> tuple[torch.Tensor, float]:
        found = integer_grid(self)
        indices = unpack(codes, -(-width // self.p), self.n)
        return torch.from_numpy(found.units)[indices].flatten(1)[:, :width], found.step

    def new_table(self, library: Native, isa: int) -> tuple[float, int]:
        return new_point_table(self, library, isa)

    def in_registers(self, isa: str = "") -> bool:
        return register_table(self, isa)

    def vectors(self, indices: torch.Tensor, width: int) -> torch.Tensor:
        """Coordinates of the points of int64 `[rows, vectors]` -> float32 `[rows, width]`."""
        return self.points[indices].flatten(1)[:, :width]


def _scales(rotated: torch.Tensor, points: torch.Tensor, norms: torch.Tensor, rho: float) -> torch.Tensor:
    """Stored scale of each group, fp16 `[rows, groups]`."""
    gains = _gains(norms, group_sums(rotated * points), group_sums(points.square()), rho)
    return gains.clamp_max(MAX_SCALE).to(torch.float16)


def _common_gains(
    rotated: torch.Tensor, points: torch.Tensor, rms: torch.Tensor, rho: float, feedback: Feedback
) -> torch.Tensor:
    """Stored scales `[rows, groups]` where errors were fed back: the groups of a row have made up for one another, so
    that what they are scaled with is common to them, and in the norm of the moments."""
    reached = points * per_weight(rms, rotated.shape[1])
    weighed = reached @ feedback.moments
    norms = ((rotated @ feedback.moments) * rotated).sum(1)
    gains = _gains(norms, (weighed * rotated).sum(1), (weighed * reached).sum(1), rho)
    return (gains[:, None] * rms).clamp_max(MAX_SCALE).to(torch.float16)


def _gains(norms: torch.Tensor, inner: torch.Tensor, power: torch.Tensor, rho: float) -> torch.Tensor:
    """u |w|^2 / <w, q> with u = 1 / (1 + rho tau), given |w|^2, <w, q> and |q|^2; 0 where q says nothing of w."""
    cosine2 = inner.square() / (norms * power).clamp_min(TINY)
    usable = cosine2 > MIN_COSINE
    tau = torch.where(usable, 1 / cosine2.clamp_min(MIN_COSINE) - 1, 0)
    return torch.where(usable, norms / torch.where(usable, inner, 1) / (1 + rho * tau), 0)
