"""Tensors that are stored as they are, to the bit: in how many bytes, and in which.

    checkpoint ──numbers──► codecs.lossless ──streams──► ArtifactWriter

A tensor is coded losslessly where that saves bytes, its longer entry in the header counted; else it stays raw. Memory
holds one block of numbers, not a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import numpy as np
import torch

from waterfill.base.dtypes import WEIGHT_DTYPES
from waterfill.base.errors import CheckpointError
from waterfill.codecs import lossless
from waterfill.files.architecture import Kept, Matrix
from waterfill.files.artifact import ArtifactWriter
from waterfill.files.checkpoint import Checkpoint, Index, check_finite
from waterfill.files.skeleton import Part

BLOCK_NUMBERS = 1 << 20

Step = Callable[[int], None]  # called with how many numbers have just been done


def coded_bytes(checkpoint: Checkpoint, tensor: Kept | Matrix, step: Step | None = None) -> int | None:
    """Bytes of the tensor's buffer when it is coded losslessly; None where it holds no floating-point numbers.

    The tensor is read once and coded: how long rANS's words come out is known in no other way.

    Raises:
        CheckpointError: a number is NaN or infinite.
    """
    if tensor.dtype not in WEIGHT_DTYPES:
        return None
    return lossless.buffer_bytes(len(stream) for stream in lossless.encode_streams(_numbers(checkpoint, tensor, step)))


def write_coded(
    writer: ArtifactWriter, checkpoint: Checkpoint, tensor: Kept | Matrix, name: str, size_bytes: int
) -> Iterator[int]:
    """Write the streams of tensor `name`, planned to take `size_bytes`; yields the numbers done since the last time.

    Raises:
        CheckpointError: a number is NaN or infinite, or the tensor is not the one that was planned for.
    """
    buffer, count = f"{name}.{lossless.BUFFER}", math.prod(tensor.shape)
    lengths: list[int] = []
    at = lossless.LENGTH_BYTES * lossless.streams_of(count)
    for stream in lossless.encode_streams(_numbers(checkpoint, tensor)):
        if at + len(stream) > size_bytes:
            break
        writer.write(buffer, at, stream)
        at += len(stream)
        yield min(lossless.STREAM_NUMBERS, count - len(lengths) * lossless.STREAM_NUMBERS)
        lengths.append(len(stream))
    if lossless.buffer_bytes(lengths) != size_bytes or len(lengths) != lossless.streams_of(count):
        raise CheckpointError(
            f"{checkpoint.path}: tensor {name!r} does not fill the {size_bytes:,} bytes that the plan has for it: its "
            "weights have changed; make a new plan"
        )
    writer.write(buffer, 0, np.array(lengths, "<u4").tobytes())
    writer.write(buffer, at, bytes(size_bytes - at))


def _sources(tensor: Kept | Matrix) -> Sequence[Part]:
    """What holds the parameter's numbers, one behind the other."""
    if isinstance(tensor, Kept):
        return list(chain.from_iterable(tensor.sources))
    if tensor.transposed:  # rows are columns of what is stored: all of it
        return [Part(piece.source) for piece in tensor.pieces]
    return [Part(piece.source, piece.start, piece.start + piece.rows) for piece in tensor.pieces]


def _numbers(checkpoint: Checkpoint, tensor: Kept | Matrix, step: Step | None = None) -> Iterator[torch.Tensor]:
    """The numbers of the parameter in the model's order, in flat parts."""
    for part in _sources(tensor):
        info = checkpoint.tensors[part.source]
        count = math.prod(info.shape)
        rows = max(1, BLOCK_NUMBERS * info.shape[0] // count) if count and info.shape else 0
        stop = part.stop or (info.shape or (0,))[0]
        blocks: list[Index] = [slice(i, min(i + rows, stop)) for i in range(part.start, stop, rows)] if rows else [...]
        for block in blocks:
            numbers = checkpoint.read(part.source, block)
            check_finite(numbers, part.source, info.file)
            yield numbers.reshape(-1)
            if step:
                step(numbers.numel())
