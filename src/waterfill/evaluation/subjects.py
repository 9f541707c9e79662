"""What can be evaluated, each kind behind the same few attributes: artifacts, checkpoints and GGUF files.

open_subject("packed" | "org/model" | "model.gguf") -> Subject: sizes and fingerprint at once, `load` and
`tokenizer` when they are needed
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
import transformers

from waterfill.base.dtypes import WEIGHT_DTYPES
from waterfill.base.errors import WaterfillError
from waterfill.base.reading import read_small, read_text
from waterfill.evaluation.llamacpp import SUFFIX, GgufModel, GgufTokenizer
from waterfill.files.artifact import at_level, bits_of, level_at, levels_of, open_artifact, read_bytes_of
from waterfill.files.artifact.manifest import MANIFEST
from waterfill.files.checkpoint import CONFIG, QUANT_METHOD, open_checkpoint
from waterfill.files.context import context_length
from waterfill.files.original import load_tokenizer, measuring_dtype, model_of
from waterfill.running.loading import load, load_checkpoint_in
from waterfill.running.streaming.fit import Form

PACKED, CHECKPOINT, GGUF = "packed", "checkpoint", "gguf"
_SAMPLE_BYTES = 1 << 20


class Subject(ABC):
    """A model on disk."""

    kind: str
    path: Path
    size_bytes: int  # of the weight files
    weights: int  # numbers in all tensors, those that are packed counted as the model sees them
    fingerprint: str  # of the weights
    positions: int | None  # tokens that the model can read at most
    level = 1  # of an artifact that was packed at several rates: which is read
    logits = 1  # positions whose logits are wanted at a time, to reckon with where memory is short

    def __init__(self, memory: str | float | None = None) -> None:
        self._memory = memory  # what the process may take in all when it runs the model

    @property
    def limited(self) -> bool:
        """Whether a limit was given for the memory that it is run in."""
        return self._memory is not None

    @abstractmethod
    def load(self, dtype: torch.dtype | None = None) -> Any:
        """The model, ready to be evaluated in a dtype, of the activations of a packed one; None for its own."""

    def load_to_run(self) -> Any:
        """The model as users run it."""
        return self.load()

    @abstractmethod
    def tokenizer(self) -> Any:
        """That came with the model.

        Raises:
            WaterfillError: there is none.
        """

    def dtype(self) -> torch.dtype | None:
        """What to measure it in, as memory allows; None for the model's own."""
        return None


class PackedSubject(Subject):
    """What `waterfill pack` wrote. Opening it compares every byte with its digest."""

    kind = PACKED

    def __init__(
        self, path: Path, memory: str | float | None = None, form: Form = "auto", rate: float | None = None
    ) -> None:
        super().__init__(memory)
        self._form = form
        whole = open_artifact(path, verify=True)
        self.level = level_at(whole, rate)
        stored = at_level(whole, self.level)
        self._rate = bits_of(stored.tensors) if levels_of(whole) > 1 else None  # whatever would fit
        self.path, self.size_bytes = path, read_bytes_of(whole, stored)
        self.weights = sum(math.prod(tensor.shape) for tensor in stored.tensors.values())
        self._dtype = measuring_dtype(stored.tensors.values())
        told = read_small(path / MANIFEST) + (b"" if self.level == levels_of(whole) else f"{self.level}".encode())
        self.fingerprint = blake2b(told, digest_size=16).hexdigest()
        self.positions = _positions(path)

    def load(self, dtype: torch.dtype | None = None) -> Any:
        options: dict[str, Any] = {"memory": self._memory, "memory_form": self._form, "logits": self.logits}
        options["rate"] = self._rate
        return load(self.path, dtype=dtype, verify=False, **options)

    def tokenizer(self) -> Any:
        return load_tokenizer(self.path)

    def dtype(self) -> torch.dtype | None:
        return self._dtype


class CheckpointSubject(Subject):
    """A Hugging Face directory or hub id."""

    kind = CHECKPOINT

    def __init__(self, source: str | Path, revision: str | None, memory: str | float | None = None) -> None:
        super().__init__(memory)
        self.checkpoint = open_checkpoint(source, revision=revision)
        tensors = self.checkpoint.tensors.values()
        self._dtype = measuring_dtype(tensors)
        self.path, self.fingerprint = self.checkpoint.path, self.checkpoint.fingerprint
        self.size_bytes = sum(file.stat().st_size for file in {tensor.file for tensor in tensors})
        self.weights = sum(math.prod(tensor.shape) for tensor in tensors if tensor.dtype in WEIGHT_DTYPES)
        self.positions = _positions(self.path)

    def load(self, dtype: torch.dtype | None = None) -> Any:
        return load_checkpoint_in(self.checkpoint, dtype, memory=self._memory, logits=self.logits)

    def load_to_run(self) -> Any:
        return model_of(self.path, dtype="auto")

    def tokenizer(self) -> Any:
        return load_tokenizer(self.path)

    def dtype(self) -> torch.dtype | None:
        return self._dtype


class GgufSubject(Subject):
    """A file that llama.cpp runs."""

    kind = GGUF

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._model = GgufModel(path)  # mapped: costs little until it computes
        self.path, self.size_bytes, self.weights = path, self._model.size_bytes, self._model.weights
        self.positions = context_length(self._model.config)

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        """Of the file's size and samples of it."""
        digest = blake2b(str(self.size_bytes).encode(), digest_size=16)
        with self.path.open("rb") as file:
            for part in range(16):
                file.seek(part * self.size_bytes // 16)
                digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()

    def load(self, dtype: torch.dtype | None = None) -> Any:
        return self._model

    def tokenizer(self) -> Any:
        return GgufTokenizer(self._model)


def open_subject(
    source: str | Path,
    *,
    revision: str | None = None,
    memory: str | float | None = None,
    form: Form = "auto",
    rate: float | None = None,
) -> Subject:
    """An artifact, a checkpoint (local directory or hub id) or a GGUF file.

    `memory` is what the process may take in all when it runs the model. An artifact is streamed where that is little,
    of a checkpoint what does not fit is refused. `form` is the one in memory, and `rate` as of `load`, which an
    artifact alone has.

    Raises:
        WaterfillError: it is anything else.
    """
    path = Path(source)
    packed = path.suffix != SUFFIX and _is_packed(path)
    if form != "auto" and not packed:
        raise WaterfillError(
            f"{source} is no artifact, whose weights alone are {form} in memory; leave out memory_form"
        )
    if rate is not None and not packed:
        raise WaterfillError(f"{source} is no artifact, which alone may have several rates; leave out rate")
    if path.suffix == SUFFIX:
        if memory is not None:
            raise WaterfillError(f"{source} is run by llama.cpp, which no limit holds; leave out memory")
        return GgufSubject(path)
    return PackedSubject(path, memory, form, rate) if packed else CheckpointSubject(source, revision, memory)


def _is_packed(path: Path) -> bool:
    if (path / MANIFEST).exists():
        return True
    try:
        config = json.loads(read_text(path / CONFIG))
        return bool(config["quantization_config"]["quant_method"] == QUANT_METHOD)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _positions(path: Path) -> int | None:
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise WaterfillError(f"transformers does not know the model of {path} ({error}); check its {CONFIG}") from error
    return context_length(config)
