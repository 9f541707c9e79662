"""Where every buffer will lie and how large the artifact will be, before a weight is read (docs/format.md §3, §4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from waterfill.base.dtypes import ITEM_BYTES
from waterfill.base.errors import ArtifactError
from waterfill.files.artifact.format import (
    RAW,
    Buffer,
    FormatError,
    TensorSpec,
    check_tensor,
    guard_of,
    quote,
)
from waterfill.files.artifact.header import reserved_bytes
from waterfill.files.artifact.manifest import encode_index, shard_names

SHARD_BYTES = 4_000_000_000  # with its header below 4 GiB, which is what FAT32 and 32-bit offsets can hold
SHARD_TENSORS = 1 << 14  # half of what a reader accepts


@dataclass(frozen=True)
class ShardLayout:
    """One shard-to-be: `header_bytes` are the 8 bytes of length and the reserved header."""

    file: str
    tensors: tuple[TensorSpec, ...]
    header_bytes: int

    @cached_property
    def size_bytes(self) -> int:
        """Size of the whole file."""
        return self.header_bytes + sum(tensor.size_bytes for tensor in self.tensors)

    def places(self) -> Iterator[tuple[Buffer, int]]:
        """Each buffer in file order with its offset from the start of the file, in bytes."""
        offset = self.header_bytes
        for tensor in self.tensors:
            for buffer in tensor.buffers:
                yield buffer, offset
                offset += buffer.size_bytes


@dataclass(frozen=True)
class Layout:
    """All shards; `size_bytes` is what a byte budget counts: shards and index."""

    shards: tuple[ShardLayout, ...]
    size_bytes: int

    def index(self) -> bytes | None:
        """The index file's content; None for a single shard."""
        return _index(self.shards)


def lay_out(tensors: Sequence[TensorSpec], *, shard_bytes: int = SHARD_BYTES) -> Layout:
    """Place tensors given in execution order; pure, and exact to the byte.

    Raw tensors come first, wide elements before narrow ones; those of an odd number of bytes come last, where they
    misalign nothing. `shard_bytes` limits the buffers of one shard.

    Raises:
        ArtifactError: if a spec breaks a rule of the format; the sentence names the tensor or buffer.
    """
    try:
        entries = _check_all(tensors)
        groups = _cut(sorted(tensors, key=_place), shard_bytes)
        shards = tuple(
            ShardLayout(file, tuple(group), reserved_bytes(group))
            for file, group in zip(shard_names(len(groups)), groups, strict=True)
        )
        for shard in shards:
            _check_alignment(shard)
            _check_guard(shard, entries)
    except FormatError as fault:
        raise ArtifactError(
            f"These tensors cannot be laid out: {fault}; {fault.remedy or 'correct what describes it'}"
        ) from fault
    return Layout(shards, sum(shard.size_bytes for shard in shards) + len(_index(shards) or b""))


def _index(shards: Sequence[ShardLayout]) -> bytes | None:
    if len(shards) == 1:
        return None
    return encode_index((s.file, {b.name: b.size_bytes for b, _ in s.places()}) for s in shards)


def _check_all(tensors: Sequence[TensorSpec]) -> set[str]:
    """Names of all buffers, each of which is there once."""
    names: set[str] = set()
    entries: set[str] = set()
    for tensor in tensors:
        check_tensor(tensor)
        for name, seen in [(tensor.name, names), *((buffer.name, entries) for buffer in tensor.buffers)]:
            if name in seen:
                raise FormatError(f"{quote(name)} is given twice", "give every tensor and buffer its own name")
            seen.add(name)
    if not tensors:
        raise FormatError("there are none", "give at least one")
    return entries


def _place(tensor: TensorSpec) -> tuple[int, int]:
    """What decides where in the order a tensor comes; tensors that agree in it keep the order they are given in."""
    if tensor.codec != RAW:
        return 1, 0
    return (2, 0) if tensor.size_bytes % 2 else (0, -ITEM_BYTES[tensor.dtype])


def _cut(tensors: Sequence[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    groups: list[list[TensorSpec]] = []
    left_bytes = 0
    for tensor in tensors:
        if not groups or tensor.size_bytes > left_bytes or len(groups[-1]) == SHARD_TENSORS:
            groups.append([])
            left_bytes = shard_bytes
        groups[-1].append(tensor)
        left_bytes -= tensor.size_bytes
    return groups


def _check_guard(shard: ShardLayout, entries: set[str]) -> None:
    guard = guard_of(shard.tensors)
    if guard is not None and guard.name in entries:
        raise FormatError(f"{quote(guard.name)} is both coded and kept", "give every tensor and buffer its own name")


def _check_alignment(shard: ShardLayout) -> None:
    for buffer, offset in shard.places():
        if (offset - shard.header_bytes) % ITEM_BYTES[buffer.dtype]:
            raise FormatError(
                f"buffer {quote(buffer.name)} would not begin at a multiple of its element size", "pad the one before"
            )
