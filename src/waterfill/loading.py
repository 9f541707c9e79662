"""Models and tokenizers in memory: packed ones, and the checkpoints that they were packed from."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch
import transformers

from waterfill.artifact import open_artifact
from waterfill.checkpoint import WEIGHT_DTYPES, Checkpoint, check_finite
from waterfill.errors import ArtifactError, WaterfillError
from waterfill.pack import PLAN_FILE
from waterfill.plan import Plan

_log = logging.getLogger(__name__)

FLOAT32_SHARE = 0.4  # of the free memory that a float32 copy of the model may take; else it keeps its own dtype


def load(artifact: str | Path, *, dtype: torch.dtype | None = None, verify: bool = True) -> Any:
    """The packed model as a transformers model, ready for `generate` and pipelines; its weights stay packed.

    Args:
        dtype: of the activations; the checkpoint's own when None.
        verify: compare every byte with its digest first.

    Raises:
        ArtifactError: torn, altered or of an unknown version.
    """
    path = Path(artifact)
    open_artifact(path, verify=verify)
    config = transformers.AutoConfig.from_pretrained(path)
    config.quantization_config["verified"] = True
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, config=config, dtype="auto" if dtype is None else dtype
    ).eval()


def load_tokenizer(path: Path) -> Any:
    """The tokenizer in the directory of a checkpoint or artifact; WaterfillError if there is none."""
    absent = WaterfillError(
        f"{path} has no tokenizer that transformers can load; put the files of the model's tokenizer there"
    )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    except Exception as error:  # each tokenizer class fails in its own way on files that are absent or damaged
        raise absent from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise absent  # without files some classes make a tokenizer that knows no text
    return tokenizer


def read_plan(artifact: Path) -> Plan:
    """The plan that an artifact was packed by."""
    if not (artifact / PLAN_FILE).exists():
        raise ArtifactError(f"{artifact} has no {PLAN_FILE}; give a directory that `waterfill pack` wrote")
    return Plan.load(artifact / PLAN_FILE)


def load_checkpoint(checkpoint: Checkpoint) -> Any:
    """The original model: in float32, where products are exact enough and CPUs are fast, unless memory forbids it.

    Raises CheckpointError for NaN or infinite weights, whose traces in the model's outputs would name no tensor.
    """
    for tensor in checkpoint.tensors.values():
        if tensor.dtype in WEIGHT_DTYPES:
            check_finite(checkpoint.read(tensor.name), tensor.name, tensor.file)
    dtype = measuring_dtype(checkpoint)
    if dtype is None:
        _log.warning("%s is measured in its own dtype: a float32 copy would not fit in memory", checkpoint.path)
    return transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint.path, dtype=dtype or "auto", experts_implementation="eager"
    ).eval()


def measuring_dtype(checkpoint: Checkpoint) -> torch.dtype | None:
    """float32, where a copy of the model in it fits in memory; else None, for the checkpoint's own."""
    weights = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    return torch.float32 if 4 * weights <= FLOAT32_SHARE * _free_memory_bytes() else None


def _free_memory_bytes() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024.0 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))
    except (OSError, StopIteration):
        return math.inf
