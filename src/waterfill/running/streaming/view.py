"""What products read and write: numbers in memory, whoever owns it, and activations in the form that is multiplied."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from waterfill.base import native
from waterfill.base.lazy import torch
from waterfill.base.native import DTYPES, FLOAT32
from waterfill.codecs import MemoryForm
from waterfill.codecs.integers import native_table


class View(NamedTuple):
    """A matrix `[tokens, width]`, row after row, which products read or write."""

    address: int
    dtype: int  # native.FLOAT32, BFLOAT16 or FLOAT16
    tokens: int
    width: int
    owner: Any  # keeps the memory alive

    @classmethod
    def of_array(cls, array: npt.NDArray[np.float32]) -> View:
        """Of float32 `[tokens, width]`.

        Raises:
            ValueError: it does not lie row after row.
        """
        tokens, width = array.shape
        if array.dtype != np.float32 or not array.flags.c_contiguous:
            raise ValueError(f"expected contiguous float32, got {array.dtype} with strides {array.strides}")
        return cls(array.ctypes.data, FLOAT32, tokens, width, array)

    @classmethod
    def of_tensor(cls, tensor: torch.Tensor) -> View:
        """Of float32, bfloat16 or float16 `[tokens, width]`.

        Raises:
            ValueError: it does not lie row after row, on the CPU.
        """
        tokens, width = tensor.shape
        dtype = DTYPES.get(tensor.dtype)
        if dtype is None or not tensor.is_contiguous() or not tensor.is_cpu:
            raise ValueError(f"expected contiguous floats on the CPU, got {tensor.dtype} on {tensor.device}")
        return cls(tensor.data_ptr(), dtype, tokens, width, tensor)

    @property
    def item_bytes(self) -> int:
        return 4 if self.dtype == FLOAT32 else 2

    def tensor(self) -> torch.Tensor:
        """The same memory, for the torch reference."""
        return torch.from_numpy(self.owner) if isinstance(self.owner, np.ndarray) else self.owner


class Activations:
    """x `[tokens, in]`, rotated and rounded once for all matrices of one codec: products may share it.

    x may not change as long as it meets codecs that it has not met before. Use it in a `with` statement: it holds
    memory of the library's, and a destructor would swallow an interrupt that comes just then.
    """

    def __init__(self, x: View) -> None:
        self._handles: dict[int, int] = {}  # by the address of the codec's table
        self._library = native.library()
        self.view = x
        self.isa = None if native.float_activations() else native.isa()  # None: the torch reference multiplies

    def prepared(self, codec: MemoryForm) -> int | None:
        """In the form that a codec's table is multiplied with, for the library; None for the torch reference."""
        if self._library is None or self.isa is None:
            return None
        _, table = native_table(codec, self.isa)
        if table not in self._handles:
            x, isa = self.view, self._library.isas[self.isa]
            self._handles[table] = self._library.activations_new(
                isa, table, x.address, dtype=x.dtype, tokens=x.tokens, width=x.width
            )
        return self._handles[table]

    def __enter__(self) -> Activations:
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles and self._library is not None:
            self._library.activations_free(self._handles.popitem()[1])
