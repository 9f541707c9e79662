"""Open a Hugging Face checkpoint lazily: names, shapes and slices, never the whole model in memory.

    directory or hub id ──► open_checkpoint ──► Checkpoint (config + one TensorInfo per tensor) ──► read(name, rows)

Everything that can be wrong with the files is found when the checkpoint is opened, from headers alone: weights are
memory-mapped by safetensors and touched only where they are read. What the tensors mean is `architecture`'s business.
"""

from __future__ import annotations

import json
import logging
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from types import EllipsisType
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError, safe_open

from waterfill.base.dtypes import WEIGHT_DTYPES
from waterfill.base.errors import CheckpointError, first_line
from waterfill.base.reading import SETTINGS, open_regular, read_small, read_text

_log = logging.getLogger(__name__)

CONFIG = "config.json"
QUANT_METHOD = "waterfill"  # in config.json: what transformers goes by
PACKED_MARK = "waterfill"  # in the metadata of a packed model's shards
SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"  # of peft: small matrices to be added to a model's

# What is copied from a checkpoint into an artifact: tokenizer, generation config, chat template, licence.
_EXTRA_PATTERNS = (*SETTINGS, "LICENSE*", "NOTICE*")
_PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.bin.index.json")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SAMPLE_BYTES = 1024
_MOST_HEADER_BYTES = 100_000_000  # safetensors' own limit

Index = EllipsisType | int | slice | tuple[int | slice, ...]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its shard's header describes it; `dtype` is the safetensors name, `offset` counts from the file's
    first byte."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint: its directory, its parsed config.json and its tensors by their names on disk."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    def read(self, name: str, index: Index = ...) -> torch.Tensor:
        """Tensor `name`, or the part of it that `index` selects, in its own dtype.

        The result is a view of the mapped file: only the pages that are used are read, and they leave memory with it.

        Raises:
            CheckpointError: there is no such tensor, or its file has gone or changed.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.path} has no tensor {name!r}; give one of its {len(self.tensors)} names")
        try:
            # Opened for each read, so that a file's pages do not stay mapped, and counted, while others are read.
            with safe_open(tensor.file, framework="pt") as shard:
                part: torch.Tensor = shard.get_slice(name)[index]
                return part
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{tensor.file} can no longer be read for tensor {name!r} ({error}), so it changed after it "
                "was opened; open it again"
            ) from error

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest that identifies the weights: config, shard headers and sizes, three samples of each tensor.

        Costs a few small reads per tensor, so it tells apart what people mix up (another model, another revision,
        further training), not a deliberate change of single weights.
        """
        digest = blake2b(read_small(self.path / CONFIG), digest_size=16)
        shards: dict[Path, list[TensorInfo]] = {}
        for tensor in self.tensors.values():
            shards.setdefault(tensor.file, []).append(tensor)
        for file, tensors in sorted(shards.items()):
            with file.open("rb", buffering=0) as shard:
                header_bytes = int.from_bytes(shard.read(8), "little")
                digest.update(shard.read(header_bytes))
                digest.update(file.stat().st_size.to_bytes(8, "little"))
                for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
                    last = max(0, tensor.size_bytes - _SAMPLE_BYTES)
                    for start in (0, last // 2, last):
                        shard.seek(tensor.offset + start)
                        digest.update(shard.read(min(_SAMPLE_BYTES, tensor.size_bytes)))
        return digest.hexdigest()

    def extra_files(self) -> tuple[Path, ...]:
        """Files to copy into an artifact beside the weights: tokenizer, generation config, chat template, licence."""
        return tuple(
            file
            for file in sorted(self.path.iterdir())
            if file.is_file() and is_settings(file.name) and file.name not in (CONFIG, ADAPTER)
        )


def is_settings(name: str) -> bool:
    """Whether a file of this name belongs to a model beside its weights: config, tokenizer, template, licence."""
    return any(fnmatchcase(name, pattern) for pattern in _EXTRA_PATTERNS) and not name.endswith(".index.json")


def is_unsafe(name: str) -> bool:
    """Whether a file of this name may be code, or weights that run code as they are read."""
    return name.endswith(".py") or any(fnmatchcase(name, pattern) for pattern in _PICKLE_PATTERNS)


def open_checkpoint(source: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Open a local Hugging Face directory, or download a model from the hub (resumed if it was broken off) and open it.

    Args:
        source: a directory, or a hub id such as "org/name". The hub token is taken from the usual places.
        revision: branch, tag or commit of a hub model.

    Raises:
        CheckpointError: the source cannot be found or downloaded, is incomplete, damaged, pickled or quantised.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"{source} is a directory, which has no revision {revision!r}; leave the revision out"
            )
    elif path.is_file():
        raise CheckpointError(f"{source} is a file; give the directory that holds it and its {CONFIG}")
    elif isinstance(source, str) and _HUB_ID.fullmatch(source):
        path = _download(source, revision)
    else:
        raise CheckpointError(
            f"{source} does not exist; give a directory with {CONFIG} and safetensors weights, or a hub id such as "
            "'org/name'"
        )
    checkpoint = Checkpoint(path, _read_config(path), _read_tensors(path, source))
    warn_of_adapter(path)
    return checkpoint


def warn_of_adapter(path: Path) -> None:
    """Say that an adapter beside a model is left out, if there is one: what the model computes with it is another."""
    if (path / ADAPTER).exists():
        _log.warning(
            "the adapter in %s (%s) is left out: the model is taken without it; merge it into the weights with peft's "
            "merge_and_unload if it belongs to them",
            path,
            ADAPTER,
        )


def check_finite(tensor: torch.Tensor, name: str, file: Path) -> None:
    """Refuse weights, read from tensor `name` of `file`, that are no numbers.

    Raises:
        CheckpointError: `tensor` holds NaN or Inf.
    """
    # The sum of finite weights is finite, and needs no temporary; a sum that overflows is told apart by counting.
    if torch.isfinite(tensor.sum(dtype=torch.float32)):
        return
    count = int((~torch.isfinite(tensor)).sum())
    if count:
        raise CheckpointError(
            f"{file}: tensor {name!r} holds {count} NaN or Inf among the {tensor.numel()} weights read, so it "
            "is damaged or diverged in training; give a checkpoint of finite weights"
        )


# ---------------------------------------------------------------------------------------------------------------------
# The hub


def _download(repository: str, revision: str | None) -> Path:
    """Local snapshot of a hub model. Config and tokenizer come first: a model that cannot be packed is then refused
    before its weights travel, and the index says which files its weights are."""
    path = _snapshot(repository, revision, _EXTRA_PATTERNS)
    _read_config(path)
    index = path / INDEX
    shards = sorted(set(_read_index(index).values())) if index.exists() else [SINGLE_FILE]
    commit = path.name
    return _snapshot(repository, commit, shards)


def _snapshot(repository: str, revision: str | None, patterns: tuple[str, ...] | list[str]) -> Path:
    at = f"{repository}@{revision}" if revision else repository
    try:
        # "*/*": subdirectories hold other formats of the same weights.
        return Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*/*"]
            )
        )
    except GatedRepoError as error:
        raise CheckpointError(
            f"{at} is gated; accept its terms at https://huggingface.co/{repository} and log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repository} is neither a directory here nor a public model on the hub; check the name, or log in with "
            "`hf auth login` if it is private"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{at} does not exist; give a branch, tag or commit of {repository}") from error
    except Exception as error:  # the client lets through errors of httpx, hf-xet and the file system
        raise CheckpointError(
            f"{at} is not a directory here and cannot be downloaded from the hub ({first_line(error)}); check the "
            "network and HF_HUB_OFFLINE, and run again: what has arrived is kept"
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Config, index and shards


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(file))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not readable JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{file} holds a JSON {type(content).__name__} where an object belongs; download it again"
        )
    return content


def _read_config(path: Path) -> dict[str, Any]:
    if not (path / CONFIG).exists():
        if (path / ADAPTER).exists():
            wanted = "the directory of the adapter's model, or of one that it was merged into"
        else:
            wanted = "a Hugging Face model directory"
        raise CheckpointError(f"{path} has no {CONFIG}; give {wanted}")
    config = _read_json(path / CONFIG)
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        if method == QUANT_METHOD:
            raise CheckpointError(f"{path} is already packed by waterfill; give the checkpoint that it was packed from")
        raise CheckpointError(
            f"{path / CONFIG} says that the weights are already quantised ({method}); give the original checkpoint "
            f"in {', '.join(WEIGHT_DTYPES)}"
        )
    return config


def _read_tensors(path: Path, source: str | Path) -> dict[str, TensorInfo]:
    if (path / SINGLE_FILE).exists():
        return _read_shard(path / SINGLE_FILE)
    if not (path / INDEX).exists():
        raise _no_weights(path, source)
    weight_map = _read_index(path / INDEX)
    shards: dict[str, dict[str, TensorInfo]] = {}
    for file in sorted(set(weight_map.values())):
        if not (path / file).exists():
            tensor = next(name for name, shard in weight_map.items() if shard == file)
            raise CheckpointError(
                f"{path / file} is absent, though {INDEX} places tensor {tensor!r} in it; download it again"
            )
        shards[file] = _read_shard(path / file)
    tensors = {}
    for name, file in weight_map.items():
        if name not in shards[file]:
            raise CheckpointError(
                f"{path / file} holds no tensor {name!r}, though {INDEX} places it there, so shards and index come "
                "from different versions; download them again"
            )
        tensors[name] = shards[file][name]
    return tensors


def _read_index(index: Path) -> dict[str, str]:
    """Tensor name -> name of its shard."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index} has no 'weight_map', an object that maps tensor names to files; download it again"
        )
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} places tensor {name!r} in {file!r}, which is no safetensors file beside the "
                "index; download it again"
            )
    return weight_map


def _read_shard(file: Path) -> dict[str, TensorInfo]:
    """Tensors of one safetensors file. The library validates sizes and offsets; this only reads what it accepted."""
    try:
        with open_regular(file), safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        cut = _first_cut_tensor(file)
        where = f"it ends inside tensor {cut!r}" if cut else str(error)
        raise CheckpointError(f"{file} is truncated or not a safetensors file ({where}); download it again") from error
    header, data_start = _parse_header(file)
    if PACKED_MARK in header.pop("__metadata__", {}):
        raise CheckpointError(f"{file} is packed by waterfill; give the checkpoint that it was packed from")
    tensors = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        shape = tuple(entry["shape"])
        tensors[name] = TensorInfo(name, shape, entry["dtype"], file, data_start + start, stop - start)
    return tensors


def _parse_header(file: Path) -> tuple[dict[str, Any], int]:
    """Header entries by tensor name, and the offset of the first data byte."""
    with open_regular(file) as shard:
        length = min(int.from_bytes(shard.read(8), "little"), _MOST_HEADER_BYTES)  # a damaged length may be huge
        header = json.loads(shard.read(length))
    return header, 8 + length


def _first_cut_tensor(file: Path) -> str | None:
    """Name of the first tensor that lies beyond the end of a damaged file, when its header still says so."""
    try:
        header, data_start = _parse_header(file)
        available_bytes = file.stat().st_size - data_start
        cut = [(entry["data_offsets"][1], name) for name, entry in header.items() if name != "__metadata__"]
        return min(((stop, name) for stop, name in cut if stop > available_bytes), default=(0, None))[1]
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return None  # the header itself is damaged


def _no_weights(path: Path, source: str | Path) -> CheckpointError:
    """Why there is nothing to read; for pickles, with the command that converts them."""
    pickles = [file.name for file in sorted(path.iterdir()) if any(file.match(pattern) for pattern in _PICKLE_PATTERNS)]
    local = Path(source).expanduser().is_dir()
    if local and not pickles:
        return CheckpointError(
            f"{path} has no weights; give a directory with {SINGLE_FILE}, or {INDEX} and the files it names"
        )
    name = str(source)
    code = (
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        f"src, dst = {json.dumps(name)}, {json.dumps(name.rstrip('/').rpartition('/')[2] + '-safetensors')}; "
        'M.from_pretrained(src, dtype="auto").save_pretrained(dst); T.from_pretrained(src).save_pretrained(dst)'
    )
    contents = f"only pickles ({', '.join(pickles)})" if pickles else f"no {SINGLE_FILE}"
    return CheckpointError(
        f"{source} has {contents}, and opening a pickle can run code; give safetensors or, if you trust it, convert "
        f"it with: python -c {shlex.quote(code)}"
    )
