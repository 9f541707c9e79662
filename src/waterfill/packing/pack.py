"""Carry out a plan: read rows, encode, write, tensor by tensor.

    plan + checkpoint ──rows──► codec ──buffers──► ArtifactWriter ──► OUT

Memory holds one block of rows, not a tensor and never the model. An interrupted run is continued by the next one, and
ends with the same bytes.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from waterfill.base.errors import WaterfillError
from waterfill.base.progress import Progress
from waterfill.codecs import LOSSLESS, contract, get_codec, scale_exponent
from waterfill.codecs.feedback import Feedback
from waterfill.files.architecture import Architecture, Kept, Matrix, read_kept, read_rows
from waterfill.files.artifact import FORMAT_VERSION, RAW, ArtifactWriter, is_file_name, lay_out
from waterfill.files.artifact.format import quote
from waterfill.files.checkpoint import QUANT_METHOD, Checkpoint
from waterfill.packing.kept import write_coded
from waterfill.planning.plan import PLAN_FILE, KeptPlan, Plan, TensorPlan

_log = logging.getLogger(__name__)


FeedbackOf = Callable[[str], Feedback | None]
"""By the name of a matrix."""
MARK = {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION}  # in config.json, what transformers goes by


def pack_plan(
    plan: Plan,
    checkpoint: Checkpoint,
    architecture: Architecture,
    out: Path,
    *,
    overwrite: bool = False,
    extra: Mapping[str, bytes] | None = None,
    feedback: FeedbackOf | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the artifact of `plan` to `out`.

    Args:
        feedback: of every matrix that the plan has some for.
        extra: further files of the artifact, by name.
        progress: called at first and after every block of rows with (tensor name, weights done, weights in all); kept
            tensors count where they are coded.

    Raises:
        WaterfillError: the plan was made for other weights.
        CheckpointError: a weight is NaN or infinite, or a file changed.
        ArtifactError: `out` exists, or cannot be written.
    """
    if plan.fingerprint != checkpoint.fingerprint:
        raise WaterfillError(
            f"the plan was made for other weights (fingerprint {plan.fingerprint}) than {checkpoint.path} holds "
            f"({checkpoint.fingerprint}); make a new plan"
        )
    if plan.calibration is not None and feedback is None:
        raise WaterfillError("the plan has error feedback, which needs the moments that it was calibrated with")
    _check_tensors(plan, architecture)
    layout = lay_out(plan.specs(), shard_bytes=plan.shard_bytes)
    if layout.size_bytes != plan.size_bytes:
        raise WaterfillError(
            f"the plan promises {plan.size_bytes:,} bytes where this version would write {layout.size_bytes:,}; "
            "make a new plan"
        )
    matrices = {matrix.name: matrix for matrix in architecture.matrices}
    kept = {tensor.name: tensor for tensor in architecture.kept}
    planned = {tensor.spec().name: tensor for tensor in plan.tensors}
    kept_plans = {tensor.name: tensor for tensor in plan.kept}
    weights = {name: tensor.weights for name, tensor in planned.items()}
    weights |= {t.name: math.prod(t.shape) for t in plan.kept if t.codec == LOSSLESS}
    total = sum(weights.values())
    with ArtifactWriter(out, layout, plan.identity, overwrite=overwrite) as writer:
        pending = writer.pending()
        done = total - sum(weights.get(spec.name, 0) for spec in pending)
        if progress and pending:
            progress(pending[0].name, done, total)
        for spec in pending:
            if spec.name not in planned:
                steps = _write_kept(writer, checkpoint, kept_plans[spec.name], kept[spec.name])
            else:
                tensor = planned[spec.name]
                steps = _write_matrix(writer, checkpoint, tensor, matrices[tensor.name], feedback)
            for step in steps:
                done += step
                if progress:
                    progress(spec.name, done, total)
        return writer.publish({**_model_files(checkpoint), PLAN_FILE: plan.to_json().encode(), **(extra or {})})


def _check_tensors(plan: Plan, architecture: Architecture) -> None:
    """A plan has to have the model's tensors, all of them, and in the model's order."""
    fields = ("name", "shape", "dtype")
    of_matrix = (*fields, "role", "parameter", "stored_shape")
    for planned, present, names in (
        (plan.tensors, architecture.matrices, of_matrix),
        (plan.kept, architecture.kept, fields),
    ):
        for mine, its in zip_longest(planned, present):
            pair = [None if tensor is None else [getattr(tensor, name) for name in names] for tensor in (mine, its)]
            if pair[0] != pair[1]:
                raise WaterfillError(
                    f"the plan has {_described(pair[0])} where the model has {_described(pair[1])}; make a new plan"
                )


def _described(fields: list[Any] | None) -> str:
    return "no tensor" if fields is None else f"{quote(fields[0])} ({', '.join(map(str, fields[1:]))})"


def _write_matrix(
    writer: ArtifactWriter, checkpoint: Checkpoint, tensor: TensorPlan, matrix: Matrix, feedback: FeedbackOf | None
) -> Iterator[int]:
    """Yields the weights of each block when it has been written."""
    if tensor.codec == RAW:
        yield from _write_raw(writer, checkpoint, tensor, matrix)
        return
    if tensor.codec == LOSSLESS:
        yield from write_coded(writer, checkpoint, matrix, tensor.parameter, tensor.size_bytes)
        writer.complete(tensor.parameter)
        return
    codec = get_codec(tensor.codec)
    largest = max(float(block.abs().max()) for _, block in _blocks(checkpoint, matrix))
    exponent = scale_exponent(largest)
    errors = None if feedback is None or tensor.feedback is None else feedback(tensor.name)
    encoder = codec.encoder(tensor.shape, exponent=exponent, rho=tensor.rho, feedback=errors)
    for _, block in _blocks(checkpoint, matrix, encoder.block_rows):
        for piece in encoder.add(block):
            writer.write(f"{tensor.name}.{piece.key}", piece.offset_bytes, piece.data)
        yield block.numel()
    for piece in encoder.finish():
        writer.write(f"{tensor.name}.{piece.key}", piece.offset_bytes, piece.data)
    writer.complete(tensor.name, exponent=exponent, t2=encoder.noise_power / encoder.power if encoder.power else 0.0)


def _write_raw(writer: ArtifactWriter, checkpoint: Checkpoint, tensor: TensorPlan, matrix: Matrix) -> Iterator[int]:
    if matrix.transposed:  # rows are columns of what is stored: all at once
        rows = torch.cat([block for _, block in _blocks(checkpoint, matrix)])
        writer.write(tensor.parameter, 0, rows.T)
        yield rows.numel()
    else:
        for start, block in _blocks(checkpoint, matrix):
            writer.write(tensor.parameter, start * block[0].nbytes, block)
            yield block.numel()
    writer.complete(tensor.parameter)


def _blocks(checkpoint: Checkpoint, matrix: Matrix, step: int = 0) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, `[rows, in]`) in order; the same blocks every time, so that a resumed run computes the same."""
    step = step or max(1, contract.BLOCK_WEIGHTS // matrix.shape[1])
    for start in range(0, matrix.shape[0], step):
        yield start, read_rows(checkpoint, matrix, start, min(start + step, matrix.shape[0]))


def _write_kept(writer: ArtifactWriter, checkpoint: Checkpoint, tensor: KeptPlan, kept: Kept) -> Iterator[int]:
    """Yields as `_write_matrix` does, but nothing for a raw tensor."""
    if tensor.codec == LOSSLESS:
        yield from write_coded(writer, checkpoint, kept, tensor.name, tensor.size_bytes)
    else:
        writer.write(kept.name, 0, read_kept(checkpoint, kept).contiguous())
    writer.complete(kept.name)


def _model_files(checkpoint: Checkpoint) -> dict[str, bytes | Path]:
    """config.json with the mark of a packed model, and everything else that makes a directory a model."""
    config = json.dumps({**checkpoint.config, "quantization_config": MARK}, indent=2) + "\n"
    files: dict[str, bytes | Path] = {"config.json": config.encode()}
    for file in checkpoint.extra_files():
        if is_file_name(file.name):
            files[file.name] = file
        else:
            _log.warning("%s is left out of the artifact: its name is not a plain file name", file)
    return files
