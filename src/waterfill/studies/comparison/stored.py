"""What a method stores, to the byte: a weight file with all its buffers, header, and the tensors that it leaves alone.

All methods are charged the same way: one safetensors file with their own buffers. Formats that keep more beside them
(GGUF's metadata, padding and float32 norms) are not charged for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from waterfill.base.dtypes import ITEM_BYTES, TORCH_DTYPES
from waterfill.files.architecture import Architecture, Matrix, parameters_of
from waterfill.files.artifact import Buffer
from waterfill.planning.costs import matrix_view
from waterfill.studies.comparison.base import Candidate, Put, StudiedModel, Unavailable

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_NAMES |= dict.fromkeys((torch.int8, torch.float8_e4m3fn, torch.float8_e5m2), "U8")  # as large


@dataclass(frozen=True)
class QuantisedMatrix:
    """A matrix as a method gives it back, and the buffers that it takes, by their keys."""

    weight: Tensor  # float32 [out, in]
    buffers: Mapping[str, Buffer]

    @property
    def size_bytes(self) -> int:
        return sum(buffer.size_bytes for buffer in self.buffers.values())


def quantised(weight: Tensor, buffers: Mapping[str, Tensor | Buffer]) -> QuantisedMatrix:
    """A result from what a library keeps: tensors as they are, or descriptions of buffers that it would write."""
    described = {
        key: part if isinstance(part, Buffer) else Buffer(key, _NAMES[part.dtype], tuple(part.shape))
        for key, part in buffers.items()
    }
    return QuantisedMatrix(weight.detach().to(torch.float32), described)


Quantiser = Callable[[Tensor], QuantisedMatrix]
"""Takes a matrix, float32 [out, in]. Raises Unavailable for one that does not fit it."""


def run_quantiser(quantiser: Quantiser, subject: StudiedModel, put: Put) -> Candidate:
    """Every matrix through a quantiser of matrices; one that does not fit stays as it is, and the note says so."""
    parameters = parameters_of(subject.model)
    buffers: list[Buffer] = []
    payload = 0
    refused: dict[str, str] = {}
    for matrix in subject.architecture.matrices:
        weight = matrix_view(parameters[matrix.parameter].detach(), matrix).to(torch.float32).contiguous()
        try:
            result = quantiser(weight)
        except Unavailable as reason:
            refused[matrix.name] = str(reason)
            result = as_it_is(weight, matrix)
        put(matrix.name, result.weight)
        payload += result.size_bytes
        buffers += [Buffer(f"{matrix.name}.{key}", b.dtype, b.shape) for key, b in result.buffers.items()]
    if len(refused) == len(subject.architecture.matrices):
        raise Unavailable(next(iter(refused.values())))
    weights = sum(math.prod(matrix.shape) for matrix in subject.architecture.matrices)
    return Candidate(
        size_bytes=file_bytes([*kept_buffers(subject.architecture), *buffers]),
        bits=8 * payload / weights,
        note=_note(refused),
    )


def as_it_is(weight: Tensor, matrix: Matrix) -> QuantisedMatrix:
    """The matrix in the checkpoint's own dtype."""
    return QuantisedMatrix(weight, {"weight": Buffer("weight", matrix.dtype, matrix.shape)})


def _note(refused: Mapping[str, str]) -> str:
    if not refused:
        return ""
    name, reason = next(iter(refused.items()))
    others = f" and {len(refused) - 1} more" if len(refused) > 1 else ""
    return f"as they are: {name}{others} ({reason})"


def kept_buffers(architecture: Architecture) -> list[Buffer]:
    """The tensors that no method touches, in their own dtypes."""
    return [Buffer(kept.name, kept.dtype, kept.shape) for kept in architecture.kept]


def file_bytes(buffers: Iterable[Buffer]) -> int:
    """Size of the one safetensors file that holds these buffers."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for buffer in buffers:
        size = math.prod(buffer.shape) * ITEM_BYTES[buffer.dtype]
        header[buffer.name] = {
            "dtype": buffer.dtype, "shape": list(buffer.shape), "data_offsets": [offset, offset + size]
        }  # fmt: skip
        offset += size
    text = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-text // 8) * 8 + offset


def original_bytes(architecture: Architecture) -> int:
    """Bytes of the same tensors in the checkpoint's dtypes."""
    matrices = sum(math.prod(m.shape) * ITEM_BYTES[m.dtype] for m in architecture.matrices)
    return matrices + sum(buffer.size_bytes for buffer in kept_buffers(architecture))
