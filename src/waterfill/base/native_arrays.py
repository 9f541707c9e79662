"""Arrays as the native library takes them: addresses, once type and size are what a function expects."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

U8, I8, I16, U16, U32, U64, I64, F32 = map(np.dtype, ("u1", "i1", "i2", "u2", "u4", "u8", "i8", "f4"))

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.uint16]  # the bits of float16


def groups_of(width: int) -> int:
    """Of a row: `hadamard.groups`."""
    return 1 if width < 1536 else (width + 512) // 1024


def at(array: npt.NDArray[Any], dtype: np.dtype[Any], least: int) -> int:
    """Address of an array of at least so many numbers of `dtype`."""
    if array.dtype != dtype or array.size < least or not array.flags.c_contiguous:
        raise ValueError(
            f"the native library was given {array.dtype} {array.shape} with strides {array.strides}; give it {dtype}, "
            f"{least} numbers or more, one behind the other"
        )
    return array.ctypes.data


def expect(name: str, status: int) -> None:
    """A status of 0.

    Raises:
        ValueError: another one.
    """
    if status:
        raise ValueError(f"wf_{name} refused its arguments (status {status})")


def expect_size(name: str, size: int) -> int:
    """A size that there can be.

    Raises:
        ValueError: there cannot.
    """
    if size < 0:
        raise ValueError(f"wf_{name} refused its arguments (status {size})")
    return int(size)
