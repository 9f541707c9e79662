"""Model and tokenizer of a directory as transformers makes them: files checked first, and no code of theirs run."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.integrations import peft
from transformers.utils import find_adapter_config_file

from waterfill.base import process
from waterfill.base.dtypes import WEIGHT_DTYPES
from waterfill.base.errors import WaterfillError, first_line
from waterfill.base.reading import check_settings
from waterfill.files.artifact import TensorSpec
from waterfill.files.checkpoint import ADAPTER, Checkpoint, TensorInfo, check_finite
from waterfill.files.settings.choices import FILE, check_choices
from waterfill.files.settings.tokenizing import check_growth, in_words

_log = logging.getLogger(__name__)

OWN_SHARE = 0.7  # of the free memory that the model may take in its own dtype
FLOAT32_SHARE = 0.4  # of the free memory that a float32 copy of the model may take; else it keeps its own dtype


def check_generation(path: Path, config: Any) -> None:
    """Refuse a generation_config.json that a generation would stumble over."""
    check_choices(path, getattr(config.get_text_config(), "vocab_size", None))
    if not (path / FILE).exists():
        return
    try:
        transformers.GenerationConfig.from_pretrained(path)
    except Exception as error:  # it validates itself in many ways
        raise WaterfillError(
            f"{path / FILE} has choices that transformers refuses ({first_line(error)}); change them"
        ) from error


def model_of(path: Path, **options: Any) -> Any:
    """The transformers model of a directory, by itself: no adapter beside it is added, though peft be installed, and no
    code that comes with it is run."""
    model, _ = from_pretrained(path, **options)
    return model


def from_pretrained(path: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The model, and what transformers says of loading it."""
    nowhere = {"subfolder": os.devnull}  # where transformers looks for adapters; below a file there are none
    if peft.is_peft_available() and find_adapter_config_file(str(path), **nowhere) is not None:  # before 5.24 elsewhere
        raise WaterfillError(
            f"transformers {transformers.__version__} would add the adapter beside the model in {path} to it; move "
            f"{ADAPTER} to another directory, or update transformers"
        )
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        path, adapter_kwargs=nowhere, trust_remote_code=False, output_loading_info=True, **options
    )
    return model.eval(), loading


def load_tokenizer(path: Path) -> Any:
    """The tokenizer in the directory of a checkpoint or artifact. Code that comes with it is never run.

    Raises:
        WaterfillError: there is none, or none without code of its own.
    """
    try:
        check_settings(path)
        with in_words():
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # each tokenizer class fails in its own way on files that are absent or damaged
        if "trust_remote_code" in str(error):
            raise WaterfillError(
                f"the tokenizer of {path} needs code of its own, which is never run; give files that one of "
                "transformers' own tokenizers can read"
            ) from error
        raise _no_tokenizer(path, first_line(error)) from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise _no_tokenizer(path, "it knows no text")  # some classes make one without files
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        check_growth(backend)
    return tokenizer


def _no_tokenizer(path: Path, reason: str) -> WaterfillError:
    return WaterfillError(
        f"{path} has no tokenizer that transformers can load ({reason}); put the files of the model's tokenizer there"
    )


def load_checkpoint(checkpoint: Checkpoint) -> Any:
    """The original model: in float32, where products are exact enough and CPUs are fast, unless memory forbids it.

    Raises:
        CheckpointError: weights are NaN or infinite; their traces in the model's outputs would name no tensor.
    """
    return load_original(checkpoint, measuring_dtype(checkpoint.tensors.values()))


def load_original(checkpoint: Checkpoint, dtype: torch.dtype | None) -> Any:
    """The same in a dtype of the caller's, None for the checkpoint's own."""
    for tensor in checkpoint.tensors.values():
        if tensor.dtype in WEIGHT_DTYPES:
            check_finite(checkpoint.read(tensor.name), tensor.name, tensor.file)
    if dtype is None:
        _log.warning("%s is measured in its own dtype: a float32 copy would not fit in memory", checkpoint.path)
    return model_of(checkpoint.path, dtype=dtype or "auto", experts_implementation="eager")


def fits(checkpoint: Checkpoint) -> bool:
    """Whether all of a checkpoint fits in the memory that is free, at least in its own dtype."""
    return sum(tensor.size_bytes for tensor in checkpoint.tensors.values()) <= OWN_SHARE * process.free_bytes()


def measuring_dtype(tensors: Iterable[TensorInfo | TensorSpec]) -> torch.dtype | None:
    """float32, where a copy of a model of these tensors in it fits in memory; else None, for the model's own."""
    weights = sum(math.prod(tensor.shape) for tensor in tensors)
    return torch.float32 if 4 * weights <= FLOAT32_SHARE * process.free_bytes() else None
