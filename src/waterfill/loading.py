"""Models and tokenizers in memory: packed ones, and the checkpoints that they were packed from."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch
import transformers

from waterfill import process
from waterfill.artifact import RAW, Artifact, open_artifact
from waterfill.artifact.format import ELEMENT_BYTES
from waterfill.budget import parse_size
from waterfill.checkpoint import WEIGHT_DTYPES, Checkpoint, check_finite
from waterfill.codecs import LOSSLESS, Trellis, get_codec
from waterfill.errors import ArtifactError, WaterfillError
from waterfill.pack import PLAN_FILE
from waterfill.plan import Plan

_log = logging.getLogger(__name__)

LOADING = 1.05  # of the weights: what loading takes beyond them
WORKING_BYTES = 150_000_000  # keys, values and activations of a short text
MOST_FREE_BYTES = 1 << 50  # where nothing is known
FREE_SHARE = 0.8  # of the free memory that a streamed model takes
FLOAT32_SHARE = 0.4  # of the free memory that a float32 copy of the model may take; else it keeps its own dtype


def load(
    artifact: str | Path,
    *,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    memory: str | int | None = None,
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
    limit = None if memory is None else memory if isinstance(memory, int) else parse_size(memory)
    opened = open_artifact(path, verify=False)
    free = process.free_bytes() if limit is None else limit - process.resident_bytes()
    if streamed is None:
        needed = resident_size(opened)
        streamed = needed > free
        if streamed and limit is None:
            _log.warning(
                "the model takes %.1f GB of memory and %.1f GB are free: streaming its weights from storage",
                needed / 1e9,
                free / 1e9,
            )
    if limit is None:
        limit = int(process.resident_bytes() + FREE_SHARE * min(free, MOST_FREE_BYTES))
    if verify:
        opened.verify_files()
        opened.verify(besides=packed_names(opened) if streamed else ())
    config = transformers.AutoConfig.from_pretrained(path)
    config.quantization_config |= {"verified": True, "streamed": streamed}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, config=config, dtype="auto" if dtype is None else dtype
    ).eval()
    model.streaming = None
    if streamed:
        from waterfill.streaming.attach import attach

        attach(model, opened, limit, verify=verify, logits=logits)
    return model


def resident_size(artifact: Artifact) -> int:
    """Memory that a model takes when all of its weights are in it, in the form in which they are multiplied; about."""
    total = 0
    for tensor in artifact.tensors.values():
        codec = None if tensor.codec in (RAW, LOSSLESS) else get_codec(tensor.codec)
        if isinstance(codec, Trellis):
            total += math.prod(tensor.shape) * codec.levels.bits // 8
        elif codec is not None:
            total += tensor.size_bytes
        else:
            total += math.prod(tensor.shape) * ELEMENT_BYTES[tensor.dtype]
    return int(LOADING * total) + WORKING_BYTES


def packed_names(artifact: Artifact) -> frozenset[str]:
    """Tensors that are multiplied from their codes."""
    return frozenset(t.name for t in artifact.tensors.values() if t.codec not in (RAW, LOSSLESS))


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
    return torch.float32 if 4 * weights <= FLOAT32_SHARE * process.free_bytes() else None
