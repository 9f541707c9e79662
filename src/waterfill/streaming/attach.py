"""Gives a transformers model that was built without its packed matrices a streamer, within a limit of memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from tqdm.auto import tqdm

from waterfill.artifact import Artifact, StoredTensor
from waterfill.runtime.packed import PackedEmbedding, PackedExperts, PackedLinear, PackedMatrix, TiedLinear
from waterfill.streaming.chunks import StreamedMatrix
from waterfill.streaming.limit import OVERHEAD_BYTES, held_bytes, longest, pass_tokens, room
from waterfill.streaming.source import Source
from waterfill.streaming.storage import Storage
from waterfill.streaming.streamer import Streamer


def attach(model: Any, artifact: Artifact, limit_bytes: int, *, verify: bool, logits: int = 1) -> Streamer:
    """Stream every packed matrix of a model that was installed with `streamed`.

    Args:
        limit_bytes: of the process's resident memory, everything included.
        verify: compare the matrices with their digests first.
        logits: positions whose logits are computed at a time; more than one where text is scored.

    Raises:
        MemoryLimitError: the limit is below what the model needs at least.
        ArtifactError: a matrix is damaged.
    """
    modules = {name: module for name, module in model.named_modules() if isinstance(module, PackedMatrix)}
    storage = Storage()
    try:
        matrices = {
            path: StreamedMatrix(tensor, storage, verify=verify) for path, tensor in _tensors(modules, artifact)
        }
        left = room(
            artifact.path,
            matrices.values(),
            limit_bytes,
            held=held_bytes() + OVERHEAD_BYTES,
            token_bytes=_token_bytes(model),
            context=_context(model),
            logit_bytes=logits * _logit_bytes(model),
        )
        _limit_passes(model, left.pass_bytes)
        sequence, others = _order(model, modules, matrices)
        with tqdm(unit="B", unit_scale=True, desc="reading weights", delay=1, leave=False, disable=None) as bar:
            streamer = Streamer(
                storage,
                sequence,
                others,
                spare_bytes=left.weights_bytes,
                limit_bytes=limit_bytes - OVERHEAD_BYTES // 2,
                verify=verify,
                progress=partial(_show, bar),
            )
    except BaseException:
        storage.close()
        raise
    for path, module in modules.items():
        module.source = Source(streamer, matrices[path])
    model.streaming = streamer
    return streamer


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
    every = [matrices[p] for p, m in modules.items() if isinstance(m, PackedLinear) and p not in experts]
    tied = {id(m.matrix) for m in model.modules() if isinstance(m, TiedLinear)}
    every += [matrices[p] for p, m in modules.items() if isinstance(m, PackedEmbedding) and id(m) in tied]
    chosen = set(every)
    return every, [matrix for matrix in matrices.values() if matrix not in chosen]


def _context(model: Any) -> int | None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if positions is None else int(positions)


def _token_bytes(model: Any) -> int:
    """Keys and values of one token."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_hidden_layers * 2 * heads * head_dim * model.dtype.itemsize)


def _logit_bytes(model: Any) -> int:
    """Logits of one position: the model's, and a float32 copy that is sampled from."""
    itemsize: int = model.dtype.itemsize
    return int(model.config.get_text_config().vocab_size) * (4 + itemsize)


def _limit_passes(model: Any, size_bytes: int) -> None:
    """Have transformers read long prompts in pieces whose activations fit."""
    config = model.config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    tokens = pass_tokens(size_bytes, config.hidden_size, inner)
    if getattr(model, "generation_config", None) is not None and tokens < longest(_context(model)):
        model.generation_config.prefill_chunk_size = tokens
