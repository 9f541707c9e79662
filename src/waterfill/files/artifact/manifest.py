"""The two small files that tie shards together (docs/format.md §2, §5): the Hugging Face index and `waterfill.json`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from waterfill.files.artifact.format import (
    FORMAT_VERSION,
    FormatError,
    check_file_name,
    compact_json,
    digest,
    is_digest,
    quote,
    strict_json,
)
from waterfill.files.artifact.header import ShardMetadata, check_version

MANIFEST = "waterfill.json"
INDEX = "model.safetensors.index.json"
ONLY_SHARD = "model.safetensors"
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")


def shard_names(count: int) -> tuple[str, ...]:
    """File names of an artifact's shards, in order."""
    if count == 1:
        return (ONLY_SHARD,)
    return tuple(f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1))


def encode_index(shards: Iterable[tuple[str, Mapping[str, int]]]) -> bytes:
    """The index for `shards`: pairs of file name and {buffer name: size in bytes}."""
    return (json.dumps(_index(shards), indent=2, sort_keys=True) + "\n").encode("ascii")


def _index(shards: Iterable[tuple[str, Mapping[str, int]]]) -> dict[str, Any]:
    pairs = [(buffer, file, size) for file, buffers in shards for buffer, size in buffers.items()]
    total = sum(size for _, _, size in pairs)
    return {"metadata": {"total_size": total}, "weight_map": {buffer: file for buffer, file, _ in pairs}}


def shards_of_index(index: Mapping[str, Any]) -> tuple[str, ...]:
    """File names of the shards that an index speaks of, in order, safe to open.

    Raises:
        FormatError: if it is no index, or names anything but `model-iiiii-of-nnnnn.safetensors` with i = 1 … n.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise FormatError("it maps no buffers to files")
    names = set(weight_map.values())
    for name in names:
        if not _SHARD.fullmatch(name):
            raise FormatError(f"it names the shard {quote(name)}, not model-iiiii-of-nnnnn.safetensors")
    if len(names) < 2 or names != set(shard_names(len(names))):
        raise FormatError(f"its shards are not numbered from 1 to {len(names)}")
    return tuple(sorted(names))


def check_index(index: Mapping[str, Any], shards: Iterable[ShardMetadata]) -> None:
    """Compare what the index says of every buffer with the shards' own headers.

    Raises:
        FormatError: it says anything else, or speaks of other buffers.
    """
    expected = _index(
        (shard.path.name, {buffer.name: buffer.size_bytes for buffer in shard.buffers}) for shard in shards
    )
    differing = dict(index["weight_map"].items() ^ expected["weight_map"].items())
    if differing:
        raise FormatError(f"it does not agree with the shards about buffer {quote(min(differing))}")
    if index != expected:
        raise FormatError("it has other fields or another total_size than the shards ask for")


def encode_manifest(files: Mapping[str, tuple[int, str]], shards: Mapping[str, tuple[int, str]]) -> bytes:
    """The manifest over `files` {name: (size_bytes, digest)} and `shards` {name: (size_bytes, header's digest)}."""
    body = {
        "files": {name: {"digest": value, "size_bytes": size} for name, (size, value) in files.items()},
        "format": "waterfill",
        "shards": {name: {"header": value, "size_bytes": size} for name, (size, value) in shards.items()},
        "version": FORMAT_VERSION,
    }
    sealed = {"digest": digest(compact_json(body, sort_keys=True)), **body}
    return compact_json(sealed, sort_keys=True) + b"\n"


def decode_manifest(content: bytes) -> tuple[dict[str, tuple[int, str]], dict[str, tuple[int, str]]]:
    """The inverse of `encode_manifest`.

    Raises:
        FormatError: unless `content` is, to the byte, what `encode_manifest` would have written.
    """
    manifest = strict_json(content)
    check_version(manifest.get("version"))
    files = _entries(manifest.get("files"), "digest")
    shards = _entries(manifest.get("shards"), "header")
    if encode_manifest(files, shards) != content:
        raise FormatError("its text does not match its own digest")
    return files, shards


def _entries(entries: Any, digest_field: str) -> dict[str, tuple[int, str]]:
    if not isinstance(entries, dict):
        raise FormatError("it lists no files")
    decoded = {}
    for name, entry in entries.items():
        check_file_name(name)
        size = entry.get("size_bytes") if isinstance(entry, dict) else None
        if type(size) is not int or size < 0 or not is_digest(entry.get(digest_field)):
            raise FormatError(f"its entry for {quote(name)} is malformed")
        decoded[name] = (size, entry[digest_field])
    return decoded
