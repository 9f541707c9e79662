"""Gives a model that was built without its packed matrices a streamer, within a limit on the process's memory.

limit = what the process holds already + keys and values of a context + activations of a pass + ring + kept weights
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from waterfill import process
from waterfill.artifact import Artifact, StoredTensor
from waterfill.errors import MemoryLimitError
from waterfill.runtime.packed import PackedEmbedding, PackedExperts, PackedLinear, PackedMatrix, TiedHead
from waterfill.streaming.chunks import StreamedMatrix
from waterfill.streaming.storage import Storage
from waterfill.streaming.streamer import SLOTS, Streamer

CONTEXT = 2048  # tokens that room is kept for, where the model takes so many and memory allows
LEAST_CONTEXT = 256
PASS_BYTES = 64 << 20  # of activations; longer prompts are read in several passes
LEAST_PASS_BYTES = 4 << 20
OVERHEAD_BYTES = 24 << 20  # what the interpreter and the C library take beyond what is counted

_log = logging.getLogger("waterfill.streaming")


@dataclass(frozen=True)
class _Source:
    """A matrix and who streams it: what a packed module multiplies with."""

    streamer: Streamer
    matrix: StreamedMatrix

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        return self.streamer.multiply(self.matrix, x)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return self.streamer.rows(self.matrix, ids)

    def dense(self) -> torch.Tensor:
        return self.streamer.dense(self.matrix)


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
        spare = _spare(model, artifact, matrices.values(), limit_bytes, logits)
        sequence, others = _order(model, modules, matrices)
        streamer = Streamer(
            storage,
            sequence,
            others,
            spare_bytes=spare,
            limit_bytes=limit_bytes - OVERHEAD_BYTES // 2,
            verify=verify,
        )
    except BaseException:
        storage.close()
        raise
    for path, module in modules.items():
        module.source = _Source(streamer, matrices[path])
    model.streaming = streamer
    return streamer


def _spare(model: Any, artifact: Artifact, matrices: Collection[StreamedMatrix], limit_bytes: int, logits: int) -> int:
    """Bytes that are left for weights. Part of what is there beyond the least goes to longer contexts and passes."""
    process.release()
    held = process.resident_bytes() + OVERHEAD_BYTES
    ring = SLOTS * max(chunk.region.size_bytes for matrix in matrices for chunk in matrix.chunks)
    per_token, most = _token_bytes(model), _context(model)
    context = min(LEAST_CONTEXT, most)
    least = held + ring + context * per_token + logits * _logit_bytes(model) + LEAST_PASS_BYTES
    spare = limit_bytes - least
    if spare < 0:
        smallest = math.ceil(least / 1e6)
        raise MemoryLimitError(
            f"{limit_bytes / 1e6:.0f} MB are too little for {artifact.path}: streamed, it takes {smallest} MB at least "
            f"({held / 1e6:.0f} MB of them the interpreter and what is kept, {context * per_token / 1e6:.0f} MB a "
            f"context of {context} tokens); give more",
            smallest_bytes=1_000_000 * smallest,
        )
    longer = min((most - context) * per_token, spare // 3)
    wider = min(PASS_BYTES - LEAST_PASS_BYTES, (spare - longer) // 4)
    _limit_passes(model, LEAST_PASS_BYTES + wider)
    return spare - longer - wider


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
    tied = {id(m._embedding[0]) for m in model.modules() if isinstance(m, TiedHead)}
    every += [matrices[p] for p, m in modules.items() if isinstance(m, PackedEmbedding) and id(m) in tied]
    chosen = set(every)
    return every, [matrix for matrix in matrices.values() if matrix not in chosen]


def _context(model: Any) -> int:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return CONTEXT if positions is None else min(CONTEXT, int(positions))


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
    per_token = 4 * (6 * config.hidden_size + 4 * inner)
    tokens = max(16, size_bytes // per_token)
    if getattr(model, "generation_config", None) is not None and tokens < _context(model):
        model.generation_config.prefill_chunk_size = tokens
