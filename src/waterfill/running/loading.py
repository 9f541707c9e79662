"""Models and tokenizers in memory: packed ones, and the checkpoints that they were packed from."""

from __future__ import annotations

import gc
import logging
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from waterfill.base import process
from waterfill.base.arguments import Check, checked
from waterfill.base.dtypes import ITEM_BYTES, TORCH_DTYPES, WEIGHT_DTYPES
from waterfill.base.errors import ArtifactError, MemoryLimitError, WaterfillError, first_line
from waterfill.base.reading import check_settings
from waterfill.files.artifact import Artifact, at_level, open_artifact
from waterfill.files.blockwise import load_blockwise
from waterfill.files.checkpoint import Checkpoint, warn_of_adapter
from waterfill.files.original import check_generation, fits, from_pretrained, load_original
from waterfill.running.hf.plugin import Caller, called_by
from waterfill.running.streaming.fit import Fit, Form, fit, fitting_level, kept_size, memory_bytes, packed_names
from waterfill.running.streaming.tuning import GIVEN, USUAL, Tuning

_log = logging.getLogger(__name__)

_DTYPE = Check("a torch dtype", lambda value: isinstance(value, torch.dtype))
LOADING_BYTES = 24 << 20  # what transformers takes beside files and model: its class, and for a moment at the end
IMPORT_BYTES = 72 << 20  # and beyond that when it loads the first one, ...
_IMPORTED = "transformers.modeling_utils"  # ... for this module and what it brings along
CUDA_BYTES = 96 << 20  # and beyond that with a torch that has CUDA, whose libraries are loaded then


@checked(dtype=_DTYPE, tuning=GIVEN)
def load(
    artifact: str | Path,
    *,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    memory: str | float | None = None,
    memory_form: Form = "auto",
    rate: float | None = None,
    streamed: bool | None = None,
    logits: int = 1,
    tuning: Tuning = USUAL,
) -> Any:
    """The packed model as a transformers model, ready for `generate` and pipelines; its weights stay packed.

    Entropy-coded weights are decoded as they are multiplied where their levels do not fit in memory: `model.streaming`
    is the `Streamer` then, else None. Where `memory` is given, `model.memory_limit` is the `Limit` that texts are held
    to, else None.

    Args:
        dtype: of the activations; the checkpoint's own when None.
        verify: compare every byte with its digest first.
        memory: what the process may take in all, in bytes or as "1GB"; as much as is free when None.
        memory_form: "levels" decodes once, which is the quickest; "codes" keeps in memory what is stored, and decodes
            for every token; "auto" takes the first that fits, and else streams from storage.
        rate: bits per weight to read at most, of an artifact that was packed at several rates; when None the highest,
            or the highest that fits into `memory`.
        streamed: whether to stream from storage; None streams what does not fit.
        logits: positions that logits are wanted of at a time, to reckon with where memory is short.
        tuning: sizes and times of streaming; other ones are for tests and benchmarks.

    Raises:
        ArtifactError: torn, altered or of an unknown version.
        MemoryLimitError: `memory` is too small for the model even when it is streamed, as far as it can be.
        WaterfillError: `memory` is not a size, or the artifact has no such form.
    """
    path = Path(artifact)
    whole = open_artifact(path, verify=False)
    level = fitting_level(whole, rate, memory, streamed, memory_form, loading_bytes=whole.size_bytes)
    opened = at_level(whole, level)
    chosen = fit(opened, memory, streamed, memory_form, loading_bytes=opened.size_bytes)  # files are mapped meanwhile
    if chosen.binding:
        process.return_large_blocks()
        _check_memory(path, kept_size(opened), chosen.limit_bytes)
    if verify:
        opened.verify_files()
        opened.verify(besides=packed_names(opened) if chosen.streamed else ())
    warn_of_adapter(path)
    try:
        return _load(opened, level, dtype, chosen, verify=verify, logits=logits, tuning=tuning)
    except MemoryLimitError:
        if chosen.streamed or streamed is not None or memory_form != "auto" or not packed_names(opened):
            raise
    gc.collect()  # what did not fit, before it is loaded again
    chosen = replace(fit(opened, memory, streamed=True), codes=None)
    return _load(opened, level, dtype, chosen, verify=False, logits=logits, tuning=tuning)


def _load(
    opened: Artifact,
    level: int,
    dtype: torch.dtype | None,
    chosen: Fit,
    *,
    verify: bool,
    logits: int,
    tuning: Tuning,
) -> Any:
    with called_by(Caller(verified=True, streamed=chosen.streamed, level=level)):
        model = _packed_model(opened.path, dtype, tensors=len(opened.tensors))
    model.streaming = model.memory_limit = None
    if chosen.streamed:
        from waterfill.running.hf.attach import attach

        attach(model, opened, chosen, verify=verify, logits=logits, tuning=tuning)
    elif chosen.binding:
        from waterfill.running.hf.attach import hold

        hold(model, opened.path, chosen, logits=logits, tuning=tuning)
    return model


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
        model, loading = from_pretrained(path, config=config, dtype="auto" if dtype is None else dtype)
    except WaterfillError:
        raise
    except Exception as error:  # what its classes raise at a config.json or shapes that they do not expect
        raise ArtifactError(
            f"transformers cannot load {path} ({first_line(error)}); fetch the artifact again, or pack again"
        ) from error
    if missing := sorted(loading["missing_keys"]):
        raise ArtifactError(
            f"{path} has nothing for {missing[0]!r}, one of {len(missing)} tensors that the model of its config.json "
            "has; fetch the artifact again, or pack again"
        )
    return model


def load_checkpoint_in(
    checkpoint: Checkpoint, dtype: torch.dtype | None, *, memory: str | float | None = None, logits: int = 1
) -> Any:
    """The original model in a dtype, None for its own, held below a limit where one is given. Where there is none, and
    it is larger than what memory is free, its weights are read block by block as they are needed.

    Args:
        memory, logits: as of `load`.

    Raises:
        MemoryLimitError: `memory` is too little.
    """
    limit = memory_bytes(memory)
    if limit is None and not fits(checkpoint):
        _log.info(
            "%s is larger than the memory that is free: its weights are read block by block, again for every pass "
            "(a larger --batch reads them less often)",
            checkpoint.path,
        )
        return load_blockwise(checkpoint, dtype or _widest(checkpoint))
    if limit is not None:
        process.return_large_blocks()
        _check_memory(checkpoint.path, _loading_bytes(checkpoint, dtype), limit)
    model = load_original(checkpoint, dtype)
    if limit is not None:
        from waterfill.running.hf.attach import hold

        hold(model, checkpoint.path, Fit(streamed=False, limit_bytes=limit, spare_bytes=0, binding=True), logits=logits)
    return model


def _widest(checkpoint: Checkpoint) -> torch.dtype:
    """Of the dtypes that its weights are stored in."""
    stored = [tensor.dtype for tensor in checkpoint.tensors.values() if tensor.dtype in WEIGHT_DTYPES]
    return TORCH_DTYPES[max(stored, key=lambda name: ITEM_BYTES[name], default="F32")]


def _loading_bytes(checkpoint: Checkpoint, dtype: torch.dtype | None) -> int:
    """Of a model in a dtype, and of its files, which are mapped meanwhile."""
    total = 0.0
    for tensor in checkpoint.tensors.values():
        converted = dtype is not None and tensor.dtype in WEIGHT_DTYPES
        wider = dtype.itemsize / ITEM_BYTES[tensor.dtype] if dtype is not None and converted else 1
        total += (1 + wider) * tensor.size_bytes
    return math.ceil(total)


def _check_memory(path: Path, weights_bytes: int, limit_bytes: int) -> None:
    """Raises MemoryLimitError, before anything is loaded, where weights that have to be in memory do not fit."""
    process.release()
    needed = process.resident_bytes() + weights_bytes + LOADING_BYTES
    if _IMPORTED not in sys.modules:
        needed += IMPORT_BYTES + (CUDA_BYTES if torch.version.cuda else 0)
    if needed > limit_bytes:
        smallest = math.ceil(needed / 1e6)
        raise MemoryLimitError(
            f"{limit_bytes / 1e6:.0f} MB are too little for {path}: loading it takes {smallest} MB at least; give more",
            smallest_bytes=1_000_000 * smallest,
        )
