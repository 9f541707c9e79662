"""Entropy coding: static rANS with 12-bit tables, from counts or from the ideal Gaussian model.

counts ──tables.from_counts──► frequencies ──rans.encode──► bytes ──rans.decode──► symbols
"""

from waterfill.codecs.entropy.rans import MOST_LANES, DamagedError, decode, encode, lanes_for
from waterfill.codecs.entropy.tables import PRECISION_BITS, code_length_bits, from_counts, gaussian, gaussian_parameter

__all__ = [
    "MOST_LANES",
    "PRECISION_BITS",
    "DamagedError",
    "code_length_bits",
    "decode",
    "encode",
    "from_counts",
    "gaussian",
    "gaussian_parameter",
    "lanes_for",
]
