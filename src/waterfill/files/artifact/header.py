"""One shard's header (docs/format.md §3, §4): specs and completions → bytes, and bytes → checked metadata.

`reserved_bytes` says how long a header will be before its numbers are known, `encode_header` writes it, `validate` is
the only place that believes one.
"""

from __future__ import annotations

import os
import reprlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from waterfill.base.dtypes import ITEM_BYTES
from waterfill.base.reading import open_regular
from waterfill.files.artifact.claims import check_claims
from waterfill.files.artifact.format import (
    FORMAT_VERSION,
    MAX_DIMENSIONS,
    MAX_INTEGER,
    MAX_TENSORS,
    NO_DIGEST,
    Buffer,
    FormatError,
    TensorSpec,
    buffer_name,
    check_tensor,
    compact_json,
    digest,
    guard_of,
    is_digest,
    quote,
    refusing,
    strict_json,
)

MAX_HEADER_BYTES = 1 << 24
MAX_EXPONENT = 9999
T2_LIMIT = 1e6

LENGTH_BYTES = 8
_LENGTH = struct.Struct("<Q")
_PREFIX = rb'{"__metadata__":{"format":"pt","waterfill":"{\"digest\":\"'
_DIGEST_AT = LENGTH_BYTES + len(_PREFIX)
_DIGEST_END = _DIGEST_AT + len(NO_DIGEST)


@dataclass(frozen=True)
class Completion:
    """What is known of a tensor once its bytes are written; `digests` follow the tensor's keys."""

    exponent: int
    t2: float
    digests: tuple[str, ...]

    def __post_init__(self) -> None:
        """Refuse what no header can hold.

        Raises:
            FormatError: there is no room for the exponent or t2.
        """
        _integer(self.exponent, -MAX_EXPONENT, MAX_EXPONENT, "its exponent")
        if not 0 <= self.t2 < T2_LIMIT:
            raise FormatError(f"its t2 is {self.t2!r}, not a number from 0 to {T2_LIMIT:g}")


@dataclass(frozen=True)
class StoredBuffer(Buffer):
    """A buffer and where it lies: `offset_bytes` counts from the start of `file`."""

    file: Path
    offset_bytes: int
    digest: str


@dataclass(frozen=True)
class StoredTensor(TensorSpec):
    """A tensor as an artifact holds it: `exponent` and measured `t2` beside the spec, buffers with their places."""

    buffers: tuple[StoredBuffer, ...]
    exponent: int
    t2: float


@dataclass(frozen=True)
class ShardMetadata:
    """One shard: its size, the digest that its header carries, and its tensors in file order."""

    path: Path
    size_bytes: int
    digest: str
    tensors: tuple[StoredTensor, ...]

    @property
    def buffers(self) -> tuple[StoredBuffer, ...]:
        """All buffers in file order."""
        return tuple(buffer for tensor in self.tensors for buffer in tensor.buffers)

    @property
    def guard(self) -> str | None:
        """Name of the entry that other programs are to trip over, and this one passes by."""
        guard = guard_of(self.tensors)
        return None if guard is None else guard.name


# ---------------------------------------------------------------------------------------------------- writing


def reserved_bytes(tensors: Sequence[TensorSpec], *, guard: bool = True) -> int:
    """8 + N for a shard of these tensors, exact before anything is known of them but the specs (docs/format.md §4).

    Without `guard` it is their share of a header that has one for others' sake.

    Raises:
        FormatError: if the header would be longer than a reader accepts.
    """
    widest = {t.name: Completion(-MAX_EXPONENT, 1.234567e-100, (NO_DIGEST,) * len(t.buffers)) for t in tensors}
    length = -(-len(_header_json(tensors, widest, guard_of(tensors) if guard else None)) // 8) * 8
    if length > MAX_HEADER_BYTES:
        raise FormatError(f"its header would have {length} bytes, more than {MAX_HEADER_BYTES}", "use smaller shards")
    return LENGTH_BYTES + length


def encode_header(tensors: Sequence[TensorSpec], completions: Mapping[str, Completion], header_bytes: int) -> bytes:
    """The first `header_bytes` bytes of a shard: length, JSON, spaces; sealed with its own digest."""
    text = _header_json(tensors, completions, guard_of(tensors))
    head = _LENGTH.pack(header_bytes - LENGTH_BYTES) + text.ljust(header_bytes - LENGTH_BYTES, b" ")
    return head[:_DIGEST_AT] + _header_digest(head).encode() + head[_DIGEST_END:]


def _header_json(tensors: Sequence[TensorSpec], completions: Mapping[str, Completion], guard: Buffer | None) -> bytes:
    records: dict[str, object] = {}
    entries: dict[str, object] = {}
    offset = 0
    for tensor in tensors:
        done = completions[tensor.name]
        records[tensor.name] = {
            "codec": tensor.codec,
            "shape": tensor.shape,
            "dtype": tensor.dtype,
            "params": {"exponent": done.exponent, "t2": done.t2},
            "digests": dict(zip(tensor.keys, done.digests, strict=True)),
        }
        for buffer in tensor.buffers:
            end = offset + buffer.size_bytes
            entries[buffer.name] = {"dtype": buffer.dtype, "shape": buffer.shape, "data_offsets": (offset, end)}
            offset = end
    if guard is not None:
        entries[guard.name] = _guard_entry(guard, offset)
    described = compact_json({"digest": NO_DIGEST, "version": FORMAT_VERSION, "tensors": records}).decode()
    return compact_json({"__metadata__": {"format": "pt", "waterfill": described}, **entries})


def _guard_entry(guard: Buffer, end: int) -> dict[str, object]:
    return {"dtype": guard.dtype, "shape": list(guard.shape), "data_offsets": [end, end]}


def carried_digest(head: bytes) -> str:
    """The digest that a header carries; it stands for the whole shard, since the header holds the buffers' digests."""
    return head[_DIGEST_AT:_DIGEST_END].decode("ascii", "replace")


def _header_digest(head: bytes) -> str:
    return digest(head[:_DIGEST_AT] + NO_DIGEST.encode() + head[_DIGEST_END:])


# ---------------------------------------------------------------------------------------------------- reading


def read_shard_metadata(path: Path) -> ShardMetadata:
    """Read and check the header of one shard; no buffer is read.

    Raises:
        ArtifactError: if the file is missing, torn, altered or not a waterfill shard.
    """
    path = Path(path)
    with refusing(path), open_regular(path) as file:
        return validate(path, file, os.fstat(file.fileno()).st_size)


def validate(path: Path, file: BinaryIO, size_bytes: int) -> ShardMetadata:
    """Check everything that docs/format.md §6 asks of one shard's header, cheapest and most telling first.

    `file` is open at its start and has `size_bytes` bytes; `path` goes into the result.

    Raises:
        FormatError: the first rule that is broken.
    """
    head = _read_head(file, size_bytes)
    text = head[LENGTH_BYTES:].rstrip(b" ")
    if not text.endswith(b"}"):
        raise FormatError("its header is not padded with spaces")
    header = strict_json(text)
    described = _fields(header.pop("__metadata__"), ("format", "waterfill"), "its metadata")["waterfill"]
    metadata = strict_json(described.encode("utf-8", "surrogatepass"))  # the prefix has shown that it is a string
    check_version(metadata.get("version"))
    records = _fields(metadata, ("digest", "version", "tensors"), "its metadata")["tensors"]
    if metadata["digest"] != carried_digest(head):
        raise FormatError("its metadata has a digest of more than 16 digits")
    tensors = _tensors(path, header, records, len(head))
    end = tensors[-1].buffers[-1] if tensors else None
    if end is None or end.offset_bytes + end.size_bytes != size_bytes:
        raise FormatError(f"its buffers do not end where the file ends, at byte {size_bytes}")
    return ShardMetadata(path, size_bytes, carried_digest(head), tensors)


def check_version(version: object) -> None:
    """Refuse a format version that this program does not know.

    Raises:
        FormatError: it is another one.
    """
    if type(version) is not int or version != FORMAT_VERSION:
        fault = f"it has format version {reprlib.repr(version)} and this waterfill reads version {FORMAT_VERSION}"
        raise FormatError(fault, "upgrade waterfill, or pack again")


def _read_head(file: BinaryIO, size_bytes: int) -> bytes:
    """The 8 + N bytes, read only after N, the prefix and the file's size agree, and compared with their digest."""
    start = file.read(_DIGEST_END)
    if len(start) < _DIGEST_END:
        raise FormatError(f"it has only {size_bytes} bytes")
    length: int = _LENGTH.unpack_from(start)[0]
    if length % 8 or not _DIGEST_END - LENGTH_BYTES <= length <= min(MAX_HEADER_BYTES, size_bytes - LENGTH_BYTES):
        raise FormatError(f"its header claims {length} bytes of a file of {size_bytes}")
    if not start[LENGTH_BYTES:].startswith(_PREFIX):
        raise FormatError(
            "it does not begin as a waterfill shard does",
            "give a directory that `waterfill pack` wrote, or fetch it again",
        )
    head = start + file.read(LENGTH_BYTES + length - len(start))
    if len(head) != LENGTH_BYTES + length or _header_digest(head) != carried_digest(head):
        raise FormatError("its header does not match the header's digest")
    return head


def _tensors(path: Path, entries: dict[str, Any], records: Any, data_start: int) -> tuple[StoredTensor, ...]:
    """Records and entries, matched one to one in file order; offsets must leave no hole and no overlap."""
    if not isinstance(records, dict):
        raise FormatError("its metadata lists no tensors")
    if len(records) > MAX_TENSORS:
        raise FormatError(f"it holds {len(records)} tensors, more than {MAX_TENSORS}", "use smaller shards")
    names = iter(entries.items())
    offset = data_start
    tensors = []
    for name, record in records.items():
        what = f"tensor {quote(name)}"
        fields = _fields(record, ("codec", "shape", "dtype", "params", "digests"), what)
        digests = fields["digests"]
        if not isinstance(digests, dict) or not all(map(is_digest, digests.values())):
            raise FormatError(f"{what} has no digests")
        buffers = []
        for key, value in digests.items():
            entry_name, entry = next(names, ("nothing", None))
            if entry_name != buffer_name(name, key):
                raise FormatError(
                    f"buffer {quote(buffer_name(name, key))} is described where {quote(entry_name)} is stored"
                )
            buffers.append(_buffer(path, entry_name, entry, data_start, offset, value))
            offset += buffers[-1].size_bytes
        tensors.append(_tensor(name, fields, tuple(buffers)))
    guard = guard_of(tensors)
    for name, entry in names:  # shards that were written before there were guards have none
        if guard is None or (name, entry) != (guard.name, _guard_entry(guard, offset - data_start)):
            raise FormatError(f"buffer {quote(name)} is stored but not described")
    return tuple(tensors)


def _tensor(name: str, fields: dict[str, Any], buffers: tuple[StoredBuffer, ...]) -> StoredTensor:
    what = f"tensor {quote(name)}"
    codec, dtype = (_string(fields[field], what) for field in ("codec", "dtype"))
    shape = _shape(fields["shape"], what)
    params = _fields(fields["params"], ("exponent", "t2"), what)
    if type(params["t2"]) not in (int, float):
        raise FormatError(f"{what} has a t2 that is not a number")
    try:
        done = Completion(params["exponent"], params["t2"], ())
    except FormatError as fault:
        raise FormatError(f"{what}: {fault}") from None
    tensor = StoredTensor(name, codec, shape, dtype, buffers, done.exponent, float(done.t2))
    check_tensor(tensor)
    check_claims(tensor, done.exponent)
    return tensor


def _buffer(path: Path, name: str, entry: Any, data_start: int, offset: int, digest_: str) -> StoredBuffer:
    """One entry, which must begin at `offset`, where the entry before it ended (both from the start of the file)."""
    what = f"buffer {quote(name)}"
    fields = _fields(entry, ("dtype", "shape", "data_offsets"), what)
    dtype = _string(fields["dtype"], what)
    if dtype not in ITEM_BYTES:
        raise FormatError(f"{what} has dtype {quote(dtype)}, not one of {', '.join(ITEM_BYTES)}")
    buffer = StoredBuffer(name, dtype, _shape(fields["shape"], what), path, offset, digest_)
    span = fields["data_offsets"]
    begin = offset - data_start
    if not isinstance(span, list) or [type(value) for value in span] != [int, int]:
        raise FormatError(f"{what} has offsets that are not two integers")
    if span != [begin, begin + buffer.size_bytes]:
        raise FormatError(
            f"{what} has offsets {span} where its shape and place ask for {[begin, begin + buffer.size_bytes]}"
        )
    if begin % ITEM_BYTES[dtype]:
        raise FormatError(f"{what} begins at {begin}, which is not a multiple of its element size")
    return buffer


def _fields(value: Any, fields: tuple[str, ...], what: str) -> dict[str, Any]:
    if not isinstance(value, dict) or value.keys() != set(fields):
        raise FormatError(f"{what} does not have exactly the fields {', '.join(fields)}")
    return value


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise FormatError(f"{what} has a field that is not a string")
    return value


def _integer(value: Any, low: int, high: int, what: str) -> int:
    if type(value) is not int or not low <= value <= high:
        raise FormatError(f"{what} is {reprlib.repr(value)}, not an integer from {low} to {high}")
    return value


def _shape(value: Any, what: str) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > MAX_DIMENSIONS:
        raise FormatError(f"{what} has no shape of at most {MAX_DIMENSIONS} dimensions")
    return tuple(_integer(size, 0, MAX_INTEGER, f"a dimension of {what}") for size in value)
