"""GGUF containers, byte by byte; what llama.cpp makes of them is tested in tests/evaluation/test_llamacpp.py."""

from __future__ import annotations

import io
import struct
from typing import Any

import pytest

from waterfill.base.errors import WaterfillError
from waterfill.files.gguf import ALIGNMENT, TENSOR_TYPES, Entry, read_gguf, write_gguf

METADATA: dict[str, Any] = {
    "text": "größer",
    "count": 7,
    "ratio": 0.5,
    "yes": True,
    "words": ["a", "bc"],
    "kinds": [1, -3],
}
TENSORS = [
    (Entry("first", (3, 5), TENSOR_TYPES["F16"]), 30, (b"x" * 10, b"y" * 20)),
    (Entry("second", (8,), TENSOR_TYPES["F32"]), 32, (b"z" * 32,)),
]


def written(metadata: dict[str, Any], tensors: Any) -> bytes:
    file = io.BytesIO()
    write_gguf(file, metadata, tensors)
    return file.getvalue()


def test_a_container_is_what_the_format_says() -> None:
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 1)
    header += struct.pack("<Q", 1) + b"n" + struct.pack("<II", 4, 2)  # uint32
    header += struct.pack("<Q", 1) + b"w" + struct.pack("<IQQIQ", 2, 5, 3, 1, 0)  # the fastest dimension first
    expected = header + bytes(-len(header) % 32) + b"x" * 30 + bytes(2)
    assert written({"n": 2}, [(Entry("w", (3, 5), 1), 30, (b"x" * 30,))]) == expected


def test_what_is_written_is_read() -> None:
    content = written(METADATA, TENSORS)
    assert read_gguf(content) == (METADATA, [entry for entry, *_ in TENSORS])
    assert len(content) % ALIGNMENT == 0
    assert content.endswith(b"x" * 10 + b"y" * 20 + bytes(2) + b"z" * 32)
    assert read_gguf(content[:-64]) == read_gguf(content), "data need not be there"


def test_other_bytes_than_were_said_are_refused() -> None:
    with pytest.raises(ValueError, match="tensor w has 3 bytes where 4 were said"):
        written({}, [(Entry("w", (1,), 0), 4, (b"abc",))])


def test_what_is_no_container_is_refused() -> None:
    with pytest.raises(WaterfillError, match="give a GGUF file of version 3"):
        read_gguf(b"GGUF" + bytes(20))
    with pytest.raises(WaterfillError, match="give a GGUF file of version 3"):
        read_gguf(b"")


@pytest.mark.parametrize("size", range(8, 230, 13))
def test_a_header_that_ends_early_is_refused(size: int) -> None:
    content = written(METADATA, TENSORS)
    assert len(content) - 64 > 230
    with pytest.raises(WaterfillError, match="a header that cannot be read"):
        read_gguf(content[:size])


def test_types_that_do_not_exist_are_refused() -> None:
    one = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"n"
    for value in (struct.pack("<I", 99), struct.pack("<IIQ", 9, 9, 1)):  # a list of lists is not read
        with pytest.raises(WaterfillError, match="a header that cannot be read"):
            read_gguf(one + value + bytes(16))
