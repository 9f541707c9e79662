"""The packed model on disk. `docs/format.md` is its specification; the modules follow it from the bottom up.

    format.py    the words: buffers, tensors, digests, strict JSON
    header.py    one shard's header: written, and checked by the one `validate`
    manifest.py  the two files that tie shards together: the Hugging Face index and `waterfill.json`
    layout.py    which tensor goes where: exact sizes before anything is written
    ledger.py    what an interrupted run has finished
    writer.py    layout + bytes → artifact directory, atomic and resumable
    reader.py    artifact directory → verified tensors
    levels.py    fewer bytes of each, of an artifact that was packed at several rates

Writing: `lay_out(specs)` → `ArtifactWriter(out, layout, identity)` → `write`, `complete` per tensor → `publish(files)`.
Reading: `open_artifact(path)` → `Artifact.tensors`, `Artifact.read(buffer)`.
"""

from __future__ import annotations

from waterfill.files.artifact.format import FORMAT_VERSION, RAW, Buffer, TensorSpec, digest, is_file_name
from waterfill.files.artifact.header import ShardMetadata, StoredBuffer, StoredTensor, read_shard_metadata
from waterfill.files.artifact.layout import SHARD_BYTES, Layout, ShardLayout, lay_out
from waterfill.files.artifact.levels import at_level, bits_of, level_at, levels_of, lowered, read_bytes_of
from waterfill.files.artifact.reader import Artifact, open_artifact, read_buffer, read_bytes
from waterfill.files.artifact.writer import ArtifactWriter, check_target

__all__ = [
    "FORMAT_VERSION",
    "RAW",
    "SHARD_BYTES",
    "Artifact",
    "ArtifactWriter",
    "Buffer",
    "Layout",
    "ShardLayout",
    "ShardMetadata",
    "StoredBuffer",
    "StoredTensor",
    "TensorSpec",
    "at_level",
    "bits_of",
    "check_target",
    "digest",
    "is_file_name",
    "lay_out",
    "level_at",
    "levels_of",
    "lowered",
    "open_artifact",
    "read_buffer",
    "read_bytes",
    "read_bytes_of",
    "read_shard_metadata",
]
