"""Gives a transformers model that was built without its packed matrices a streamer, within a limit of memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from waterfill import kernels
from waterfill.base import native
from waterfill.files.artifact import Artifact, StoredTensor
from waterfill.files.context import context_length
from waterfill.running.hf.experts import PackedExperts
from waterfill.running.hf.packed import PackedConv1D, PackedEmbedding, PackedLinear, PackedMatrix, TiedLinear
from waterfill.running.hf.source import StreamedSource
from waterfill.running.hf.trial import Blank, Trial, try_passes
from waterfill.running.streaming.chunks import StreamedMatrix
from waterfill.running.streaming.fit import Fit
from waterfill.running.streaming.limit import LEAST_CONTEXT, LEAST_PASS, OVERHEAD_BYTES, Limit
from waterfill.running.streaming.storage import Storage
from waterfill.running.streaming.streamer import Streamer
from waterfill.running.streaming.tuning import USUAL, Tuning
from waterfill.running.streaming.within import open_streamer

LONGEST = 1 << 17  # tokens of a prompt, unless `runtime.generate` is told how many there are


def attach(
    model: Any, artifact: Artifact, chosen: Fit, *, verify: bool, logits: int = 1, tuning: Tuning = USUAL
) -> Streamer:
    """Stream every packed matrix of a model that was installed with `streamed`, within a limit.

    Args:
        chosen: what the process may take, and whether codes are to be in memory.
        verify: compare the matrices with their digests first.
        logits: positions whose logits are computed at a time; more than one where text is scored.
        tuning: sizes and times of streaming.

    Raises:
        MemoryLimitError: the limit is below what the model needs at least.
        ArtifactError: a matrix is damaged.
    """
    modules = {name: module for name, module in model.named_modules() if isinstance(module, PackedMatrix)}
    for module in modules.values():
        module.source = Blank(module.shape)
    kernels.set_up()
    trial = try_passes(model)
    storage = Storage()
    try:
        matrices = {path: tuning.matrix(tensor, storage, verify=verify) for path, tensor in _tensors(modules, artifact)}
        sequence, others = _order(model, modules, matrices)
        with tqdm(unit="B", unit_scale=True, desc="reading weights", delay=1, leave=False, disable=None) as bar:
            streamer = open_streamer(
                artifact.path,
                storage,
                sequence,
                others,
                chosen,
                trial.working,
                overhead_bytes=OVERHEAD_BYTES,
                context=context_length(model.config),
                logits=logits,
                verify=verify,
                progress=partial(_show, bar),
                tuning=tuning,
            )
    except BaseException:
        storage.close()
        raise
    for path, module in modules.items():
        matrix = matrices[path]
        module.source = StreamedSource(
            streamer, matrix, power=module.exponent - matrix.exponent
        )  # models may have scaled it
    model.streaming = streamer
    _hold(model, artifact.path, chosen, trial, streamer, tuning.pass_bytes)
    return streamer


def hold(model: Any, path: Path, chosen: Fit, *, logits: int = 1, tuning: Tuning = USUAL) -> None:
    """Hold a model of a directory, whose weights are all in memory, below a limit, as `attach` does.

    Raises:
        MemoryLimitError: it is below what the model needs at least.
    """
    _hold(model, path, chosen, try_passes(model), None, tuning.pass_bytes)
    tokens = max(logits, min(LEAST_CONTEXT, context_length(model.config) or LEAST_CONTEXT))
    model.memory_limit.admit(tokens, tokens, logits=logits)


def _hold(model: Any, path: Path, chosen: Fit, trial: Trial, streamer: Streamer | None, pass_bytes: int) -> None:
    """Look at every pass before it begins, and have transformers read long prompts in pieces whose activations fit."""
    limit = model.memory_limit = Limit(
        path,
        chosen.limit_bytes,
        trial.working,
        overhead_bytes=OVERHEAD_BYTES,
        streamer=streamer,
        binding=chosen.binding,
        pieces=trial.pieces,
        pass_bytes=pass_bytes,
    )
    model.register_forward_pre_hook(partial(_begin_pass, limit), with_kwargs=True)
    model.register_forward_hook(_end_pass, with_kwargs=True)
    if trial.pieces and getattr(model, "generation_config", None) is not None:
        model.generation_config.prefill_chunk_size = limit.widest(LONGEST, LONGEST)


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """What a model's forward is called with, `[batch, tokens, …]`."""
    named = (kwargs.get(name) for name in ("input_ids", "inputs_embeds"))
    inputs: torch.Tensor = next(tensor for tensor in (*args[:1], *named, torch.empty(0, 0)) if tensor is not None)
    return inputs


def _end_pass(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> None:
    """A hook behind a model's forward: the working memory of a wide pass is not needed by the next ones."""
    library = native.library()
    if library is not None and _inputs(args, kwargs).shape[:2].numel() > LEAST_PASS:
        library.release_memory()


def _begin_pass(limit: Limit, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A hook before a model's forward."""
    inputs = _inputs(args, kwargs)
    tokens, mask, kept = inputs.shape[:2].numel(), kwargs.get("attention_mask"), kwargs.get("logits_to_keep", 0)
    context = mask.shape[-1] if isinstance(mask, torch.Tensor) else inputs.shape[1]
    logits = (
        kept if isinstance(kept, int) and kept else len(kept) if isinstance(kept, torch.Tensor) else inputs.shape[1]
    )
    growth = limit.working.text_bytes(tokens)
    limit.begin_pass(tokens, context, logits=inputs.shape[0] * logits, growth_bytes=growth, whole=True)


def _show(bar: Any, done_bytes: int, total_bytes: int) -> None:
    bar.total = total_bytes
    bar.update(done_bytes - bar.n)


def _tensors(modules: dict[str, PackedMatrix], artifact: Artifact) -> Sequence[tuple[str, StoredTensor]]:
    """(path of a module, its tensor): an expert's tensor has its module's own name, others end in `.weight`."""
    by_name = {name.removesuffix(".weight"): tensor for name, tensor in artifact.tensors.items()}
    return [(path, by_name[path]) for path in modules]


def _order(
    model: Any, modules: dict[str, PackedMatrix], matrices: dict[str, StreamedMatrix]
) -> tuple[list[StreamedMatrix], list[StreamedMatrix]]:
    """Matrices that every pass multiplies, in about the order in which it does, and the others."""
    experts = {
        f"{path}.{index}"
        for path, module in model.named_modules()
        if isinstance(module, PackedExperts)
        for index in range(len(module))
    }
    every = [matrices[p] for p, m in modules.items() if isinstance(m, PackedLinear | PackedConv1D) and p not in experts]
    tied = {id(m.matrix) for m in model.modules() if isinstance(m, TiedLinear)}
    every += [matrices[p] for p, m in modules.items() if isinstance(m, PackedEmbedding) and id(m) in tied]
    chosen = set(every)
    return every, [matrix for matrix in matrices.values() if matrix not in chosen]
