"""Models and tokenizers in memory: packed ones, and the checkpoints that they were packed from."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

from waterfill import process
from waterfill.arguments import Check, checked
from waterfill.artifact import TensorSpec, open_artifact
from waterfill.checkpoint import WEIGHT_DTYPES, Checkpoint, TensorInfo, check_finite
from waterfill.errors import ArtifactError, WaterfillError
from waterfill.fit import fit, packed_names
from waterfill.pack import PLAN_FILE
from waterfill.plan import Plan

_log = logging.getLogger(__name__)

_DTYPE = Check("a torch dtype", lambda value: isinstance(value, torch.dtype))
FLOAT32_SHARE = 0.4  # of the free memory that a float32 copy of the model may take; else it keeps its own dtype


@checked(dtype=_DTYPE)
def load(
    artifact: str | Path,
    *,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    memory: str | float | None = None,
    streamed: bool | None = None,
    logits: int = 1,
) -> Any:
    """The packed model as a transformers model, ready for `generate` and pipelines; its weights stay packed.

    A model that does not fit in memory is streamed: `model.streaming` is the `Streamer` then, else None.

    Args:
        dtype: of the activations; the checkpoint's own when None.
        verify: compare every byte with its digest first.
        memory: what the process may take in all, in bytes or as "1GB"; as much as is free when None.
        streamed: whether to stream; None streams what does not fit.
        logits: positions that logits are wanted of at a time, to reckon with where memory is short.

    Raises:
        ArtifactError: torn, altered or of an unknown version.
        WaterfillError: `memory` is not a size, or too small for the model even when it is streamed.
    """
    path = Path(artifact)
    opened = open_artifact(path, verify=False)
    chosen = fit(opened, memory, streamed)
    if verify:
        opened.verify_files()
        opened.verify(besides=packed_names(opened) if chosen.streamed else ())
    config = transformers.AutoConfig.from_pretrained(path)
    config.quantization_config |= {"verified": True, "streamed": chosen.streamed}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, config=config, dtype="auto" if dtype is None else dtype
    ).eval()
    model.streaming = None
    if chosen.streamed:
        from waterfill.streaming.attach import attach

        attach(model, opened, chosen.limit_bytes, verify=verify, logits=logits)
    return model


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
    return load_checkpoint_in(checkpoint, measuring_dtype(checkpoint.tensors.values()))


def load_checkpoint_in(checkpoint: Checkpoint, dtype: torch.dtype | None) -> Any:
    """The same in a dtype of the caller's, None for the checkpoint's own."""
    for tensor in checkpoint.tensors.values():
        if tensor.dtype in WEIGHT_DTYPES:
            check_finite(checkpoint.read(tensor.name), tensor.name, tensor.file)
    if dtype is None:
        _log.warning("%s is measured in its own dtype: a float32 copy would not fit in memory", checkpoint.path)
    return transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint.path, dtype=dtype or "auto", experts_implementation="eager"
    ).eval()


def measuring_dtype(tensors: Iterable[TensorInfo | TensorSpec]) -> torch.dtype | None:
    """float32, where a copy of a model of these tensors in it fits in memory; else None, for the model's own."""
    weights = sum(math.prod(tensor.shape) for tensor in tensors)
    return torch.float32 if 4 * weights <= FLOAT32_SHARE * process.free_bytes() else None
