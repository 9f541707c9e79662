"""Seal an artifact again whose small files were changed: its settings, template or tokenizer, never its weights.

shards as they were packed + files as they are now ──► waterfill.json
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from waterfill.base.arguments import checked
from waterfill.base.errors import ArtifactError, CheckpointError, WaterfillError
from waterfill.base.reading import SMALL_BYTES
from waterfill.base.records import Record
from waterfill.base.writing import write_file
from waterfill.files.artifact import Artifact, StoredTensor, is_file_name, open_artifact
from waterfill.files.artifact.format import digest_file
from waterfill.files.artifact.manifest import INDEX, MANIFEST, encode_manifest
from waterfill.files.checkpoint import CONFIG, Checkpoint, is_settings, is_unsafe
from waterfill.files.original import check_generation, load_tokenizer
from waterfill.files.settings.choices import FILE as GENERATION
from waterfill.files.settings.templates import check_template
from waterfill.files.skeleton import build_skeleton
from waterfill.packing.pack import MARK
from waterfill.planning.plan import PLAN_FILE
from waterfill.planning.sensitivity import SENSITIVITY_FILE

_RECORDS = (INDEX, PLAN_FILE, SENSITIVITY_FILE)  # of how the weights were packed: no settings


@dataclass(frozen=True)
class Sealed(Record):
    """The files that are others than before, by name."""

    path: Path
    changed: tuple[str, ...]
    added: tuple[str, ...]
    removed: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields by name; the path as text."""
        return {**super().to_dict(), "path": str(self.path)}


@checked()
def seal(artifact: str | Path) -> Sealed:
    """Make the manifest say what the artifact's files are now; its weights have to be what they were, to the bit.

    Files beside the weights may have been changed, added or removed: settings, template, tokenizer, licence. What is
    changed is tried: JSON is parsed, the tokenizer loaded, a model made of config.json, which the weights have to fit.

    Raises:
        WaterfillError: weights, or records of how they were packed, are not what they were; a file is not JSON, not a
            regular file, or may be code; the weights do not fit config.json.
    """
    path = Path(artifact)
    opened = open_artifact(path, verify=False)
    before, shards = opened.stated()
    opened.verify()
    now = {name: digest_file(path / name) for name in _files(opened, before.keys() | shards.keys())}
    sealed = Sealed(
        path,
        changed=tuple(sorted(name for name in now.keys() & before.keys() if now[name] != before[name])),
        added=tuple(sorted(now.keys() - before.keys())),
        removed=tuple(sorted(before.keys() - now.keys())),
    )
    _check(opened, sealed)
    if before != now:
        write_file(path / MANIFEST, encode_manifest(now, shards))
    return sealed


def _files(artifact: Artifact, known: set[str]) -> list[str]:
    """Names of the files that a manifest lists; what is of no use to a model, and no danger, is left out of it."""
    names = []
    for file in sorted(artifact.path.iterdir()):
        if is_unsafe(file.name) or (file.suffix == ".safetensors" and file.name not in known):
            raise ArtifactError(f"{file} may hold code or other weights, and is no part of an artifact; remove it")
        if file.name not in artifact.files or file.name == INDEX:
            if file.name == MANIFEST or not (file.name in known or is_settings(file.name)):
                continue
            if file.is_symlink() or not file.is_file() or file.stat().st_size > SMALL_BYTES:
                raise ArtifactError(
                    f"{file} is a link, no regular file, or larger than {SMALL_BYTES} bytes; put a file there"
                )
            if not is_file_name(file.name):
                raise ArtifactError(f"{file} is not a plain file name; give it letters, digits, and . _ + - only")
            names.append(file.name)
    if (artifact.path / MANIFEST).is_symlink():
        raise ArtifactError(f"{artifact.path / MANIFEST} is a link, as in the hub's cache; copy the artifact first")
    return names


def _check(artifact: Artifact, sealed: Sealed) -> None:
    """Refuse records that are not what they were, and settings that cannot be used."""
    path = artifact.path
    for name in (*sealed.changed, *sealed.removed, *sealed.added):
        if name in _RECORDS:
            raise ArtifactError(f"{path / name} says how the weights were packed, and is not what it was; restore it")
    if CONFIG in sealed.removed:
        raise ArtifactError(f"{path / CONFIG} is missing; restore it")
    touched = {*sealed.changed, *sealed.added}
    for name in sorted(touched):
        if name.endswith(".json"):
            _json(path / name)
    if CONFIG in touched:
        _check_config(artifact)
    if GENERATION in touched:
        check_generation(path, transformers.AutoConfig.from_pretrained(path, trust_remote_code=False))
    if touched - {CONFIG, GENERATION} and (path / "tokenizer_config.json").exists():
        templates = load_tokenizer(path).chat_template or {}
        for template in templates.values() if isinstance(templates, dict) else (templates,):
            check_template(template)


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WaterfillError(f"{file} is no JSON ({error}); mend it") from error


def _check_config(artifact: Artifact) -> None:
    """Refuse a config.json whose model has other tensors than the artifact, or that transformers would not know."""
    file = artifact.path / CONFIG
    config = _json(file)
    if not isinstance(config, dict) or config.get("quantization_config") != MARK:
        raise WaterfillError(f"{file} has not the quantization_config {json.dumps(MARK)}; restore that")
    model = build_skeleton(Checkpoint(artifact.path, config, {}))
    state = model.state_dict(keep_vars=True)
    filled: dict[int, str] = {}  # by the identity of the model's tensor, which tied ones share: its name
    for tensor in artifact.tensors.values():
        name = _place(tensor, state)
        if name is None or filled.setdefault(id(state[name]), name) != name:
            raise CheckpointError(
                f"{file} describes a model that has no place for {tensor.name} {list(tensor.shape)}; restore what it "
                "says of the model's size"
            )
    missing = [name for name, tensor in state.items() if isinstance(tensor, nn.Parameter) and id(tensor) not in filled]
    if missing:
        raise CheckpointError(
            f"{file} describes a model with {missing[0]}, which the artifact has not; restore what it says of the "
            "model's size"
        )


def _place(tensor: StoredTensor, state: dict[str, Any]) -> str | None:
    """The model's tensor that a stored one fills, or is one expert of; None if there is none of its shape."""
    if not tensor.packed:
        fits = tensor.name in state and tuple(state[tensor.name].shape) == tensor.shape
        return tensor.name if fits else None
    weight, (fused, _, index) = f"{tensor.name}.weight", tensor.name.rpartition(".")
    if weight in state:
        return weight if _matches(state[weight].shape, tensor.shape) else None
    one = state.get(fused)
    if one is None or not index.isdecimal() or int(index) >= len(one):
        return None
    return fused if _matches(one.shape[1:], tensor.shape) else None


def _matches(shape: Any, stored: tuple[int, ...]) -> bool:
    """Some classes have inputs in rows."""
    return stored in (tuple(shape), tuple(shape)[::-1])
