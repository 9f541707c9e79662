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
from functools import cached_property

from waterfill.base.lazy import torch
from waterfill.codecs.contract import BufferLayout, Encoded, MemoryForm, Shape
from waterfill.codecs.groups import group_sizes, group_sums, per_weight
from waterfill.codecs.hadamard import groups, rotate, unrotate
from waterfill.codecs.indices import pack, radix_word, row_bytes, unpack

HEADROOM_BITS = 12  # a group's RMS stays under 2^12, which leaves fp16 (65504) room for any sensible gain
MIN_MAGNITUDE_BITS = -100  # below 2^-100 weights may as well be zero, and 2^-exponent has to be a float32
MAX_SCALE = 65504.0  # of fp16
MIN_COSINE = 1e-2  # squared cosine under which a group's codes say nothing about it (all zeros): stored as zero


def scale_exponent(largest: float) -> int:
    """The power of two by which scales are divided, from the tensor's largest magnitude."""
    return max(math.frexp(largest)[1], MIN_MAGNITUDE_BITS) - HEADROOM_BITS if largest > 0 else 0


class TableCodec(MemoryForm):
    """Vectors of `p` weights, each one of `n` points. `name` gives all of it."""

    @cached_property
    def points(self) -> torch.Tensor:
        """`array` as a tensor."""
        with torch.inference_mode(mode=False):  # as in `hadamard.signs`
            return torch.from_numpy(self.array)

    def layout(self, shape: Shape) -> Mapping[str, BufferLayout]:
        rows, width = shape
        parts = len(groups(width))
        row = self.row_bytes(width)
        total = rows * row
        return {
            "scales": BufferLayout("F16", (rows, parts), 2 * parts),
            "codes": BufferLayout("U8", (total + total % 2,), row),  # even, so that fp16 buffers stay aligned
        }

    def row_bytes(self, width: int) -> int:
        return row_bytes(-(-width // self.p), self.n)

    def native_fields(self, width: int) -> Mapping[str, int]:
        word_indices, word_bytes = radix_word(self.n) or (0, 0)
        return {"word_indices": word_indices, "word_bytes": word_bytes, "row_bytes": self.row_bytes(width)}

    def encode(self, weight: torch.Tensor, *, exponent: int = 0, rho: float = 1.0) -> Encoded:
        rows, width = weight.shape
        rotated = rotate(weight.to(torch.float32) * 2.0**-exponent)
        norms = group_sums(rotated.square())  # [rows, groups]
        rms = (norms / group_sizes(width, torch.float32)).sqrt()
        unit = rotated / per_weight(rms.clamp_min(torch.finfo(torch.float32).tiny), width)
        indices = self.nearest(unit)
        points = self.vectors(indices, width)
        scales = _scales(rotated, points, norms, rho)
        error = rotated - points * per_weight(scales.to(torch.float32), width)
        unit_power = 4.0**exponent
        return Encoded(
            shape=(rows, width),
            buffers={"scales": scales, "codes": pack(indices, self.n).flatten()},
            exponent=exponent,
            noise_power=float(error.double().square().sum()) * unit_power,
            power=float(norms.double().sum()) * unit_power,
        )

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

    def vectors(self, indices: torch.Tensor, width: int) -> torch.Tensor:
        """Coordinates of the points of int64 `[rows, vectors]` -> float32 `[rows, width]`."""
        return self.points[indices].flatten(1)[:, :width]


def _scales(rotated: torch.Tensor, points: torch.Tensor, norms: torch.Tensor, rho: float) -> torch.Tensor:
    """Stored scale of each group, fp16 `[rows, groups]`: u |w|^2 / <w, q> with u = 1 / (1 + rho tau)."""
    inner = group_sums(rotated * points)
    cosine2 = inner.square() / (norms * group_sums(points.square())).clamp_min(torch.finfo(torch.float32).tiny)
    usable = cosine2 > MIN_COSINE
    tau = torch.where(usable, 1 / cosine2.clamp_min(MIN_COSINE) - 1, 0)
    exact = norms / torch.where(usable, inner, 1)
    return torch.where(usable, exact / (1 + rho * tau), 0).clamp_max(MAX_SCALE).to(torch.float16)
