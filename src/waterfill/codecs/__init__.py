"""Codecs: matrices to named buffers and back. `get_codec(name)` is the door; `base` is the contract."""

from waterfill.codecs.base import (
    BufferLayout,
    Codec,
    Encoded,
    MenuPoint,
    Shape,
    buffer_bytes,
    get_codec,
    register_codec,
)
from waterfill.codecs.higgs import Higgs, scale_exponent
from waterfill.codecs.higgs import higgs as _higgs  # `codecs.higgs` stays the module

register_codec("higgs", _higgs)

__all__ = [
    "BufferLayout",
    "Codec",
    "Encoded",
    "Higgs",
    "MenuPoint",
    "Shape",
    "buffer_bytes",
    "get_codec",
    "register_codec",
    "scale_exponent",
]
