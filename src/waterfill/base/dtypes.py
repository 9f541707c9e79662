"""The one table of element types: their safetensors names, sizes, and what numpy and torch call them.

name in a file ──► ITEM_BYTES, NUMPY_DTYPES     at once
               ──► TORCH_DTYPES                 once something is looked up: torch is not imported before
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from waterfill.base.lazy import LazyMapping, torch


class _Element(NamedTuple):
    item_bytes: int
    numpy: str  # little-endian; of bfloat16, which numpy lacks, its bits
    torch: str
    weight: bool = False


_ELEMENTS = {
    "F32": _Element(4, "<f4", "float32", weight=True),
    "F16": _Element(2, "<f2", "float16", weight=True),
    "BF16": _Element(2, "<u2", "bfloat16", weight=True),
    "I64": _Element(8, "<i8", "int64"),
    "I32": _Element(4, "<i4", "int32"),
    "U8": _Element(1, "|u1", "uint8"),
    "BOOL": _Element(1, "|b1", "bool"),
}

ITEM_BYTES: Mapping[str, int] = MappingProxyType({name: element.item_bytes for name, element in _ELEMENTS.items()})
"""Bytes of an element, by its dtype's name: every dtype that a buffer may have, and an artifact can hold."""

WEIGHT_DTYPES = tuple(name for name, element in _ELEMENTS.items() if element.weight)
"""Names of those that a weight may have."""

NUMPY_DTYPES: Mapping[str, str] = MappingProxyType({name: element.numpy for name, element in _ELEMENTS.items()})
"""What numpy reads a buffer as. BF16 as its bits, "<u2"."""

TORCH_DTYPES: Mapping[str, torch.dtype] = LazyMapping(
    lambda: {name: getattr(torch, element.torch) for name, element in _ELEMENTS.items()}
)
"""What torch calls them."""
