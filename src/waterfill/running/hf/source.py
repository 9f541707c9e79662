"""What a packed module of a transformers model multiplies with: torch over a streamer, which knows nothing of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from waterfill.kernels import DTYPES
from waterfill.kernels.reference import TILE_WEIGHTS
from waterfill.running.streaming.chunks import StreamedMatrix
from waterfill.running.streaming.streamer import Streamer
from waterfill.running.streaming.view import View


@dataclass(frozen=True)
class StreamedSource:
    """A matrix, times 2^power, and who streams it."""

    streamer: Streamer
    matrix: StreamedMatrix
    power: int = 0

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T: `[..., in]` -> `[..., out]`, as `kernels.matmul`, gradients of the activations included.

        Raises:
            ArtifactError: a chunk is damaged.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            product: torch.Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
            return product
        return self.product(x)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """`multiply` where nobody asks for gradients."""
        rows, width = self.matrix.shape
        flat = x.reshape(-1, width)
        known = flat.dtype in DTYPES and not self.power  # a power may be what keeps y within its dtype
        flat = (flat if known else flat.to(torch.float32)).contiguous()
        y = torch.empty(len(flat), rows, dtype=flat.dtype)
        self.streamer.product(self.matrix, View.of_tensor(flat), View.of_tensor(y))
        return self._times(y).to(x.dtype).reshape(*x.shape[:-1], rows)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of W by number: int64 `[...]` -> float32 `[..., in]`."""
        rows = self.streamer.rows(self.matrix, ids.reshape(-1).to(torch.int64).numpy())
        return self._times(torch.from_numpy(rows)).reshape(*ids.shape, self.matrix.shape[1])

    def dense(self) -> torch.Tensor:
        """W itself, float32 `[out, in]`."""
        return self._times(torch.from_numpy(self.streamer.dense(self.matrix)))

    def scaled(self, power: int) -> StreamedSource:
        """Of 2^power W. The power is exact in a product's float32, so that chunks need not know of it."""
        return replace(self, power=self.power + power)

    def _times(self, y: torch.Tensor) -> torch.Tensor:
        return y.mul_(2.0**self.power) if self.power else y


class _Product(torch.autograd.Function):
    """The product with its gradient, for which rows are read and decoded once more, a tile at a time."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, source: StreamedSource) -> torch.Tensor:
        ctx.source = source
        return source.product(x.detach())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        count, width = ctx.source.matrix.shape
        flat = gradient.reshape(-1, count).to(torch.float32)
        total = flat.new_zeros(len(flat), width)
        step = max(1, TILE_WEIGHTS // width)
        for start in range(0, count, step):
            tile = ctx.source.rows(torch.arange(start, min(start + step, count)))
            total += flat[:, start : start + step] @ tile
        return total.to(gradient.dtype).reshape(*gradient.shape[:-1], width), None
