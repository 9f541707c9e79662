"""Codecs: matrices to named buffers and back. `get_codec(name)` is the door; `contract` is what a codec is.

A new codec is a file of its own, a line where codecs are registered here, and one on a menu if it is to be considered
where nobody asks for it.
"""

from collections.abc import Mapping

from waterfill.codecs import higgs, levels
from waterfill.codecs.bitshift import codec as bitshift_codec
from waterfill.codecs.bitshift.codec import Bitshift
from waterfill.codecs.contract import (
    BufferLayout,
    Codec,
    Encoded,
    Encoder,
    MemoryForm,
    MenuPoint,
    Piece,
    Rates,
    Shape,
    buffer_bytes,
    get_codec,
    rates_of,
    register_codec,
)
from waterfill.codecs.higgs import Higgs
from waterfill.codecs.levels import Levels
from waterfill.codecs.lossless import LOSSLESS
from waterfill.codecs.nested import codec as nested_codec
from waterfill.codecs.nested.codec import Nested
from waterfill.codecs.parts import Parts
from waterfill.codecs.table import TableCodec, scale_exponent
from waterfill.codecs.trellis import codec as trellis_codec
from waterfill.codecs.trellis.codec import Trellis

register_codec("bitshift", bitshift_codec.bitshift, bitshift_codec.any_rate)
register_codec("higgs", higgs.higgs)
register_codec("levels", levels.levels)
register_codec("nested", nested_codec.nested)
register_codec("trellis", trellis_codec.trellis, trellis_codec.any_rate)

# Every power-of-two grid: rates from 0.75 to 8 bits in steps of a quarter or a third; the larger p, the lower t2.
GRIDS = (
    *(f"higgs-p1-n{2**k}" for k in range(1, 9)),
    *(f"higgs-p2-n{2**k}" for k in range(2, 11)),
    *(f"higgs-p3-n{2**k}" for k in range(3, 13)),
    *(f"higgs-p4-n{2**k}" for k in range(3, 13)),
)
MENUS: Mapping[str, tuple[str, ...]] = {
    "storage": ("trellis",),
    "memory": (*GRIDS, "bitshift"),
    "stream": ("trellis", *GRIDS, "bitshift"),
}
"""What a matrix may be given where nobody says more than what it is for: names of codecs, or of every rate of one."""

__all__ = [
    "GRIDS",
    "LOSSLESS",
    "MENUS",
    "Bitshift",
    "BufferLayout",
    "Codec",
    "Encoded",
    "Encoder",
    "Higgs",
    "Levels",
    "MemoryForm",
    "MenuPoint",
    "Nested",
    "Parts",
    "Piece",
    "Rates",
    "Shape",
    "TableCodec",
    "Trellis",
    "buffer_bytes",
    "get_codec",
    "rates_of",
    "register_codec",
    "scale_exponent",
]
