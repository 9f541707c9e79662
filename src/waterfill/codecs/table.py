"""Matrices that can be multiplied from their codes: scales per row and group, codes that index a table of points.

    stored: scales F16 [rows, groups], codes U8 [rows * row_bytes]

Every row begins on a byte and is independent of the others.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property

import numpy as np
import numpy.typing as npt

from waterfill.base.lazy import torch
from waterfill.codecs.contract import BufferLayout, Codec, Encoded, Shape
from waterfill.codecs.groups import per_weight
from waterfill.codecs.hadamard import groups, unrotate
from waterfill.codecs.indices import row_bytes, unpack


class TableCodec(Codec):
    """Vectors of `p` weights, each one of `n` points. `name` gives all of it."""

    p: int
    n: int

    @property
    @abstractmethod
    def array(self) -> npt.NDArray[np.float32]:
        """The points, `[n, p]`."""

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
        """Bytes of codes per row of `width` weights."""
        return row_bytes(-(-width // self.p), self.n)

    def decode(self, encoded: Encoded) -> torch.Tensor:
        codes, scales = encoded.buffers["codes"], encoded.buffers["scales"]
        return unrotate(self.decode_rotated(codes, scales, encoded.exponent, encoded.shape[1]))

    def decode_rotated(self, codes: torch.Tensor, scales: torch.Tensor, exponent: int, width: int) -> torch.Tensor:
        """Rows in the rotated basis, the form that multiplies rotated activations.

        Args:
            codes: uint8, `rows * row_bytes(width)` bytes, any shape (padding after them is ignored).
            scales: float16 `[rows, groups]`.

        Returns:
            float32 `[rows, width]`.
        """
        rows = scales.shape[0]
        per_row = self.row_bytes(width)
        packed = codes.flatten()[: rows * per_row].view(rows, per_row)
        indices = unpack(packed, -(-width // self.p), self.n)
        return self.vectors(indices, width) * per_weight(scales.to(torch.float32) * 2.0**exponent, width)

    def vectors(self, indices: torch.Tensor, width: int) -> torch.Tensor:
        """Coordinates of the points of int64 `[rows, vectors]` -> float32 `[rows, width]`."""
        return self.points[indices].flatten(1)[:, :width]
