"""Whether a packed model fits in memory, or has to be streamed from storage: decided from its headers alone."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from waterfill.base import process
from waterfill.base.dtypes import ITEM_BYTES
from waterfill.base.errors import MemoryLimitError
from waterfill.codecs import get_codec
from waterfill.files.artifact import Artifact, StoredTensor
from waterfill.planning.budget import parse_size

_log = logging.getLogger(__name__)

LOADING = 1.05  # of the weights: what loading takes beyond them
WORKING_BYTES = 150_000_000  # keys, values and activations of a short text, with torch
MOST_FREE_BYTES = 1 << 50  # where nothing is known
FREE_SHARE = 0.8  # of the free memory that a streamed model takes


@dataclass(frozen=True)
class Fit:
    """`limit_bytes` is what the process may take in all, `spare_bytes` what a model in memory leaves of that; `binding`
    if somebody said so."""

    streamed: bool
    limit_bytes: int
    spare_bytes: int
    binding: bool


def fit(
    artifact: Artifact,
    memory: str | float | None,
    streamed: bool | None = None,
    *,
    working_bytes: int = WORKING_BYTES,
    loading_bytes: int = 0,
) -> Fit:
    """How to run an artifact within `memory`, of the whole process, or within what is free when that is None.

    Args:
        streamed: decides by itself where it is given and something can be streamed: what is kept as it was, or coded
            losslessly, is always in memory.
        working_bytes: what a model takes beside its weights.
        loading_bytes: what loading all of it takes for a while.

    Raises:
        MemoryLimitError: neither all of the model fits in memory nor what cannot be streamed.
        WaterfillError: `memory` is not a size.
    """
    limit = memory_bytes(memory)
    free = process.free_bytes() if limit is None else limit - process.resident_bytes()
    needed = resident_size(artifact) + working_bytes
    streamable = bool(packed_names(artifact))
    if streamed and not streamable:
        _log.info("%s has no packed matrices, which alone can be streamed: all of it is held in memory", artifact.path)
    unchecked = streamed is False and limit is None  # the caller knows better than an estimate of what is free
    chosen = streamable and (needed + loading_bytes > free if streamed is None else streamed)
    kept = kept_size(artifact)
    if chosen and kept > max(
        free, working_bytes
    ):  # what is kept of most models is little: streaming says what it takes
        raise _too_large(artifact, kept + working_bytes, limit, "what is not packed cannot be streamed")
    if not chosen and not unchecked and needed + loading_bytes > free:
        why = "all of it is to be in memory" if streamable else "nothing of it is packed, and only that can be streamed"
        raise _too_large(artifact, needed + loading_bytes, limit, why)
    if chosen and streamed is None and limit is None:
        _log.warning(
            "the model takes %.1f GB of memory and %.1f GB are free: streaming its weights from storage",
            needed / 1e9,
            free / 1e9,
        )
    if limit is None:
        limit = int(process.resident_bytes() + FREE_SHARE * min(free, MOST_FREE_BYTES))
    return Fit(chosen, limit, max(0, int(min(free, MOST_FREE_BYTES)) - needed), memory is not None)


def memory_bytes(memory: str | float | None) -> int | None:
    """What was given as the memory of a process, in bytes.

    Raises:
        WaterfillError: it is not a size.
    """
    return None if memory is None else parse_size(memory)


def resident_size(artifact: Artifact) -> int:
    """Memory that all weights take in the form in which they are multiplied; about."""
    return int(LOADING * sum(map(_memory_bytes, artifact.tensors.values())))


def kept_size(artifact: Artifact) -> int:
    """Memory that tensors take which cannot be streamed."""
    return sum(_dense_bytes(tensor) for tensor in artifact.tensors.values() if not tensor.packed)


def packed_names(artifact: Artifact) -> frozenset[str]:
    """Tensors that are multiplied from their codes."""
    return frozenset(tensor.name for tensor in artifact.tensors.values() if tensor.packed)


def _memory_bytes(tensor: StoredTensor) -> int:
    if not tensor.packed:
        return _dense_bytes(tensor)
    rows, width = tensor.shape
    return get_codec(tensor.codec).memory_bytes((rows, width))


def _dense_bytes(tensor: StoredTensor) -> int:
    return math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]


def _too_large(artifact: Artifact, held_bytes: int, limit_bytes: int | None, why: str) -> MemoryLimitError:
    taken = process.resident_bytes()
    limit = taken + process.free_bytes() if limit_bytes is None else limit_bytes
    smallest = math.ceil((taken + held_bytes) / 1e6)
    return MemoryLimitError(
        f"{limit / 1e6:.0f} MB are too little for {artifact.path}: {why}, so that it takes {smallest} "
        "MB at least; give more",
        smallest_bytes=1_000_000 * smallest,
    )
