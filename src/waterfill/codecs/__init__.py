"""Codecs: matrices to named buffers and back. `get_codec(name)` is the door; `base` is the contract."""

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
from waterfill.codecs.higgs import higgs as _higgs
from waterfill.codecs.levels import Levels
from waterfill.codecs.levels import levels as _levels
from waterfill.codecs.lossless import LOSSLESS
from waterfill.codecs.table import TableCodec
from waterfill.codecs.trellis.codec import Trellis
from waterfill.codecs.trellis.codec import trellis as _trellis

register_codec("higgs", _higgs)
register_codec("levels", _levels)
register_codec("trellis", _trellis)

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
