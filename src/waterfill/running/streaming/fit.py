"""The form that a packed model's weights have in memory, or that they are streamed: decided from its headers alone.

levels    decoded once, as they are multiplied: the quickest, one or two bytes per weight
codes     as they were stored, and decoded whenever they are multiplied
storage   not in memory, but for what there is room for: read and decoded whenever they are multiplied
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Literal

from waterfill.base import process
from waterfill.base.dtypes import ITEM_BYTES
from waterfill.base.errors import MemoryLimitError, WaterfillError
from waterfill.codecs import get_codec
from waterfill.files.artifact import Artifact, StoredTensor, at_level, bits_of, level_at
from waterfill.planning.budget import parse_size

_log = logging.getLogger(__name__)

Form = Literal["auto", "levels", "codes"]  # auto: the first of levels, codes, storage that fits

LOADING = 1.05  # of the weights: what loading takes beyond them
WORKING_BYTES = 150_000_000  # keys, values and activations of a short text, with torch
MOST_FREE_BYTES = 1 << 50  # where nothing is known
FREE_SHARE = 0.8  # of the free memory that a streamed model takes


@dataclass(frozen=True)
class Fit:
    """`limit_bytes` is what the process may take in all, `spare_bytes` what levels leave of that; `binding` if somebody
    said so.

    `streamed`: a `Streamer` multiplies, of codes in memory if these are to be there (`codes`; None: if they fit).
    """

    streamed: bool
    limit_bytes: int
    spare_bytes: int
    binding: bool
    codes: bool | None = False


def fit(
    artifact: Artifact,
    memory: str | float | None,
    streamed: bool | None = None,
    form: Form = "auto",
    *,
    working_bytes: int = WORKING_BYTES,
    loading_bytes: int = 0,
) -> Fit:
    """How to run an artifact within `memory`, of the whole process, or within what is free when that is None.

    Args:
        streamed: decides by itself where it is given and something can be streamed: what is kept as it was, or coded
            losslessly, is always in memory. True is from storage.
        form: of the weights in memory. Codes that are multiplied as they are have no other.
        working_bytes: what a model takes beside its weights.
        loading_bytes: what loading all of it takes for a while.

    Raises:
        MemoryLimitError: neither all of the model fits in memory nor what cannot be streamed.
        WaterfillError: `memory` is not a size, or the form is none that this artifact can have.
    """
    codes: bool | None = None if streamed is None else False
    if form != "auto":
        streamed = codes = _asked(artifact, streamed, form)
    limit = memory_bytes(memory)
    free = process.free_bytes() if limit is None else limit - process.resident_bytes()
    needed = resident_size(artifact) + working_bytes
    streamable = bool(packed_names(artifact))
    if streamed and not streamable:
        _log.info("%s has no packed matrices, which alone can be streamed: all of it is held in memory", artifact.path)
    unchecked = streamed is False and limit is None  # the caller knows better than an estimate of what is free
    chosen = streamable and (needed + loading_bytes > free if streamed is None else streamed)
    kept = kept_size(artifact)  # of most models little: streaming says what it takes
    if chosen and kept > max(free, working_bytes):
        raise _too_large(artifact, kept + working_bytes, limit, "what is not packed cannot be streamed")
    if not chosen and not unchecked and needed + loading_bytes > free:
        why = "all of it is to be in memory" if streamable else "nothing of it is packed, and only that can be streamed"
        raise _too_large(artifact, needed + loading_bytes, limit, why)
    if chosen and streamed is None and limit is None:
        _log.warning(
            "the model takes %.1f GB of memory and %.1f GB are free: its weights are decoded for every token",
            needed / 1e9,
            free / 1e9,
        )
    if limit is None:
        limit = int(process.resident_bytes() + FREE_SHARE * min(free, MOST_FREE_BYTES))
    return Fit(chosen, limit, max(0, int(min(free, MOST_FREE_BYTES)) - needed), memory is not None, codes)


def fitting_level(
    artifact: Artifact,
    rate: float | None,
    memory: str | float | None,
    streamed: bool | None,
    form: Form,
    *,
    working_bytes: int = WORKING_BYTES,
    loading_bytes: int = 0,
) -> int:
    """The level that an artifact is read at: that of a rate; without one the highest, or where a limit was given the
    highest whose levels fit, if any do. The other arguments are those of `fit`.

    Raises:
        WaterfillError: the artifact has no such rate.
    """
    top = level_at(artifact, rate)
    if rate is not None or memory is None or streamed is not None or form != "auto":
        return top
    limit = memory_bytes(memory)
    assert limit is not None
    free = limit - process.resident_bytes() - working_bytes - loading_bytes
    for level in range(top, 0, -1):
        lower = at_level(artifact, level)
        if resident_size(lower) <= free:
            if level < top:
                bits = f"{bits_of(lower.tensors):.3g} of {bits_of(artifact.tensors):.3g} bits per weight"
                _log.info("%s is read at %s, the most that fits; --rate asks for another rate", artifact.path, bits)
            return level
    return top


def _asked(artifact: Artifact, streamed: bool | None, form: Form) -> bool:
    """Whether somebody who asks for a form has the codes decoded whenever they are multiplied."""
    if streamed is not None:
        raise WaterfillError(
            f"streamed is {streamed} and memory_form is {form!r}, which both say where weights are; give one of them"
        )
    if form == "levels":
        return False
    if not packed_names(artifact):
        raise WaterfillError(
            f"{artifact.path} has no packed matrices, and what is losslessly coded is decoded when it is loaded; leave "
            "out memory_form"
        )
    if not decoded_names(artifact):
        _log.info("%s has codes of fixed rates, which are multiplied as they are in every form", artifact.path)
        return False
    return True


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


def decoded_names(artifact: Artifact) -> frozenset[str]:
    """Those of them whose codes are decoded to be multiplied."""
    codecs = {name: get_codec(artifact.tensors[name].codec) for name in packed_names(artifact)}
    return frozenset(name for name, codec in codecs.items() if codec.memory is not codec)


def levels_line(codes_bytes: int, levels_bytes: int) -> str:
    """One sentence for people, of weights that were decoded when they were loaded."""
    return (
        f"{levels_bytes / 1e6:.1f} MB of memory for the levels of coded weights, whose codes take "
        f"{codes_bytes / 1e6:.1f} MB (the memory form codes keeps these and is slower; --for memory packs models that "
        "run from their codes)"
    )


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
