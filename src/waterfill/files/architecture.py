"""Decide which tensors of a model are matrices to be quantised, and read their rows wherever they lie.

    checkpoint ──► describe ──► Architecture: Matrix | Kept, in execution order
                                       │
                    read_rows(matrix, start, stop) · read_kept(kept)

The decision rests on shape and role, never on a list of model names. A matrix is the weight of an `nn.Linear`, `Conv1D`
or `nn.Embedding`, or one expert of a fused 3-D parameter whose module says how it is oriented. Everything else is
kept as it is: vectors, norms, biases, convolution kernels, router weights, buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from waterfill.base.errors import CheckpointError
from waterfill.files.checkpoint import Checkpoint, check_finite
from waterfill.files.experts import fused_experts
from waterfill.files.skeleton import ModelTensor, Part, build_skeleton, locate, shape_of, superfluous

# A smaller matrix saves fewer bytes than its scales and its entries in the artifact cost, give or take.
MIN_IN_FEATURES = 32
MIN_WEIGHTS = 1024

Role = Literal["linear", "embedding", "head", "expert"]

Kept: TypeAlias = ModelTensor
"""A tensor that stays as it is stored."""


@dataclass(frozen=True)
class RowRun:
    """A run of a matrix's rows as the checkpoint holds it: tensor `source`, or `source[expert]` where that is 3-D, from
    its row `start` on. It is `[rows, in]`, or `[in, rows]` where `transposed`."""

    source: str
    expert: int | None
    transposed: bool
    rows: int
    start: int = 0


@dataclass(frozen=True)
class Matrix:
    """A matrix `[out, in]` to be quantised. Its pieces hold its rows in order.

    `parameter` is its name in the model's state dict; `expert` its index there, where that parameter is 3-D;
    `transposed` whether the parameter holds it as `[in, out]`; `dtype` is the safetensors name of its weights' dtype.
    """

    name: str
    parameter: str
    expert: int | None
    transposed: bool
    shape: tuple[int, int]
    dtype: str
    role: Role
    pieces: tuple[RowRun, ...]

    @property
    def stored_shape(self) -> tuple[int, int]:
        """The matrix as the parameter holds it."""
        return (self.shape[1], self.shape[0]) if self.transposed else self.shape


@dataclass(frozen=True)
class Architecture:
    """Every tensor of the model once, in execution order; checkpoint tensors that the model does not use are `ignored`,
    of which transformers knows some as `superfluous`. Persistent buffers that the checkpoint lacks are `absent`.

    `tied_head`: the output head is the embedding, which is listed once, as the embedding.
    """

    tensors: tuple[Matrix | Kept, ...]
    tied_head: bool
    ignored: tuple[str, ...]
    superfluous: frozenset[str] = frozenset()
    absent: tuple[str, ...] = ()

    @cached_property
    def matrices(self) -> tuple[Matrix, ...]:
        return tuple(tensor for tensor in self.tensors if isinstance(tensor, Matrix))

    @cached_property
    def kept(self) -> tuple[Kept, ...]:
        return tuple(tensor for tensor in self.tensors if isinstance(tensor, Kept))


def describe(checkpoint: Checkpoint, keep: Sequence[str] = ()) -> Architecture:
    """Architecture of `checkpoint`. What matches one of the `keep` patterns (`fnmatch` globs on the name of a matrix or
    of its parameter) is kept; if one expert of a fused parameter matches, all of them are.

    Raises:
        CheckpointError: not a causal language model that transformers knows; a tensor is absent, or its shape, dtype or
            storage does not fit; or a pattern matches nothing.
    """
    model = build_skeleton(checkpoint)
    stored, ignored, absent = locate(model, checkpoint)
    roles = _roles(model)
    tensors: list[Matrix | Kept] = []
    unused = set(keep)
    for tensor in stored:
        matrices = _matrices(checkpoint, tensor, *roles[tensor.name]) if tensor.name in roles else []
        names = (tensor.name, *(matrix.name for matrix in matrices))
        matching = {pattern for pattern in keep if any(fnmatchcase(name, pattern) for name in names)}
        unused -= matching
        tensors.extend(matrices if matrices and not matching else [tensor])
    if unused:
        examples = ", ".join(tensor.name for tensor in tensors[:3])
        raise CheckpointError(
            f"the pattern {min(unused)!r} matches no tensor of {checkpoint.path}; give a glob on names such as "
            f"{examples}"
        )
    head = model.get_output_embeddings()
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    tied_head = head is not None and any(embedding.weight is head.weight for embedding in embeddings)
    return Architecture(tuple(tensors), tied_head, ignored, superfluous(model, ignored), absent)


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name, tied ones by each of theirs: `Matrix.parameter` is the one that the others are tied to, which
    need not be the first."""
    return dict(model.named_parameters(remove_duplicate=False))


def _roles(model: Any) -> dict[str, tuple[Role, bool]]:
    """Parameters that hold matrices, by state-dict name: their role, and whether they hold them as `[in, out]`."""
    head = model.get_output_embeddings()
    roles: dict[str, tuple[Role, bool]] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding | Conv1D):
            role: Role = "head" if module is head else "embedding" if isinstance(module, nn.Embedding) else "linear"
            roles[f"{path}.weight"] = role, isinstance(module, Conv1D)
        else:
            for name, transposed in fused_experts(module).items():
                roles[f"{path}.{name}"] = "expert", transposed
    return roles


def _matrices(checkpoint: Checkpoint, tensor: ModelTensor, role: Role, transposed: bool) -> list[Matrix]:
    """The matrices that a parameter consists of: one, or one per expert; none if they are too small to be worth it."""
    *_, rows, columns = tensor.shape
    shape = (columns, rows) if transposed else (rows, columns)
    if shape[1] < MIN_IN_FEATURES or rows * columns < MIN_WEIGHTS:
        return []
    if role != "expert":
        name = tensor.name.removesuffix(".weight")
        pieces = _pieces(checkpoint, tensor, tensor.sources[0], None, transposed)
        return [Matrix(name, tensor.name, None, transposed, shape, tensor.dtype, role, pieces)]
    fused = len(checkpoint.tensors[tensor.sources[0][0].source].shape) == len(tensor.shape)
    matrices = []
    for expert in range(tensor.shape[0]):
        sources, index = (tensor.sources[0], expert) if fused else (tensor.sources[expert], None)
        pieces = _pieces(checkpoint, tensor, sources, index, transposed)
        name = f"{tensor.name}.{expert}"
        matrices.append(Matrix(name, tensor.name, expert, transposed, shape, tensor.dtype, role, pieces))
    return matrices


def _pieces(
    checkpoint: Checkpoint, tensor: ModelTensor, parts: tuple[Part, ...], expert: int | None, transposed: bool
) -> tuple[RowRun, ...]:
    if (transposed or expert is not None) and not (len(parts) == 1 and parts[0].whole):
        source = parts[0].source
        raise CheckpointError(
            f"{checkpoint.tensors[source].file}: tensor {source!r} makes up {tensor.name!r} along an axis other "
            "than its rows; store the model in transformers' own layout, with "
            "save_pretrained(…, save_original_format=False)"
        )
    row_axis = -1 if transposed else -2
    return tuple(
        RowRun(part.source, expert, transposed, shape_of(checkpoint, part)[row_axis], part.start) for part in parts
    )


def read_rows(checkpoint: Checkpoint, matrix: Matrix, start: int, stop: int) -> torch.Tensor:
    """Rows `start` to `stop` of a matrix: `[stop - start, in]`, contiguous, in the checkpoint's dtype.

    Only these rows are read; where they are stored as columns, the pages that the columns touch.

    Raises:
        CheckpointError: the rows hold NaN or Inf.
        IndexError: the matrix has no such rows.
    """
    if not 0 <= start < stop <= matrix.shape[0]:
        raise IndexError(f"{matrix.name} has rows 0 to {matrix.shape[0]}, not {start} to {stop}")
    parts = []
    first = 0
    for piece in matrix.pieces:
        low, high = max(start - first, 0), min(stop - first, piece.rows)
        first += piece.rows
        if low >= high:
            continue
        rows = slice(piece.start + low, piece.start + high)
        index = (slice(None), rows) if piece.transposed else (rows,)
        part = checkpoint.read(piece.source, index if piece.expert is None else (piece.expert, *index))
        check_finite(part, piece.source, checkpoint.tensors[piece.source].file)
        parts.append(part.t() if piece.transposed else part)
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)


def read_kept(checkpoint: Checkpoint, kept: Kept, *, checked: bool = False) -> torch.Tensor:
    """A kept tensor in its own shape and dtype; one that was read and `checked` before is not again.

    Raises:
        CheckpointError: it holds NaN or Inf.
    """
    groups = []
    for group in kept.sources:
        parts = [checkpoint.read(part.source, ... if part.whole else slice(part.start, part.stop)) for part in group]
        for (source, *_), part in zip(group, parts, strict=True):
            if not checked:
                check_finite(part, source, checkpoint.tensors[source].file)
        groups.append(parts[0] if len(parts) == 1 else torch.cat(parts))
    return torch.stack(groups) if groups[0].ndim < len(kept.shape) else groups[0]
