"""A matrix that is in memory through an encoder that takes it in blocks of rows."""

from __future__ import annotations

from itertools import chain

import numpy as np

from waterfill.base.dtypes import TORCH_DTYPES
from waterfill.base.lazy import torch
from waterfill.codecs.contract import Codec, Encoded, buffer_bytes
from waterfill.codecs.feedback import Feedback


def encode_whole(
    codec: Codec, weight: torch.Tensor, *, exponent: int = 0, rho: float = 1.0, feedback: Feedback | None = None
) -> Encoded:
    """The matrix `[out, in]` as `Codec.encoder` has it, all of its pieces, which are bytes, in their places."""
    shape = (weight.shape[0], weight.shape[1])
    encoder, layout = codec.encoder(shape, exponent=exponent, rho=rho, feedback=feedback), codec.layout(shape)
    data = {key: np.zeros(buffer_bytes(part), np.uint8) for key, part in layout.items()}
    for piece in chain(*map(encoder.add, weight.split(encoder.block_rows)), encoder.finish()):
        assert isinstance(piece.data, bytes)
        place = slice(piece.offset_bytes, piece.offset_bytes + len(piece.data))
        data[piece.key][place] = np.frombuffer(piece.data, np.uint8)
    buffers = {key: torch.from_numpy(some).view(TORCH_DTYPES[layout[key].dtype]) for key, some in data.items()}
    return Encoded(shape, buffers, exponent, encoder.noise_power, encoder.power)
