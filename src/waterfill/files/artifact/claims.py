"""What a header claims about a coded tensor, held against its codec: decoders trust that buffers are as large as the
codec makes them of that shape.

A codec that is not known here is not a damaged file: whoever wants to decode it refuses.
"""

from __future__ import annotations

import math

from waterfill.base.dtypes import WEIGHT_DTYPES
from waterfill.base.errors import WaterfillError
from waterfill.codecs import LOSSLESS, Codec, get_codec, lossless
from waterfill.files.artifact.format import RAW, FormatError, TensorSpec, quote

MAX_EXPONENT = 126  # 2^exponent and its inverse are float32 numbers
MAX_WIDTH = 1 << 24  # weights of a row
MAX_WEIGHTS_PER_BYTE = 64  # no codec spends less than an eighth of a bit


def check_claims(tensor: TensorSpec, exponent: int) -> None:
    """Compare buffers with those that the codec makes of a tensor of that shape and dtype.

    Raises:
        FormatError: they are others.
    """
    if tensor.codec == RAW:
        return
    codec = None if tensor.codec == LOSSLESS else _known(tensor.codec)
    if codec is None and tensor.codec != LOSSLESS:
        return
    name = quote(tensor.name)
    if tensor.dtype not in WEIGHT_DTYPES:
        raise FormatError(f"tensor {name} is coded and has dtype {tensor.dtype}, not one of {', '.join(WEIGHT_DTYPES)}")
    if not _as_coded(tensor, codec):
        stored = ", ".join(f"{b.dtype} {list(b.shape)}" for b in tensor.buffers)
        raise FormatError(
            f"tensor {name} of shape {list(tensor.shape)} cannot be coded by {quote(tensor.codec)} as {stored}"
        )
    if abs(exponent) > MAX_EXPONENT:
        raise FormatError(f"tensor {name} has exponent {exponent}, not one from -{MAX_EXPONENT} to {MAX_EXPONENT}")


def _known(name: str) -> Codec | None:
    try:
        return get_codec(name)
    except WaterfillError:
        return None


def _as_coded(tensor: TensorSpec, codec: Codec | None) -> bool:
    """Sizes come first: a layout takes time and memory in proportion to them."""
    buffers = {key: (buffer.dtype, buffer.shape) for key, buffer in zip(tensor.keys, tensor.buffers, strict=True)}
    if codec is None:
        least = lossless.LENGTH_BYTES * lossless.streams_of(math.prod(tensor.shape))
        dtype, shape = buffers.get(lossless.BUFFER, ("", ()))
        return len(buffers) == 1 and dtype == "U8" and len(shape) == 1 and shape[0] >= least
    if len(tensor.shape) != 2 or not 0 < math.prod(tensor.shape) <= MAX_WEIGHTS_PER_BYTE * tensor.size_bytes:
        return False
    rows, width = tensor.shape
    if width > MAX_WIDTH:
        return False
    asked = {key: (part.dtype, part.shape) for key, part in codec.layout((rows, width)).items()}
    return list(buffers.items()) == list(asked.items())
