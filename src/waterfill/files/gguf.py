"""GGUF containers, read and written: the file format of llama.cpp, whatever model lies in it.

    "GGUF", version, counts │ metadata: key, type, value │ tensors: name, dimensions, type, offset │ data
                                                                        │                             ▲
                                                                        └─ each at a multiple of 32 ──┘

Numbers are little-endian. Dimensions lie in ggml's order, the one that runs fastest first; shapes here are numpy's.
What the bytes of a type mean is ggml's business (`ggml`). Needs nothing but Python.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

from waterfill.base.errors import WaterfillError

MAGIC, VERSION = b"GGUF", 3
ALIGNMENT = 32  # bytes, of the data and of every tensor in it
TENSOR_TYPES = {  # ggml_type
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12,
    "Q5_K": 13, "Q6_K": 14, "IQ2_XXS": 16, "IQ2_XS": 17, "IQ3_XXS": 18, "IQ4_NL": 20, "IQ3_S": 21, "IQ2_S": 22,
    "IQ4_XS": 23,
}  # fmt: skip
FILE_TYPES = {  # llama_ftype: what a whole model may be quantised to
    "Q4_0": 2, "Q8_0": 7, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15,
    "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "IQ4_NL": 25,
}  # fmt: skip
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


class Entry(NamedTuple):
    """What a container says of a tensor."""

    name: str
    shape: tuple[int, ...]
    type: int  # ggml's number, one of `TENSOR_TYPES` or one that is not known here


def write_gguf(
    file: BinaryIO, metadata: Mapping[str, Any], tensors: Sequence[tuple[Entry, int, Iterable[bytes]]]
) -> None:
    """Write a container: metadata, and of each tensor its entry, its bytes in all, and these bytes in parts.

    Metadata are strings, bools, integers (uint32), floats (float32), and lists of strings or of integers (int32).

    Raises:
        ValueError: a tensor has more or fewer bytes than it was said to have.
    """
    header, offset = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata))), 0
    for key, value in metadata.items():
        header += _string(key) + _typed(value)
    for (name, shape, number), size_bytes, _ in tensors:
        header += _string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        header += struct.pack("<IQ", number, offset)
        offset += size_bytes + _padding(size_bytes)
    file.write(header + bytes(_padding(len(header))))
    for (name, *_), size_bytes, parts in tensors:
        written = sum(file.write(part) for part in parts)
        if written != size_bytes:
            raise ValueError(f"tensor {name} has {written} bytes where {size_bytes} were said; give all of them")
        file.write(bytes(_padding(size_bytes)))


def read_gguf(content: bytes) -> tuple[dict[str, Any], list[Entry]]:
    """Metadata and tensors of a container, in its order; `content` need not reach beyond the header.

    Raises:
        WaterfillError: it is no container, of a version that is not known, or ends within its header.
    """
    magic, version = content[:4], int.from_bytes(content[4:8], "little")
    if magic != MAGIC or version != VERSION:
        raise WaterfillError(
            f"a file begins with {magic!r} and version {version}; give a GGUF file of version {VERSION}"
        )
    reader = _Reader(content, at=8)
    try:
        tensors, pairs = reader.number("Q"), reader.number("Q")
        metadata = {reader.string(): reader.value() for _ in range(pairs)}
        return metadata, [reader.entry() for _ in range(tensors)]
    except (struct.error, UnicodeDecodeError, KeyError) as error:
        raise WaterfillError(f"a GGUF file has a header that cannot be read ({error}); give the whole file") from error


class _Reader:
    """The header from some byte on."""

    def __init__(self, content: bytes, at: int) -> None:
        self._content, self._at = content, at

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(f"<{form}", self._content, self._at)
        self._at += struct.calcsize(f"<{form}")
        return value

    def string(self) -> str:
        size = self.number("Q")
        self._at += size
        if self._at > len(self._content):
            raise struct.error(f"a text of {size} bytes ends beyond it")
        return self._content[self._at - size : self._at].decode()

    def value(self) -> Any:
        number = self.number("I")
        if number != _ARRAY:
            return self._of_type(number)
        inner, count = self.number("I"), self.number("Q")
        return [self._of_type(inner) for _ in range(count)]

    def entry(self) -> Entry:
        name = self.string()
        shape = tuple(self.number("Q") for _ in range(self.number("I")))[::-1]
        number, _ = self.number("I"), self.number("Q")
        return Entry(name, shape, number)

    def _of_type(self, number: int) -> Any:
        return self.string() if number == _STRING else self.number(_NUMBERS[number])


def _string(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _typed(value: Any) -> bytes:
    """The number of a value's type, and the value."""
    if isinstance(value, list):
        texts = bool(value) and isinstance(value[0], str)
        entries = map(_string, value) if texts else (struct.pack("<i", entry) for entry in value)
        return struct.pack("<IIQ", _ARRAY, _STRING if texts else _I32, len(value)) + b"".join(entries)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    return struct.pack("<II", _U32, value) if isinstance(value, int) else struct.pack("<If", _F32, value)


def _padding(size_bytes: int) -> int:
    return -size_bytes % ALIGNMENT
