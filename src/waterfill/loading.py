"""Models and tokenizers in memory: packed ones, and the checkpoints that they were packed from."""

from __future__ import annotations

import gc
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

from waterfill import process
from waterfill.arguments import Check, checked
from waterfill.artifact import Artifact, TensorSpec, open_artifact
from waterfill.checkpoint import ADAPTER, WEIGHT_DTYPES, Checkpoint, TensorInfo, check_finite, warn_of_adapter
from waterfill.choices import FILE, check_choices
from waterfill.errors import ArtifactError, MemoryLimitError, WaterfillError, first_line
from waterfill.files import check_settings
from waterfill.fit import Fit, fit, kept_size, memory_bytes, packed_names
from waterfill.hf import Caller, called_by
from waterfill.pack import PLAN_FILE
from waterfill.plan import Plan
from waterfill.tokenizing import check_growth, in_words

_log = logging.getLogger(__name__)

_DTYPE = Check("a torch dtype", lambda value: isinstance(value, torch.dtype))
LOADING_BYTES = 72 << 20  # what transformers takes beside files and model while it loads them
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

    A model that does not fit in memory is streamed: `model.streaming` is the `Streamer` then, else None. Where `memory`
    is given, `model.memory_limit` is the `Limit` that texts are held to, else None.

    Args:
        dtype: of the activations; the checkpoint's own when None.
        verify: compare every byte with its digest first.
        memory: what the process may take in all, in bytes or as "1GB"; as much as is free when None.
        streamed: whether to stream; None streams what does not fit.
        logits: positions that logits are wanted of at a time, to reckon with where memory is short.

    Raises:
        ArtifactError: torn, altered or of an unknown version.
        MemoryLimitError: `memory` is too small for the model even when it is streamed, as far as it can be.
        WaterfillError: `memory` is not a size.
    """
    path = Path(artifact)
    opened = open_artifact(path, verify=False)
    chosen = fit(opened, memory, streamed, loading_bytes=opened.size_bytes)  # files are mapped meanwhile
    if chosen.binding:
        process.return_large_blocks()
        _check_room(path, kept_size(opened), chosen.limit_bytes)
    if verify:
        opened.verify_files()
        opened.verify(besides=packed_names(opened) if chosen.streamed else ())
    warn_of_adapter(path)
    try:
        return _load(opened, dtype, chosen, verify=verify, logits=logits)
    except MemoryLimitError:
        if chosen.streamed or streamed is not None or not packed_names(opened):
            raise
    gc.collect()  # what did not fit, before it is loaded again
    return _load(opened, dtype, fit(opened, memory, streamed=True), verify=False, logits=logits)


def _load(opened: Artifact, dtype: torch.dtype | None, chosen: Fit, *, verify: bool, logits: int) -> Any:
    with called_by(Caller(verified=True, streamed=chosen.streamed)):
        model = _packed_model(opened.path, dtype, tensors=len(opened.tensors))
    model.streaming = model.memory_limit = None
    if chosen.streamed:
        from waterfill.streaming.attach import attach

        attach(model, opened, chosen, verify=verify, logits=logits)
    elif chosen.binding:
        from waterfill.streaming.attach import hold

        hold(model, opened.path, chosen, logits=logits)
    return model


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
    model, _ = _from_pretrained(path, **options)
    return model


def _from_pretrained(path: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The model, and what transformers says of loading it."""
    nowhere = {"subfolder": os.devnull}  # where transformers looks for adapters; below a file there are none
    if peft.is_peft_available() and find_adapter_config_file(str(path), **nowhere) is not None:  # before 5.24 elsewhere
        raise WaterfillError(
            f"transformers {transformers.__version__} would add the adapter beside the model in {path} to it; move "
            f"{ADAPTER} to another directory, or update transformers"
        )
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        path, adapter_kwargs=nowhere, trust_remote_code=False, output_loading_info=True, **options
    )
    return model.eval(), found


def _packed_model(path: Path, dtype: torch.dtype | None, *, tensors: int) -> Any:
    """Raises ArtifactError for whatever transformers finds wrong, and for weights that it would make up."""
    try:
        check_settings(path)
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        check_generation(path, config)
        layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
        if layers > tensors:  # building them would not end
            raise ArtifactError(
                f"{path} has {tensors} tensors, which cannot be those of the {layers} layers of its config.json; fetch "
                "the artifact again, or pack again"
            )
        model, found = _from_pretrained(path, config=config, dtype="auto" if dtype is None else dtype)
    except WaterfillError:
        raise
    except Exception as error:  # what its classes raise at a config.json or shapes that they do not expect
        raise ArtifactError(
            f"transformers cannot load {path} ({first_line(error)}); fetch the artifact again, or pack again"
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise ArtifactError(
            f"{path} has nothing for {missing[0]!r}, one of {len(missing)} tensors that the model of its config.json "
            "has; fetch the artifact again, or pack again"
        )
    return model


def load_tokenizer(path: Path) -> Any:
    """The tokenizer in the directory of a checkpoint or artifact. Code that comes with it is never run.

    Raises WaterfillError if there is none, or none without code of its own.
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


def load_checkpoint_in(
    checkpoint: Checkpoint, dtype: torch.dtype | None, *, memory: str | float | None = None, logits: int = 1
) -> Any:
    """The same in a dtype of the caller's, None for the checkpoint's own, held below a limit where one is given.

    Raises MemoryLimitError where `memory`, what the process may take in all, is too little; `logits` as of `load`.
    """
    limit = memory_bytes(memory)
    if limit is not None:
        process.return_large_blocks()
        _check_room(checkpoint.path, _loading_bytes(checkpoint, dtype), limit)
    for tensor in checkpoint.tensors.values():
        if tensor.dtype in WEIGHT_DTYPES:
            check_finite(checkpoint.read(tensor.name), tensor.name, tensor.file)
    if dtype is None:
        _log.warning("%s is measured in its own dtype: a float32 copy would not fit in memory", checkpoint.path)
    model = model_of(checkpoint.path, dtype=dtype or "auto", experts_implementation="eager")
    if limit is not None:
        from waterfill.streaming.attach import hold

        hold(model, checkpoint.path, Fit(streamed=False, limit_bytes=limit, spare_bytes=0, binding=True), logits=logits)
    return model


def _loading_bytes(checkpoint: Checkpoint, dtype: torch.dtype | None) -> int:
    """Of a model in a dtype, and of its files, which are mapped meanwhile."""
    total = 0.0
    for tensor in checkpoint.tensors.values():
        own = WEIGHT_DTYPES.get(tensor.dtype)
        wider = 1 if dtype is None or own is None else dtype.itemsize / own.itemsize
        total += (1 + wider) * tensor.size_bytes
    return math.ceil(total)


def _check_room(path: Path, weights_bytes: int, limit_bytes: int) -> None:
    """Raises MemoryLimitError, before anything is loaded, where weights that have to be in memory do not fit."""
    process.release()
    needed = process.resident_bytes() + LOADING_BYTES + weights_bytes
    if needed > limit_bytes:
        smallest = math.ceil(needed / 1e6)
        raise MemoryLimitError(
            f"{limit_bytes / 1e6:.0f} MB are too little for {path}: loading it takes {smallest} MB at least; give more",
            smallest_bytes=1_000_000 * smallest,
        )


def measuring_dtype(tensors: Iterable[TensorInfo | TensorSpec]) -> torch.dtype | None:
    """float32, where a copy of a model of these tensors in it fits in memory; else None, for the model's own."""
    weights = sum(math.prod(tensor.shape) for tensor in tensors)
    return torch.float32 if 4 * weights <= FLOAT32_SHARE * process.free_bytes() else None
