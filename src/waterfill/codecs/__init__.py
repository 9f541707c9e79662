"""Codecs: matrices to named buffers and back. `get_codec(name)` is the door; `base` is the contract."""

from waterfill.codecs import higgs, levels
from waterfill.codecs.contract import (
    BufferLayout,
    Codec,
    Encoded,
    Encoder,
    MenuPoint,
    Piece,
    Shape,
    buffer_bytes,
    get_codec,
    register_codec,
)
from waterfill.codecs.higgs import Higgs, scale_exponent
from waterfill.codecs.levels import Levels
from waterfill.codecs.lossless import LOSSLESS
from waterfill.codecs.table import TableCodec
from waterfill.codecs.trellis import codec as trellis_codec
from waterfill.codecs.trellis.codec import Trellis

register_codec("higgs", higgs.higgs)
register_codec("levels", levels.levels)
register_codec("trellis", trellis_codec.trellis)

__all__ = [
    "LOSSLESS",
    "BufferLayout",
    "Codec",
    "Encoded",
    "Encoder",
    "Higgs",
    "Levels",
    "MenuPoint",
    "Piece",
    "Shape",
    "TableCodec",
    "Trellis",
    "buffer_bytes",
    "get_codec",
    "register_codec",
    "scale_exponent",
]
