"""Matrices that can be multiplied from their codes: scales per row and group, codes that index a table of points.

    stored: scales F16 [rows, groups], codes U8 [rows * row_bytes]

Every row begins on a byte and is independent of the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from waterfill.base.lazy import torch
from waterfill.codecs.contract import BufferLayout, Encoded, MemoryForm, Shape
from waterfill.codecs.groups import per_weight
from waterfill.codecs.hadamard import groups, unrotate
from waterfill.codecs.indices import radix_word, row_bytes, unpack


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
