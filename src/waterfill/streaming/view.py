"""Numbers in memory as the library takes them, whoever owns the memory: numpy, torch, or a runner of its own."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from waterfill._lazy import torch
from waterfill.native import DTYPES, FLOAT32


class View(NamedTuple):
    """A matrix `[tokens, width]`, row after row, which products read or write."""

    address: int
    dtype: int  # native.FLOAT32, BFLOAT16 or FLOAT16
    tokens: int
    width: int
    owner: Any  # keeps the memory alive

    @classmethod
    def of_array(cls, array: npt.NDArray[np.float32]) -> View:
        """Of float32 `[tokens, width]`. ValueError unless it lies row after row."""
        tokens, width = array.shape
        if array.dtype != np.float32 or not array.flags.c_contiguous:
            raise ValueError(f"expected contiguous float32, got {array.dtype} with strides {array.strides}")
        return cls(array.ctypes.data, FLOAT32, tokens, width, array)

    @classmethod
    def of_tensor(cls, tensor: torch.Tensor) -> View:
        """Of float32, bfloat16 or float16 `[tokens, width]`. ValueError unless it lies row after row, on the CPU."""
        tokens, width = tensor.shape
        if tensor.dtype not in DTYPES or not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise ValueError(f"expected contiguous floats on the CPU, got {tensor.dtype} on {tensor.device}")
        return cls(tensor.data_ptr(), DTYPES[tensor.dtype], tokens, width, tensor)

    @property
    def item_bytes(self) -> int:
        return 4 if self.dtype == FLOAT32 else 2

    def tensor(self) -> torch.Tensor:
        """The same memory, for the torch reference."""
        return torch.from_numpy(self.owner) if isinstance(self.owner, np.ndarray) else self.owner

    def clear(self) -> None:
        """Write zeros."""
        ctypes.memset(self.address, 0, self.tokens * self.width * self.item_bytes)
