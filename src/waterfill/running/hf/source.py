"""What a packed module of a transformers model multiplies with: torch over a streamer, which knows nothing of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from waterfill.kernels import DTYPES
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
        """x W^T: `[..., in]` -> `[..., out]`, as `kernels.matmul`.

        Raises:
            ArtifactError: a chunk is damaged.
        """
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
