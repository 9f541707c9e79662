"""Artifact directory → verified tensors (docs/format.md §6). Nothing is believed unchecked, nothing is executed."""

from __future__ import annotations

import os
from collections.abc import Container, Mapping
from copy import copy
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from waterfill.base.dtypes import ITEM_BYTES, TORCH_DTYPES
from waterfill.base.errors import ArtifactError
from waterfill.base.lazy import torch
from waterfill.base.reading import open_regular, read_small
from waterfill.files.artifact.format import (
    FormatError,
    digest,
    digest_region,
    quote,
    refusing,
    strict_json,
)
from waterfill.files.artifact.header import ShardMetadata, StoredBuffer, StoredTensor, read_shard_metadata
from waterfill.files.artifact.manifest import INDEX, MANIFEST, ONLY_SHARD, check_index, decode_manifest, shards_of_index


class Artifact:
    """An opened artifact: checked metadata in memory, buffers on disk until read. Several threads may read at a time.

    Attributes:
        path: the directory.
        tensors: every tensor by name, in file order: kept ones, then packed ones in execution order.
        files: the weight files (shards, and the index if there is one) with their sizes in bytes.
    """

    def __init__(self, path: Path, shards: tuple[ShardMetadata, ...], files: Mapping[str, int]) -> None:
        self.path = path
        self.files = files
        self._shards = shards
        self.tensors: Mapping[str, StoredTensor] = MappingProxyType(
            {t.name: t for shard in shards for t in shard.tensors}
        )
        self._buffers = {buffer.name: buffer for shard in shards for buffer in shard.buffers}
        self._verified: set[str] = set()

    @property
    def size_bytes(self) -> int:
        """Bytes of all weight files: what a byte budget counts."""
        return sum(self.files.values())

    def of(self, tensors: Mapping[str, StoredTensor]) -> Artifact:
        """The same files, of which these tensors are read, as they are described here."""
        other = copy(self)
        other.tensors = MappingProxyType(dict(tensors))
        return other

    def read(self, buffer_name: str) -> torch.Tensor:
        """One buffer as a tensor of its dtype and shape, in memory of its own; compared with its digest the first time.

        Raises:
            ArtifactError: if there is no such buffer, or its bytes are not what was packed.
        """
        buffer = self._buffers.get(buffer_name)
        if buffer is None:
            raise ArtifactError(f"{self.path} has no buffer {quote(buffer_name)}; see `tensors` for those it has")
        data = read_buffer(buffer, verify=buffer_name not in self._verified)
        self._verified.add(buffer_name)
        return data

    def verify_files(self) -> None:
        """Compare everything but the shards' buffers with the manifest.

        Raises:
            ArtifactError: something differs; says what.
        """
        _verify_files(self.path, self._shards)

    def stated(self) -> tuple[dict[str, tuple[int, str]], dict[str, tuple[int, str]]]:
        """What the manifest says: sizes and digests of files by name, and of shards the digests of their headers.

        Raises:
            ArtifactError: it is missing, damaged, or of other shards than these.
        """
        return _stated(self.path, self._shards)

    def verify(self, *, besides: Container[str] = ()) -> None:
        """Compare every buffer with its digest, forwards through the files and in constant memory.

        `besides` names tensors that are left out.

        Raises:
            ArtifactError: at the first buffer that differs.
        """
        for tensor in self.tensors.values():
            for buffer in tensor.buffers if tensor.name not in besides else ():
                with refusing(buffer.file), open_regular(buffer.file) as file:
                    _compare(buffer, digest_region(file, buffer.offset_bytes, buffer.size_bytes))
                self._verified.add(buffer.name)


def open_artifact(path: Path, *, verify: bool = True) -> Artifact:
    """Open a packed model; all headers are checked before anything else happens.

    With `verify`, every byte of every file is compared with the manifest or with a digest that it covers, which reads
    the whole artifact once. Without, the manifest is not needed and each buffer is compared when it is first read.

    Raises:
        ArtifactError: if a file is missing, torn, altered, hostile or of an unknown version.
    """
    path = Path(path)
    if not path.is_dir():
        raise ArtifactError(f"{path} is not a directory; give the directory that `waterfill pack` wrote")
    index = _read_index(path)
    with refusing(path / INDEX):
        names = (ONLY_SHARD,) if index is None else shards_of_index(index)
    shards = tuple(read_shard_metadata(path / name) for name in names)
    if index is not None:
        _check_unique(shards)
        with refusing(path / INDEX):
            check_index(index, shards)
    files = {shard.path.name: shard.size_bytes for shard in shards}
    if index is not None:
        files[INDEX] = (path / INDEX).stat().st_size
    artifact = Artifact(path, shards, MappingProxyType(files))
    if verify:
        artifact.verify_files()
        artifact.verify()
    return artifact


def read_buffer(buffer: StoredBuffer, *, verify: bool = True) -> torch.Tensor:
    """Read one stored buffer from its shard.

    Returns:
        A tensor of the buffer's dtype and shape in memory of its own.

    Raises:
        ArtifactError: as `read_bytes`.
    """
    data = read_bytes(buffer, verify=verify).view(f"i{ITEM_BYTES[buffer.dtype]}")
    return torch.from_numpy(data).view(TORCH_DTYPES[buffer.dtype]).reshape(buffer.shape)


def read_bytes(buffer: StoredBuffer, *, verify: bool = True) -> npt.NDArray[np.uint8]:
    """Read the bytes of one stored buffer from its shard, into memory of their own.

    Raises:
        ArtifactError: if the shard ends early or, with `verify`, the bytes do not match their digest.
    """
    data = np.empty(buffer.size_bytes, np.uint8)
    with refusing(buffer.file), buffer.file.open("rb", buffering=0) as file:
        file.seek(buffer.offset_bytes)
        rest = content = data.data
        while rest:
            count = file.readinto(rest)
            if not count:
                raise FormatError(f"it ends inside buffer {quote(buffer.name)}")
            rest = rest[count:]
        if verify:
            _compare(buffer, digest(content))
    return data


def _compare(buffer: StoredBuffer, digest: str) -> None:
    if digest != buffer.digest:
        raise FormatError(f"buffer {quote(buffer.name)} does not match its digest")


def _read_index(path: Path) -> dict[str, object] | None:
    if not (path / INDEX).exists():
        return None
    with refusing(path / INDEX):
        if (path / ONLY_SHARD).exists():
            raise FormatError(
                f"{ONLY_SHARD} lies beside it and programs disagree on which one counts", "remove the wrong one"
            )
        return strict_json(read_small(path / INDEX))


def _check_unique(shards: tuple[ShardMetadata, ...]) -> None:
    seen: dict[str, Path] = {}
    for shard in shards:
        for name in {tensor.name for tensor in shard.tensors} | {buffer.name for buffer in shard.buffers}:
            with refusing(shard.path):
                if name in seen:
                    raise FormatError(f"{quote(name)} is also in {seen[name].name}")
            seen[name] = shard.path


def _stated(
    path: Path, shards: tuple[ShardMetadata, ...]
) -> tuple[dict[str, tuple[int, str]], dict[str, tuple[int, str]]]:
    with refusing(path / MANIFEST):
        if not (path / MANIFEST).exists():
            raise FormatError("it is missing", "fetch it, or open without verification")
        files, stated = decode_manifest(read_small(path / MANIFEST))
        if stated != {shard.path.name: (shard.size_bytes, shard.digest) for shard in shards}:
            raise FormatError("it does not belong to these shards")
    return files, stated


def _verify_files(path: Path, shards: tuple[ShardMetadata, ...]) -> None:
    """Compare everything but the shards' buffers with the manifest."""
    files, _ = _stated(path, shards)
    for name, (size_bytes, expected) in files.items():
        with refusing(path / name), open_regular(path / name) as file:  # of another size it is not read at all
            if os.fstat(file.fileno()).st_size != size_bytes or digest_region(file, 0, size_bytes) != expected:
                raise FormatError(
                    f"its content is not what {MANIFEST} says",
                    "restore it, or seal the artifact again if you changed it (waterfill seal)",
                )
