"""A selection becomes a checkpoint of its own: config.json with the new sizes, weights tensor by tensor.

    Structure, Selection ──► lay_out: files, offsets and sizes, exact ──► write ──► OUT, all of it or nothing

safetensors' own `save_file` wants all tensors of a file in memory; here one is, and `--size` is held against what the
files will take before one is written.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from waterfill.base.dtypes import ITEM_BYTES
from waterfill.base.errors import WaterfillError
from waterfill.base.progress import Progress, step_of
from waterfill.base.writing import flush, resolved
from waterfill.files.architecture import read_kept
from waterfill.files.checkpoint import CONFIG, INDEX, SINGLE_FILE, Checkpoint
from waterfill.files.skeleton import ModelTensor
from waterfill.tuning.pruning.selection import Selection, Shape
from waterfill.tuning.pruning.structure import Structure, layer_of

SHARD_BYTES = 4_000_000_000  # of a file's tensors
WRITING = "writing what stays"

Weights = Callable[[ModelTensor], torch.Tensor | None]
"""Gives weights that are to be written in place of a tensor's own, cut already; None for its own."""


def unchanged(tensor: ModelTensor) -> None:
    """Every tensor's own."""


@dataclass(frozen=True)
class Entry:
    """A tensor of the new checkpoint: its name, its shape, and what it is cut from."""

    name: str
    shape: tuple[int, ...]
    tensor: ModelTensor

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.tensor.dtype]


@dataclass(frozen=True)
class File:
    """A safetensors file of the new checkpoint."""

    name: str
    entries: tuple[Entry, ...]

    @cached_property
    def header(self) -> bytes:
        """Length and header, as safetensors has them: names with dtype, shape and place."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for entry in self.entries:
            start, end = end, end + entry.size_bytes
            header[entry.name] = {"dtype": entry.tensor.dtype, "shape": entry.shape, "data_offsets": [start, end]}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        return len(encoded).to_bytes(8, "little") + encoded

    @property
    def size_bytes(self) -> int:
        return len(self.header) + sum(entry.size_bytes for entry in self.entries)


@dataclass(frozen=True)
class Layout:
    """All weight files of the new checkpoint."""

    files: tuple[File, ...]

    @cached_property
    def index(self) -> bytes | None:
        """Content of the index; None where one file is all."""
        if len(self.files) == 1:
            return None
        total = sum(entry.size_bytes for file in self.files for entry in file.entries)
        places = {entry.name: file.name for file in self.files for entry in file.entries}
        return json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=1).encode()

    @property
    def size_bytes(self) -> int:
        """Of all weight files, index included."""
        return sum(file.size_bytes for file in self.files) + len(self.index or b"")


def lay_out(structure: Structure, layers: tuple[int, ...], shape: Shape, *, shard_bytes: int = SHARD_BYTES) -> Layout:
    """Files of a checkpoint of this shape, with these layers of the original."""
    groups: list[list[Entry]] = [[]]
    taken = 0
    for entry in _entries(structure, layers, shape):
        if groups[-1] and taken + entry.size_bytes > shard_bytes:
            groups.append([])
            taken = 0
        groups[-1].append(entry)
        taken += entry.size_bytes
    names = [f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
    names = [SINGLE_FILE] if len(groups) == 1 else names
    return Layout(tuple(File(name, tuple(group)) for name, group in zip(names, groups, strict=True)))


def _entries(structure: Structure, layers: tuple[int, ...], shape: Shape) -> Iterator[Entry]:
    places = {layer: place for place, layer in enumerate(layers)}
    kept = {"heads": shape.kv_heads, "channels": shape.channels}
    for tensor in structure.tensors:
        source, layer, sizes = tensor.sources[0][0].source, layer_of(tensor.name), list(tensor.shape)
        if layer is not None:
            if layer not in places:
                continue
            source = source.replace(f"layers.{layer}.", f"layers.{places[layer]}.", 1)
        if (member := structure.members.get(tensor.name)) is not None:
            sizes[member.axis] = kept[member.kind] * member.width
        yield Entry(source, tuple(sizes), tensor)


def config_of(checkpoint: Checkpoint, structure: Structure, selection: Selection) -> dict[str, Any]:
    """config.json of what stays: numbers of parts and layers, and what it says of single layers cut to those."""
    config, sizes, shape = dict(checkpoint.config), structure.sizes, selection.shape
    config |= {
        "num_attention_heads": shape.kv_heads * sizes.repeats,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": sizes.head_dim,
        "intermediate_size": shape.channels,
        "num_hidden_layers": shape.layers,
    }
    if shape.layers < sizes.layers:
        if types := getattr(structure.config, "layer_types", None):  # of a pattern, counted from the first layer
            config["layer_types"] = list(types)
        for key, value in config.items():
            if isinstance(value, list) and len(value) == sizes.layers:
                config[key] = [value[layer] for layer in selection.layers]
        if isinstance(windowless := config.get("max_window_layers"), int):
            config["max_window_layers"] = sum(layer < windowless for layer in selection.layers)
    return config


def check_out(out: Path) -> None:
    """Refuse a place where something is already.

    Raises:
        WaterfillError: it is no empty directory.
    """
    try:
        real = resolved(out)
        if real.exists() and (not real.is_dir() or any(real.iterdir()) or real == Path.cwd()):
            raise WaterfillError(f"{out} exists already; give another output")
    except OSError as error:
        raise WaterfillError(f"cannot write {out} ({error.strerror or error}); give another output") from error


def write(
    checkpoint: Checkpoint,
    structure: Structure,
    selection: Selection,
    out: Path,
    progress: Progress | None = None,
    *,
    weights: Weights = unchanged,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write what stays of a checkpoint into the directory `out`: all of it, or, if it is interrupted, nothing. Returns
    the bytes of its weight files.

    Raises:
        WaterfillError: `out` is there already, or cannot be written.
        CheckpointError: a weight is NaN or infinite.
    """
    check_out(out)
    real, layout = resolved(out), lay_out(structure, selection.layers, selection.shape, shard_bytes=shard_bytes)
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".waterfill-", dir=real.parent) as folder:
            work = Path(folder) / "checkpoint"
            work.mkdir()
            _write_weights(checkpoint, structure, selection, layout, work, progress, weights)
            for file in checkpoint.extra_files():
                shutil.copyfile(file, work / file.name)
            config = config_of(checkpoint, structure, selection)
            (work / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
            if layout.index is not None:
                (work / INDEX).write_bytes(layout.index)
            for file in work.iterdir():
                flush(file)
            flush(work)
            work.replace(real)
    except OSError as error:
        raise WaterfillError(
            f"cannot write {out} ({error.strerror or error}); free some space, or give another output"
        ) from error
    flush(real.parent)
    return layout.size_bytes


def _write_weights(
    checkpoint: Checkpoint,
    structure: Structure,
    selection: Selection,
    layout: Layout,
    work: Path,
    progress: Progress | None,
    weights: Weights,
) -> None:
    step, done = step_of(progress, WRITING), 0
    total = sum(len(file.entries) for file in layout.files)
    places: Mapping[int, int] = {layer: place for place, layer in enumerate(selection.layers)}
    for file in layout.files:
        with (work / file.name).open("wb") as target:
            target.write(file.header)
            for entry in file.entries:
                if step:
                    step(done, total)
                part = weights(entry.tensor)
                if part is None:
                    part = _cut(checkpoint, structure, selection, places, entry.tensor)
                assert tuple(part.shape) == entry.shape
                target.write(part.contiguous().view(-1).view(torch.uint8).numpy().data)
                done += 1
    if step:
        step(total, total)


def _cut(
    checkpoint: Checkpoint,
    structure: Structure,
    selection: Selection,
    places: Mapping[int, int],
    tensor: ModelTensor,
) -> torch.Tensor:
    """What stays of one tensor, in its own dtype."""
    weight = read_kept(checkpoint, tensor)
    if (member := structure.members.get(tensor.name)) is None:
        return weight
    parts = selection.parts(places[member.layer], member.kind)
    return weight if len(parts) == member.parts else weight.index_select(member.axis, member.places(parts))
