"""Floating-point tensors bit by bit: exponents entropy-coded, what is as good as random left as it is.

    numbers --turned left by a bit--> planes of bytes: exponent first, sign last --> each coded (rANS), or as it is

Stored: one buffer, `streams` U8: the length of each stream (4 bytes each), the streams, a zero byte if the sum is odd.
A stream has 2^18 numbers, the last one fewer, and needs nothing but itself:

    1 byte      which planes are coded, the exponent's being bit 0
    planes      those that are not coded
    per plane   that is coded: length (4 bytes) of what follows, not for the last; table; rANS states and words
    table       first symbol, last symbol; a bit for each between them: whether it occurs; 12 bits for each that does

Lengths are numbers of their own and not offsets, which would not fit in 4 bytes: fused experts may exceed 4 GiB. All
decisions are made in integers, so that the size found when planning is the size that packing writes, on any machine.
`native/src/lossless.cpp` does the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from waterfill.base import native
from waterfill.base.dtypes import ITEM_BYTES, NUMPY_DTYPES
from waterfill.base.errors import ArtifactError
from waterfill.base.lazy import torch
from waterfill.codecs.entropy import PRECISION_BITS, DamagedError, lanes_for, rans
from waterfill.codecs.entropy.fields import pack_fields, unpack_fields
from waterfill.codecs.entropy.tables import TOTAL, Frequencies

LOSSLESS = "lossless"  # the codec's name in plans and artifacts
BUFFER = "streams"
STREAM_NUMBERS = 1 << 18
LENGTH_BYTES = 4
WORTH = 32  # a plane is coded if that saves more than a 32nd of it: else decoding it costs more than it gives
LOG_BITS = 16
BLOCK_STREAMS = 16  # coded side by side

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]


def encode_streams(numbers: Iterable[torch.Tensor]) -> Iterator[bytes]:
    """The streams of a tensor, given its numbers in order in flat parts of any length, all of one dtype."""
    out: Bytes | None = None
    library = None if native.isa() is None else native.library()
    for block in _regrouped(numbers, BLOCK_STREAMS * STREAM_NUMBERS):
        item_bytes = block.element_size()
        if library is None:
            for part in block.view(torch.uint8).split(STREAM_NUMBERS * item_bytes):
                yield encode_reference(part.numpy(), item_bytes)
            continue
        parts, capacity = streams_of(block.numel()), library.lossless_capacity(item_bytes)
        if out is None or len(out) < parts:
            out = np.empty((parts, capacity), np.uint8)
        sizes = np.empty(parts, np.int64)
        library.lossless_encode(block.view(torch.uint8).numpy(), out, sizes, item_bytes=item_bytes)
        for row, size in zip(out, sizes.tolist(), strict=False):
            yield row[:size].tobytes()


def buffer_bytes(lengths: Iterable[int]) -> int:
    """Bytes of the buffer that holds streams of these lengths."""
    total = sum(LENGTH_BYTES + length for length in lengths)
    return total + total % 2


def streams_of(count: int) -> int:
    """Streams of a tensor of so many numbers."""
    return -(-count // STREAM_NUMBERS)


def encode(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of one of WEIGHT_DTYPES -> the buffer, uint8."""
    streams = list(encode_streams([tensor.reshape(-1)]))
    buffer = torch.zeros(buffer_bytes(map(len, streams)), dtype=torch.uint8)
    data = np.array([len(stream) for stream in streams], "<u4").tobytes() + b"".join(streams)
    buffer.numpy()[: len(data)] = np.frombuffer(data, np.uint8)
    return buffer


def decode(buffer: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The tensor that `encode` was given, bit by bit.

    Raises:
        ArtifactError: the buffer is none of a tensor of that shape and dtype; no memory is taken before the lengths of
            the streams are right.
    """
    numbers = _decode(buffer.contiguous().numpy(), math.prod(shape), dtype.itemsize)
    return torch.from_numpy(numbers.view(f"i{dtype.itemsize}")).view(dtype).view(shape)


def decode_floats(buffer: Bytes, shape: tuple[int, ...], dtype: str) -> npt.NDArray[np.float32]:
    """The values of a tensor of `dtype`, F32, F16 or BF16, without torch.

    Raises:
        ArtifactError: as `decode` does.
    """
    return floats(_decode(buffer, math.prod(shape), ITEM_BYTES[dtype]), dtype).reshape(shape)


def floats(numbers: Bytes, dtype: str) -> npt.NDArray[np.float32]:
    """Numbers of `dtype`, F32, F16 or BF16, given as their bytes."""
    if dtype == "BF16":
        return (numbers.view(NUMPY_DTYPES[dtype]).astype(np.uint32) << 16).view(np.float32)
    return numbers.view(NUMPY_DTYPES[dtype]).astype(np.float32)


def _decode(data: Bytes, count: int, item_bytes: int) -> Bytes:
    """The numbers in a buffer, as their bytes."""
    sizes = _lengths(data, count, item_bytes)
    start = LENGTH_BYTES * len(sizes)
    out = np.empty(count * item_bytes, np.uint8)
    isa = native.isa()
    if isa is None:
        _decode_reference(data[start:], sizes, out, item_bytes)
    elif count:
        library = native.library()
        assert library is not None
        damaged = library.lossless_decode(library.isas[isa], data[start:], sizes, out, item_bytes=item_bytes)
        if damaged is not None:
            raise _damaged(f"stream {damaged}")
    return out


def _regrouped(parts: Iterable[torch.Tensor], size: int) -> Iterator[torch.Tensor]:
    """The same numbers in parts of `size`, the last one shorter."""
    held: list[torch.Tensor] = []
    count = 0
    for part in parts:
        for piece in part.split(size) if part.numel() else ():
            held.append(piece)
            count += piece.numel()
            if count >= size:
                whole = torch.cat(held) if len(held) > 1 else held[0].contiguous()
                yield whole[:size]
                held, count = [whole[size:]], count - size
    if count:
        yield torch.cat(held)  # contiguous, as any result of it


def _lengths(data: Bytes, count: int, item_bytes: int) -> npt.NDArray[np.uint32]:
    """Lengths of the streams, which leave nothing but a zero byte of padding, and of which none is too short."""
    parts = streams_of(count)
    if len(data) < LENGTH_BYTES * parts:
        raise _damaged("the index")
    sizes = np.frombuffer(data, "<u4", parts).astype(np.uint32)
    used = LENGTH_BYTES * parts + int(sizes.sum(dtype=np.int64))
    if used + used % 2 != len(data) or data[used:].any():
        raise _damaged("the index")
    for i, size in enumerate(sizes.tolist()):
        numbers = min(STREAM_NUMBERS, count - i * STREAM_NUMBERS)
        if size < 1 + item_bytes * min(numbers, 5 + 4 * lanes_for(numbers)):
            raise _damaged(f"stream {i}")
    return sizes


def _damaged(what: str) -> ArtifactError:
    return ArtifactError(f"{what} of a losslessly coded tensor is damaged; fetch the artifact again, or pack again")


# ------------------------------------------------------------------------------------------------------- the reference


class _Table(NamedTuple):
    frequencies: Frequencies
    data: bytes
    bits: int  # of the symbols that it was made for, in 2^-16 bits


@lru_cache(maxsize=1)
def _logs() -> Integers:
    """log2 of 0 (as 0) … 4096 in 16-bit fractions."""
    logs: Integers = np.floor(np.log2(np.maximum(np.arange(TOTAL + 1), 1)) * 2**LOG_BITS + 0.5).astype(np.int64)
    return logs


def encode_reference(numbers: Bytes, item_bytes: int) -> bytes:
    """One stream of numbers given as their bytes: what the native encoder must equal."""
    planes = _planes(numbers, item_bytes)
    count, lanes = planes.shape[1], lanes_for(planes.shape[1])
    tables = [_table(np.bincount(plane, minlength=256)) for plane in planes]
    coded = [
        p
        for p, table in enumerate(tables)
        if len(table.data) + 4 * lanes + (table.bits >> (LOG_BITS + 3)) + count // WORTH < count
    ]
    parts = [bytes([sum(1 << p for p in coded)])]
    parts += [planes[p].tobytes() for p in range(item_bytes) if p not in coded]
    for p in coded:
        frequencies = tables[p].frequencies
        symbols = np.full(-(-count // lanes) * lanes, frequencies.argmax(), np.uint8)
        symbols[:count] = planes[p]
        body = tables[p].data + rans.encode(symbols, lanes, frequencies)
        parts += [body] if p == coded[-1] else [len(body).to_bytes(4, "little"), body]
    return b"".join(parts)


def decode_reference(stream: bytes, item_bytes: int, count: int) -> Bytes:
    """One stream -> its numbers' bytes.

    Raises:
        DamagedError: it is no stream of so many numbers.
    """
    if not stream or stream[0] >> item_bytes:
        raise DamagedError("the head of a stream is damaged")
    coded = [p for p in range(item_bytes) if stream[0] >> p & 1]
    lanes, rest = lanes_for(count), memoryview(stream)[1:]
    planes = np.empty((item_bytes, count), np.uint8)
    for p in range(item_bytes):
        if p not in coded:
            if len(rest) < count:
                raise DamagedError("a stream ends early")
            planes[p], rest = np.frombuffer(rest, np.uint8, count), rest[count:]
    for p in coded:
        size = len(rest)
        if p != coded[-1]:
            size, rest = int.from_bytes(rest[:4], "little"), rest[4:]
            if size > len(rest):
                raise DamagedError("a stream ends early")
        frequencies, head = _read_table(rest[:size])
        padded = -(-count // lanes) * lanes
        planes[p] = rans.decode_reference(rest[head:size], lanes, frequencies, padded)[:count]
        rest = rest[size:]
    if len(rest):
        raise DamagedError("a stream is too long")
    return _numbers(planes)


def _decode_reference(data: Bytes, sizes: npt.NDArray[np.uint32], out: Bytes, item_bytes: int) -> None:
    each, at = STREAM_NUMBERS * item_bytes, 0
    for i, size in enumerate(sizes.tolist()):
        part = out[i * each : (i + 1) * each]
        try:
            part[:] = decode_reference(data[at : at + size].tobytes(), item_bytes, len(part) // item_bytes)
        except DamagedError as error:
            raise _damaged(f"stream {i}") from error
        at += size


def _planes(numbers: Bytes, item_bytes: int) -> Bytes:
    bits = 8 * item_bytes
    values = numbers.view(f"<u{item_bytes}").astype(np.uint64)
    turned = (values << np.uint64(1) | values >> np.uint64(bits - 1)).astype(f">u{item_bytes}")
    return np.ascontiguousarray(turned.view(np.uint8).reshape(-1, item_bytes).T)


def _numbers(planes: Bytes) -> Bytes:
    item_bytes = len(planes)
    turned = np.ascontiguousarray(planes.T).view(f">u{item_bytes}").reshape(-1).astype(np.uint64)
    values = turned >> np.uint64(1) | turned << np.uint64(8 * item_bytes - 1)
    return values.astype(f"<u{item_bytes}").view(np.uint8)


def _table(counts: npt.NDArray[Any]) -> _Table:
    """Frequencies that sum to 4096, rounded down and then changed one by one where it helps most, or harms least."""
    logs, used = _logs(), counts > 0
    freq = np.where(used, np.maximum(1, counts * TOTAL // counts.sum()), 0)
    while (missing := TOTAL - int(freq.sum())) > 0:
        freq[np.where(used, counts * (logs[np.minimum(freq + 1, TOTAL)] - logs[freq]), -1).argmax()] += 1
    for _ in range(-missing):
        loss = counts * (logs[freq] - logs[np.maximum(freq - 1, 0)])
        freq[np.where(freq > 1, loss, np.iinfo(np.int64).max).argmin()] -= 1
    symbols = np.flatnonzero(freq)
    first, last = int(symbols[0]), int(symbols[-1])
    occurs = np.packbits(used[first : last + 1], bitorder="little").tobytes()
    fields = pack_fields(freq[symbols] & (TOTAL - 1), PRECISION_BITS)
    bits = int((counts * ((PRECISION_BITS << LOG_BITS) - logs[freq])).sum())
    return _Table(freq.astype(np.uint16), bytes([first, last]) + occurs + fields, bits)


def _read_table(data: memoryview) -> tuple[Frequencies, int]:
    """Frequencies, and how many bytes they took."""
    if len(data) < 2 or data[0] > data[1]:
        raise DamagedError("a table is damaged")
    first, count = data[0], data[1] - data[0] + 1
    end = 2 + (count + 7) // 8
    if len(data) < end:
        raise DamagedError("a table is damaged")
    occurs = np.unpackbits(np.frombuffer(data[2:end], np.uint8), bitorder="little")
    symbols = np.flatnonzero(occurs)
    size = end + (PRECISION_BITS * len(symbols) + 7) // 8
    if not occurs[0] or not occurs[count - 1] or occurs[count:].any() or len(data) < size:
        raise DamagedError("a table is damaged")
    if len(symbols) % 2 and data[size - 1] >> 4:
        raise DamagedError("a table is damaged")
    frequencies = np.zeros(256, np.uint16)
    fields = unpack_fields(data[end:size], len(symbols), PRECISION_BITS)
    frequencies[first + symbols] = np.where(fields == 0, TOTAL, fields)
    return frequencies, size
