"""Attention alone, through `wf_run_layers`, and what it ought to be: numpy in float64, codes read bit by bit.

The library calls back for products with a layer's matrices, so that a test gives q, k and v, and is given what
attention made of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from waterfill.base import native
from waterfill.codecs.grids import grid
from waterfill.codecs.hadamard import rotate, unrotate
from waterfill.running.engine.cache import KeysValues, Shape
from waterfill.running.engine.coded_cache import CodedKeysValues, CodedShape

HIDDEN = 16
BLOCK = 128

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Heads:
    """Of one layer; `half` is a cache of bfloat16."""

    head_dim: int
    heads: int
    kv_heads: int
    half: bool = True
    window: int = 0
    scaling: float = 0.3

    def plain(self, positions: int = 4096) -> Shape:
        return Shape(1, self.kv_heads, self.head_dim, self.half, positions)

    def coded(self, bits: tuple[int, int], **options: int) -> CodedShape:
        shape = self.plain()
        return CodedShape(1, self.kv_heads, self.head_dim, self.half, shape.positions, *bits, **options)


@dataclass(frozen=True)
class Rows:
    """Of consecutive tokens: q float32 `[tokens, heads, head_dim]`, k and v `[tokens, kv_heads, head_dim]`."""

    q: Floats
    k: Floats
    v: Floats

    def __getitem__(self, tokens: slice) -> Rows:
        return Rows(self.q[tokens], self.k[tokens], self.v[tokens])

    def __len__(self) -> int:
        return len(self.q)

    def __add__(self, more: Rows) -> Rows:
        return Rows(*(np.concatenate([getattr(rows, name) for rows in (self, more)]) for name in "qkv"))


def random_rows(heads: Heads, tokens: int, seed: int = 0) -> Rows:
    """Keys have means and a large coordinate, as those of trained models do."""
    random = np.random.default_rng(seed)

    def numbers(count: int) -> Floats:
        return random.standard_normal((tokens, count, heads.head_dim)).astype(np.float32)

    k = numbers(heads.kv_heads) + random.standard_normal((heads.kv_heads, heads.head_dim)).astype(np.float32)
    k[:, :, 3] *= 6
    return Rows(numbers(heads.heads), k, numbers(heads.kv_heads) * np.float32(0.02))


def attend(isa: str, heads: Heads, texts: Sequence[tuple[KeysValues, Rows]]) -> list[Floats]:
    """What attention makes of new tokens of several texts in one pass: of each float32 `[tokens, heads, head_dim]`.
    Their caches hold the tokens then."""
    library, tokens = native.library(), sum(len(rows) for _, rows in texts)
    assert library is not None
    mixed = np.zeros((tokens, heads.heads, heads.head_dim), np.float32)
    given = [np.concatenate([getattr(rows, name) for _, rows in texts]) for name in "qkv"]

    def product(_: Any, layer: int, first: int, count: int, x: int, tokens: int, ys: Any, status: Any) -> None:
        for i in range(count):
            if first == 0:
                ctypes.memmove(ys[i], given[i].ctypes.data, given[i].nbytes)
            else:
                ctypes.memset(ys[i], 0, tokens * HIDDEN * 4)
        if first == 3:
            ctypes.memmove(mixed.ctypes.data, x, mixed.nbytes)
        status[0] = 0

    q, kv = heads.heads * heads.head_dim, heads.kv_heads * heads.head_dim
    shapes = {"q": (q, HIDDEN), "k": (kv, HIDDEN), "v": (kv, HIDDEN), "o": (HIDDEN, q)}
    shapes |= dict.fromkeys(("gate", "up", "down"), (HIDDEN, HIDDEN))
    matrices = {name: native.MatrixView(*shape) for name, shape in shapes.items()}
    ones = np.ones(HIDDEN, np.float32)
    norm = native.Vector(ones.ctypes.data, HIDDEN)
    layer = native.LayerView(
        hidden=HIDDEN,
        heads=heads.heads,
        kv_heads=heads.kv_heads,
        head_dim=heads.head_dim,
        epsilon=1e-5,
        scaling=heads.scaling,
        dtype=native.FLOAT32,
        cache_dtype=native.BFLOAT16 if heads.half else native.FLOAT32,
        window=heads.window,
        input_norm=norm,
        post_norm=norm,
        **{name: ctypes.pointer(matrix) for name, matrix in matrices.items()},
    )
    for cache, rows in texts:
        cache.reserve(cache.length + len(rows))
    hidden = np.ones((tokens, HIDDEN), np.float32)
    turned = np.ones((1, tokens, heads.head_dim), np.float32), np.zeros((1, tokens, heads.head_dim), np.float32)
    status = library.run_layers(
        library.isas[isa],
        (native.LayerView * 1)(layer),
        (native.SequenceView * len(texts))(*(cache.view(len(rows)) for cache, rows in texts)),
        hidden,
        np.empty_like(hidden),
        cosine=turned[0],
        sine=turned[1],
        final_norm=norm,
        product=native.PRODUCT(product),
    )
    assert status == 0
    for cache, rows in texts:
        cache.append(len(rows))
    return np.split(mixed, np.cumsum([len(rows) for _, rows in texts])[:-1])


def in_pieces(isa: str, heads: Heads, cache: KeysValues, rows: Rows, pieces: Sequence[int]) -> Floats:
    """The same for one text, so many tokens at a time."""
    ends = np.cumsum(pieces)
    assert ends[-1] == len(rows)
    starts = [0, *ends[:-1]]
    return np.concatenate([attend(isa, heads, [(cache, rows[a:b])])[0] for a, b in zip(starts, ends, strict=True)])


def rounded(x: Floats, half: bool) -> Floats:
    """As a cache has it."""
    tensor = torch.from_numpy(np.ascontiguousarray(x))
    return tensor.to(torch.bfloat16).float().numpy() if half else x


def levels(bits: int) -> Doubles:
    """What codes stand for where the scale is 1, rounded to 127 steps."""
    if bits == 8:
        return np.concatenate([np.arange(128), np.arange(-128, 0)]) / 127
    points = grid(1, 1 << bits).array[:, 0].astype(np.float64)
    step = np.abs(points).max() / 127
    return np.rint(points / step) * step


def planes(data: npt.NDArray[np.uint8], bits: int, count: int) -> npt.NDArray[np.int64]:
    """Codes `[count]` from planes of 8, 4, 2 and 1 bits, of which the widest has the lowest bits."""
    codes, done = np.zeros(count, np.int64), 0
    for width in (8, 4, 2, 1):
        if not bits & width:
            continue
        plane, data = np.split(data, [count * width // 8])
        fields = [plane >> shift & (1 << width) - 1 for shift in range(0, 8, width)]
        codes |= np.concatenate(fields).astype(np.int64) << done
        done += width
    return codes


def codes_of(cache: CodedKeysValues, values: bool, head: int) -> tuple[npt.NDArray[np.int64], Doubles]:
    """Of a head in the only layer: codes `[capacity, head_dim]` and scales `[capacity]`."""
    shape, arrays = cache._shape, cache._values if values else cache._keys
    bits, d = shape.bits(values), shape.head_dim
    codes, scales = [], []
    for block in arrays[0][head]:
        scales.append(block[: 2 * BLOCK].view(np.float16).astype(np.float64))
        found = planes(block[2 * BLOCK :], bits, BLOCK * d)
        codes.append(found.reshape(d, BLOCK).T if values else found.reshape(BLOCK, d))
    return np.concatenate(codes), np.concatenate(scales)


def decoded(cache: CodedKeysValues, values: bool, head: int) -> Doubles:
    """Rows `[capacity, head_dim]` of a head by their codes; those that have none are anything."""
    codes, scales = codes_of(cache, values, head)
    with np.errstate(invalid="ignore"):  # of memory that was never written
        rotated = levels(cache._shape.bits(values))[codes] * scales[:, None]
    return unrotate(torch.from_numpy(rotated)).numpy()


def rotated_rows(x: Floats) -> Doubles:
    """`[..., head_dim]` in the basis in which they are coded."""
    return rotate(torch.from_numpy(x.astype(np.float64))).numpy()


def expected(heads: Heads, cache: CodedKeysValues, rows: Rows, *, kept_from: int = 0) -> Doubles:
    """Attention of all tokens of a text `[tokens, heads, head_dim]`, of which a cache holds the codes: every token to
    those that it sees, as they are or as they are decoded."""
    shape, group = cache._shape, heads.heads // heads.kv_heads
    out = np.zeros(rows.q.shape)
    for head in range(heads.heads):
        sides = []
        for values, x in ((False, rows.k), (True, rows.v)):
            whole = rounded(x[:, head // group], heads.half).astype(np.float64)
            sides.append((whole, whole if shape.bits(values) == 16 else decoded(cache, values, head // group)))
        for t in range(len(rows)):
            seen = np.arange(max(0, t - heads.window + 1) if heads.window else 0, t + 1)
            is_whole = (seen < shape.first) | (seen >= max(t - shape.recent + 1, kept_from))
            k, v = (np.where(is_whole[:, None], whole[seen], coded[seen]) for whole, coded in sides)
            scores = k @ rows.q[t, head].astype(np.float64) * heads.scaling
            weights = np.exp(scores - scores.max())
            out[t, head] = weights / weights.sum() @ v
    return out
