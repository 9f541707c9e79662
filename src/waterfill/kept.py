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

from waterfill.architecture import Kept, Matrix
from waterfill.artifact import ArtifactWriter
from waterfill.checkpoint import WEIGHT_DTYPES, Checkpoint, Index, check_finite
from waterfill.codecs import lossless
from waterfill.errors import CheckpointError

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


def _sources(tensor: Kept | Matrix) -> Sequence[str]:
    """Checkpoint tensors that hold the parameter's numbers, one behind the other."""
    if isinstance(tensor, Matrix):
        return [piece.source for piece in tensor.pieces]
    return list(chain.from_iterable(tensor.sources))


def _numbers(checkpoint: Checkpoint, tensor: Kept | Matrix, step: Step | None = None) -> Iterator[torch.Tensor]:
    """The numbers of the parameter in the model's order, in flat parts."""
    for source in _sources(tensor):
        info = checkpoint.tensors[source]
        count = math.prod(info.shape)
        rows = max(1, BLOCK_NUMBERS * info.shape[0] // count) if count and info.shape else 0
        blocks: list[Index] = [slice(i, i + rows) for i in range(0, info.shape[0], rows)] if rows else [...]
        for block in blocks:
            part = checkpoint.read(source, block)
            check_finite(part, source, info.file)
            yield part.reshape(-1)
            if step:
                step(part.numel())
