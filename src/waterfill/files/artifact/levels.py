"""An artifact that was packed at several rates, read at a lower one: fewer buffers of every matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from waterfill.base.errors import WaterfillError
from waterfill.codecs import get_codec
from waterfill.files.artifact.header import StoredTensor
from waterfill.files.artifact.reader import Artifact

ROUNDING = 0.005  # bits: a level is asked for by what was asked of it when it was packed


def levels_of(artifact: Artifact) -> int:
    """How many rates it can be read at."""
    return max(
        (get_codec(tensor.codec).level_count for tensor in artifact.tensors.values() if tensor.packed), default=1
    )


def lowered(tensor: StoredTensor, level: int | None) -> StoredTensor:
    """A tensor as it is read at a level, from 1 up; at the highest when None."""
    codec = get_codec(tensor.codec) if tensor.packed and level is not None else None
    if codec is None or level is None or level >= codec.level_count:
        return tensor
    rows, width = tensor.shape
    lower = codec.at(level)
    keys = lower.layout((rows, width)).keys()
    buffers = tuple(b for key, b in zip(tensor.keys, tensor.buffers, strict=True) if key in keys)
    return replace(tensor, codec=lower.name, buffers=buffers)


def at_level(artifact: Artifact, level: int) -> Artifact:
    """The artifact as it is read at a level."""
    return artifact.of({name: lowered(tensor, level) for name, tensor in artifact.tensors.items()})


def read_bytes_of(whole: Artifact, lower: Artifact) -> int:
    """Bytes of the weight files less those that a lower level leaves unread."""
    return whole.size_bytes - sum(
        tensor.size_bytes - lower.tensors[name].size_bytes for name, tensor in whole.tensors.items()
    )


def bits_of(tensors: Mapping[str, StoredTensor]) -> float:
    """Bits per weight of those that are packed."""
    packed = [tensor for tensor in tensors.values() if tensor.packed]
    return 8 * sum(tensor.size_bytes for tensor in packed) / max(1, sum(math.prod(tensor.shape) for tensor in packed))


def level_at(artifact: Artifact, rate: float | None) -> int:
    """The highest level of no more than `rate` bits per weight; the highest of all where None is asked for.

    Raises:
        WaterfillError: there is none, or the artifact has one rate only.
    """
    count = levels_of(artifact)
    if rate is None:
        return count
    bits = [bits_of(at_level(artifact, level).tensors) for level in range(1, count + 1)]
    rates = ", ".join(f"{each:.3g}" for each in bits)
    if count == 1:
        raise WaterfillError(
            f"rate is {rate:g}, and {artifact.path} has one only, {rates} bits per weight; leave rate out, or pack the "
            "model at several (--rates)"
        )
    fitting = [level for level, each in enumerate(bits, 1) if each <= rate + ROUNDING]
    if not fitting:
        raise WaterfillError(f"rate is {rate:g} bits per weight, and {artifact.path} has {rates}; ask for one of these")
    return fitting[-1]
