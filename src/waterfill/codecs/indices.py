"""Grid indices <-> bytes: how HIGGS codes lie on disk and in memory.

Every row is packed by itself and starts on a byte, so that any row can be read alone. Indices are bit fields of
ceil(log2 n) bits, in little-endian bit order, unless a radix word is smaller: `k` indices as one radix-n number,
little-endian in `w` bytes, with (k, w) chosen to waste the least (n = 3: 5 indices a byte, 1.6 bits; n = 6: 3 a byte,
2.667; n = 88: 6 in 5 bytes; but n = 15 or 200 fields of 4 or 8 bits). The last, incomplete word of a row takes only the
bytes it needs.
"""

from __future__ import annotations

import math
from functools import lru_cache

from waterfill.base.lazy import torch

MAX_WORD_BYTES = 7  # a radix word must fit a signed 64-bit integer
BYTE_VALUES = 256  # of indices that are bytes as they are


@lru_cache(maxsize=4096)
def row_bytes(count: int, n: int) -> int:
    """Bytes of a row of `count` indices below `n`."""
    word = radix_word(n)
    if word is None:
        return (count * _bits(n) + 7) // 8
    per_word, width = word
    whole, rest = divmod(count, per_word)
    rest_bits = (int(n**rest) - 1).bit_length()
    return whole * width + (rest_bits + 7) // 8


@lru_cache(maxsize=4096)
def radix_word(n: int) -> tuple[int, int] | None:
    """(indices, bytes) of one radix-n word: the fewest bits per index, then the shortest. None: bit fields."""
    words = [(_digits(n, 8 * width), width) for width in range(1, MAX_WORD_BYTES + 1)]
    per_word, width = min((word for word in words if word[0]), key=lambda word: (word[1] / word[0], word[1]))
    return (per_word, width) if 8 * width < per_word * _bits(n) else None


def pack(indices: torch.Tensor, n: int) -> torch.Tensor:
    """int64 `[rows, count]`, each in 0 … n-1 -> uint8 `[rows, row_bytes(count, n)]`."""
    rows, count = indices.shape
    if n == BYTE_VALUES:
        return indices.to(torch.uint8)
    per_word, width = _word(n)
    words = -(-count // per_word)
    digits = torch.nn.functional.pad(indices, (0, words * per_word - count)).view(rows, words, per_word)
    spread = torch.zeros(rows, words, width + 2, dtype=torch.int64)
    if radix_word(n) is None:
        for k in range(per_word):
            byte, shift = divmod(k * _bits(n), 8)
            field = digits[..., k] << shift  # at most 12 + 7 bits: three bytes
            for step in range((shift + _bits(n) + 7) // 8):
                spread[..., byte + step] |= (field >> (8 * step)) & 0xFF
    else:
        place = torch.tensor([n**k for k in range(per_word)], dtype=torch.int64)
        word = (digits * place).sum(-1)
        for byte in range(width):
            spread[..., byte] = (word >> (8 * byte)) & 0xFF
    return spread[..., :width].to(torch.uint8).flatten(1)[:, : row_bytes(count, n)].contiguous()


def unpack(packed: torch.Tensor, count: int, n: int) -> torch.Tensor:
    """uint8 `[rows, row_bytes(count, n)]` -> int64 `[rows, count]`, the inverse of `pack`.

    Bytes that `pack` cannot have written give n-1 where they would give an index beyond the grid.
    """
    if n == BYTE_VALUES:
        return packed[:, :count].to(torch.int64)
    rows = packed.shape[0]
    per_word, width = _word(n)
    words = -(-count // per_word)
    spread = torch.nn.functional.pad(packed, (0, words * width - packed.shape[1])).view(rows, words, width)
    indices = torch.empty(rows, words, per_word, dtype=torch.int64)
    if radix_word(n) is None:
        for k in range(per_word):
            byte, shift = divmod(k * _bits(n), 8)
            field = spread[..., byte].to(torch.int64)
            for step in range(1, (shift + _bits(n) + 7) // 8):
                field |= spread[..., byte + step].to(torch.int64) << (8 * step)
            indices[..., k] = (field >> shift) & ((1 << _bits(n)) - 1)
    else:
        word = sum(spread[..., byte].to(torch.int64) << (8 * byte) for byte in range(width))
        for k in range(per_word):
            rest = torch.div(word, n, rounding_mode="floor")
            indices[..., k] = word - rest * n
            word = rest
    result = indices.flatten(1)[:, :count]
    return result if n == 1 << _bits(n) else result.clamp_max(n - 1)


def _word(n: int) -> tuple[int, int]:
    """(indices, bytes) of the unit of work: a radix word, or the shortest byte-aligned run of bit fields."""
    per_word = 8 // math.gcd(8, _bits(n))
    return radix_word(n) or (per_word, per_word * _bits(n) // 8)


def _bits(n: int) -> int:
    """Width of a bit field."""
    return (n - 1).bit_length()


def _digits(n: int, bits: int) -> int:
    """The largest k with n^k <= 2^bits."""
    k = 0
    while n ** (k + 1) <= 1 << bits:
        k += 1
    return k
