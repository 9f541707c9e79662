"""Artifacts taken apart and put together again: tensors, small files, and seals that make all other checks pass."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from tests.attacks.shards import header, metadata_text, seal
from waterfill.files.artifact.manifest import INDEX, MANIFEST, ONLY_SHARD, encode_manifest

Json = dict[str, Any]


@dataclass
class Tensor:
    """A record, and its buffers by key: dtype, shape, bytes."""

    record: Json
    buffers: dict[str, tuple[str, list[int], bytes]]


@dataclass
class Draft:
    """An artifact in parts. `late` changes what the headers say after they are made, file by file, before the seal."""

    shards: dict[str, dict[str, Tensor]]
    files: dict[str, bytes]
    special: dict[str, str] = field(default_factory=dict)
    late: list[Callable[[Json, Json], object]] = field(default_factory=list)
    cut: list[tuple[float, Callable[[bytes], bytes]]] = field(default_factory=list)  # of which file, and how: unsealed
    guarded: bool = True

    def tensors(self) -> list[tuple[dict[str, Tensor], str]]:
        """(the shard, the name in it) of each."""
        return [(shard, name) for shard in self.shards.values() for name in shard]


def read(path: Path) -> Draft:
    """A sound artifact."""
    shards: dict[str, dict[str, Tensor]] = {}
    for file in sorted(path.glob("*.safetensors")):
        content = file.read_bytes()
        (length,) = struct.unpack_from("<Q", content)
        entries, data = json.loads(content[8 : 8 + length]), content[8 + length :]
        shards[file.name] = {}
        for name, record in json.loads(entries["__metadata__"]["waterfill"])["tensors"].items():
            buffers = {}
            for key in record["digests"]:
                entry = entries[f"{name}.{key}" if key else name]
                start, stop = entry["data_offsets"]
                buffers[key] = (entry["dtype"], entry["shape"], data[start:stop])
            shards[file.name][name] = Tensor(record, buffers)
    texts = (file for file in path.iterdir() if file.name not in (INDEX, MANIFEST) and file.name not in shards)
    return Draft(shards, {file.name: file.read_bytes() for file in sorted(texts)})


def write(draft: Draft, out: Path) -> None:
    """Everything into a new directory, sealed: digests, header, index and manifest are those of what is there."""
    out.mkdir(parents=True)
    contents, weight_map, total = {}, {}, 0
    for file, tensors in draft.shards.items():
        records, entries, data = _described(tensors, draft.guarded)
        for change in draft.late:
            change(records, entries)
        contents[file] = seal(header(metadata_text(records), "".join(", " + json.dumps(entries)[1:-1])), data)
        names = [f"{name}.{key}" if key else name for name, tensor in tensors.items() for key in tensor.buffers]
        weight_map |= dict.fromkeys(names, file)
        total += len(data)
    files = dict(draft.files)
    if len(contents) > 1 or ONLY_SHARD not in contents:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        files[INDEX] = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
    sealed = {name: (len(content), _digest(content)) for name, content in files.items() if _plain(name)}
    shards = {name: (len(content), _carried(content)) for name, content in contents.items()}
    written = {**contents, **files, MANIFEST: encode_manifest(sealed, shards)}
    for pick, change in draft.cut:
        name = sorted(written)[int(pick * len(written))]
        written[name] = change(written[name])
    for name, content in written.items():
        (out / name).write_bytes(content)
    for name, kind in draft.special.items():
        make_special(out / name, kind)


def _described(tensors: dict[str, Tensor], guarded: bool) -> tuple[Json, Json, bytes]:
    records, entries, data = {}, {}, b""
    for name, tensor in tensors.items():
        digests = {key: _digest(content) for key, (_, _, content) in tensor.buffers.items()}
        records[name] = {**tensor.record, "digests": digests}
        for key, (dtype, shape, content) in tensor.buffers.items():
            span = [len(data), len(data) + len(content)]
            entries[f"{name}.{key}" if key else name] = {"dtype": dtype, "shape": shape, "data_offsets": span}
            data += content
    coded = [name for name, tensor in tensors.items() if tensor.record["codec"] != "raw"]
    if coded and guarded:
        first = next((name for name in coded if not name.rpartition(".")[2].isdecimal()), coded[0])
        exact = tensors[first].record["codec"] == "lossless"
        stem, _, last = first.rpartition(".")
        guard = first if exact else stem if last.isdecimal() else f"{first}.weight"
        entries.setdefault(guard, {"dtype": "U8", "shape": [0], "data_offsets": [len(data), len(data)]})
    return records, entries, data


def _digest(content: bytes) -> str:
    return blake2b(content, digest_size=8).hexdigest()


def _carried(shard: bytes) -> str:
    start = shard.index(rb"{\"digest\":\"") + len(rb"{\"digest\":\"")
    return shard[start : start + 16].decode()


def _plain(name: str) -> bool:
    return name != MANIFEST and not name.endswith(".safetensors")


def make_special(path: Path, kind: str) -> None:
    """Put one of SPECIAL in the place of a file, if there is one."""
    path.unlink(missing_ok=True)
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "zero":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "dangling":
            path.symlink_to(path.with_name("nowhere"))
        case "loop":
            path.symlink_to(path.name)
        case "sparse":
            with path.open("wb") as file:
                file.truncate(1 << 40)
