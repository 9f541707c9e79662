"""What a packed module of a transformers model multiplies with: torch over a streamer, which knows nothing of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from waterfill.kernels import DTYPES
from waterfill.streaming.chunks import StreamedMatrix
from waterfill.streaming.streamer import Streamer
from waterfill.streaming.view import View


@dataclass(frozen=True)
class Source:
    """A matrix and who streams it."""

    streamer: Streamer
    matrix: StreamedMatrix

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T: `[..., in]` -> `[..., out]`, as `kernels.matmul`. Raises ArtifactError for a chunk that is damaged."""
        rows, width = self.matrix.shape
        flat = x.reshape(-1, width)
        flat = (flat if flat.dtype in DTYPES else flat.to(torch.float32)).contiguous()
        y = torch.empty(len(flat), rows, dtype=flat.dtype)
        self.streamer.product(self.matrix, View.of_tensor(flat), View.of_tensor(y))
        return y.to(x.dtype).reshape(*x.shape[:-1], rows)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of W by number: int64 `[...]` -> float32 `[..., in]`."""
        found = self.streamer.rows(self.matrix, ids.reshape(-1).to(torch.int64).numpy())
        return torch.from_numpy(found).reshape(*ids.shape, self.matrix.shape[1])

    def dense(self) -> torch.Tensor:
        """W itself, float32 `[out, in]`."""
        return torch.from_numpy(self.streamer.dense(self.matrix))
