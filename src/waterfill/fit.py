"""Whether a packed model fits in memory, or has to be streamed from storage: decided from its headers alone."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from waterfill import process
from waterfill.artifact import RAW, Artifact
from waterfill.artifact.format import ELEMENT_BYTES
from waterfill.budget import parse_size
from waterfill.codecs import LOSSLESS, Trellis, get_codec

_log = logging.getLogger(__name__)

LOADING = 1.05  # of the weights: what loading takes beyond them
WORKING_BYTES = 150_000_000  # keys, values and activations of a short text, with torch
MOST_FREE_BYTES = 1 << 50  # where nothing is known
FREE_SHARE = 0.8  # of the free memory that a streamed model takes


@dataclass(frozen=True)
class Fit:
    """`limit_bytes` is what the process may take in all, `spare_bytes` what a model in memory leaves of that."""

    streamed: bool
    limit_bytes: int
    spare_bytes: int


def fit(
    artifact: Artifact,
    memory: str | float | None,
    streamed: bool | None = None,
    *,
    working_bytes: int = WORKING_BYTES,
) -> Fit:
    """How to run an artifact within `memory`, of the whole process, or within what is free when that is None.

    `streamed` decides by itself where it is given; `working_bytes` is what a model takes beside its weights. Raises
    WaterfillError for a size that is none.
    """
    limit = None if memory is None else parse_size(memory)
    free = process.free_bytes() if limit is None else limit - process.resident_bytes()
    needed = resident_size(artifact) + working_bytes
    if streamed is None:
        streamed = needed > free
        if streamed and limit is None:
            _log.warning(
                "the model takes %.1f GB of memory and %.1f GB are free: streaming its weights from storage",
                needed / 1e9,
                free / 1e9,
            )
    streamed = streamed and bool(packed_names(artifact))  # nothing else can be
    if limit is None:
        limit = int(process.resident_bytes() + FREE_SHARE * min(free, MOST_FREE_BYTES))
    return Fit(streamed, limit, max(0, int(min(free, MOST_FREE_BYTES)) - needed))


def resident_size(artifact: Artifact) -> int:
    """Memory that all weights take in the form in which they are multiplied; about."""
    total = 0
    for tensor in artifact.tensors.values():
        codec = None if tensor.codec in (RAW, LOSSLESS) else get_codec(tensor.codec)
        if isinstance(codec, Trellis):
            total += math.prod(tensor.shape) * codec.levels.bits // 8
        elif codec is not None:
            total += tensor.size_bytes
        else:
            total += math.prod(tensor.shape) * ELEMENT_BYTES[tensor.dtype]
    return int(LOADING * total)


def packed_names(artifact: Artifact) -> frozenset[str]:
    """Tensors that are multiplied from their codes."""
    return frozenset(t.name for t in artifact.tensors.values() if t.codec not in (RAW, LOSSLESS))
