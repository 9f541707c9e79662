"""Coded keys and values: attention from codes beside slow sums, codes beside the nearest levels, and their memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from tests.support.attention import (
    Heads,
    attend,
    codes_of,
    decoded,
    expected,
    in_pieces,
    levels,
    random_rows,
    rotated_rows,
    rounded,
)
from tests.support.kernel_samples import ISAS, every_isa, needs_engine
from waterfill.base.errors import UnsupportedError
from waterfill.codecs.grids import grid
from waterfill.running.engine.cache import Shape
from waterfill.running.engine.coded_cache import CodedShape

pytestmark = needs_engine

PIECES = (1, 150, 3, 64, 11, 90, 1, 1)
TOKENS = sum(PIECES)
WORDS = 2e-4  # scores of up to 40 from queries of 16 bits

SHAPES = [
    (Heads(32, 4, 4), (4, 4)),
    (Heads(64, 8, 2), (5, 4)),
    (Heads(80, 3, 1), (3, 5)),
    (Heads(96, 4, 2, half=False), (8, 8)),
    (Heads(128, 3, 1, window=100), (4, 3)),
    (Heads(256, 4, 1, window=40), (8, 4)),
    (Heads(48, 2, 1), (16, 4)),
    (Heads(64, 4, 1, window=150), (5, 16)),
    (Heads(512, 1, 1), (3, 3)),
]


@every_isa
@pytest.mark.parametrize(("heads", "bits"), SHAPES)
def test_attention_from_codes_is_attention_to_what_they_decode_to(
    isa: str, heads: Heads, bits: tuple[int, int]
) -> None:
    """In pieces, past a growing capacity, with tokens that are seen as they are at both ends."""
    rows, cache = random_rows(heads, TOKENS), heads.coded(bits).cache()
    found = in_pieces(isa, heads, cache, rows, PIECES)
    sums = expected(heads, cache, rows)
    assert cache.capacity > 256
    assert np.abs(found - sums).max() < WORDS * np.abs(sums).max()


@pytest.mark.skipif(len(ISAS) < 2, reason="one instruction set")
@pytest.mark.parametrize(("heads", "bits"), SHAPES)
def test_every_instruction_set_gives_the_same_bits(heads: Heads, bits: tuple[int, int]) -> None:
    rows, results = random_rows(heads, TOKENS), []
    for isa in ISAS:
        cache = heads.coded(bits).cache()
        results.append(in_pieces(isa, heads, cache, rows, PIECES))
    assert all(np.array_equal(one, results[0]) for one in results[1:])


@every_isa
@pytest.mark.parametrize(("heads", "bits"), SHAPES)
@pytest.mark.parametrize("pieces", [(TOKENS,), (7,) * (TOKENS // 7) + (TOKENS % 7,)])
def test_a_text_is_the_same_however_it_is_cut(
    isa: str, heads: Heads, bits: tuple[int, int], pieces: Sequence[int]
) -> None:
    rows = random_rows(heads, TOKENS)
    found = [in_pieces(isa, heads, heads.coded(bits).cache(), rows, cut) for cut in (PIECES, pieces)]
    assert np.array_equal(*found)


@every_isa
def test_short_texts_are_those_of_plain_numbers(isa: str) -> None:
    """As long as nothing is old enough to be coded, to the bit."""
    heads = Heads(64, 4, 2)
    rows = random_rows(heads, 68)
    coded, plain = heads.coded((3, 3)).cache(), heads.plain().cache()
    assert np.array_equal(*(in_pieces(isa, heads, cache, rows, (30, 38)) for cache in (coded, plain)))
    longer = random_rows(heads, 1, seed=1)
    assert not np.array_equal(*(attend(isa, heads, [(cache, longer)])[0] for cache in (coded, plain)))


@every_isa
def test_texts_in_one_pass_are_those_one_by_one(isa: str) -> None:
    """Coded differently, of other lengths, one of plain numbers."""
    heads = Heads(64, 6, 2)
    texts = [random_rows(heads, tokens, seed=tokens) for tokens in (200, 90, 310, 129)]
    shapes = [heads.coded((4, 4)), heads.coded((8, 3), first=0, recent=1, spare=0), heads.plain(), heads.coded((5, 16))]
    alone, together = ([shape.cache() for shape in shapes] for _ in range(2))
    for cut in (slice(0, 60), slice(60, 61), slice(61, None)):
        found = attend(isa, heads, [(cache, rows[cut]) for cache, rows in zip(together, texts, strict=True)])
        for one, cache, rows in zip(found, alone, texts, strict=True):
            assert np.array_equal(one, attend(isa, heads, [(cache, rows[cut])])[0])


@pytest.mark.parametrize("bits", [8, 5, 4, 3])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_codes_are_the_nearest_levels(bits: int, head_dim: int) -> None:
    """And scales the best ones for them; the distortion is the grid's."""
    heads = Heads(head_dim, 2, 2)
    rows, cache = random_rows(heads, 700), heads.coded((bits, bits)).cache()
    in_pieces(ISAS[0], heads, cache, rows, (400, 300))
    count = 700 - cache._shape.recent
    for values, x in ((False, rows.k), (True, rows.v)):
        truth = rotated_rows(rounded(x[:, 1], True))[:count][4:]
        codes, scales = (part[:count][4:] for part in codes_of(cache, values, 1))
        size = np.abs(truth).max(1) if bits == 8 else np.sqrt(np.square(truth).mean(1))
        points = levels(bits)
        scaled = truth / size[:, None]
        nearest = np.abs(scaled[..., None] - points).min(-1)
        assert np.abs(np.abs(scaled - points[codes]) - nearest).max() < 1e-5
        best = (truth * points[codes]).sum(1) / np.square(points[codes]).sum(1)
        assert np.abs(scales / best - 1).max() < 2**-10
        errors = np.square(decoded(cache, values, 1)[:count][4:] - rounded(x[:, 1], True)[:count][4:]).sum()
        distortion = errors / np.square(truth).sum()
        assert distortion < (1e-4 if bits == 8 else 1.03 * grid(1, 1 << bits).t2)


@every_isa
def test_going_back_by_what_there_is_to_spare_is_never_having_read(isa: str) -> None:
    heads = Heads(64, 4, 2)
    rows, others = random_rows(heads, 260), random_rows(heads, 90, seed=1)
    for back in (1, 64):
        cache, straight = (heads.coded((4, 4)).cache() for _ in range(2))
        attend(isa, heads, [(cache, rows)])
        assert cache.truncate(260 - back) == 260 - back
        attend(isa, heads, [(straight, rows[: 260 - back])])
        assert np.array_equal(*(in_pieces(isa, heads, one, others, (3, 87)) for one in (cache, straight)))


@every_isa
@pytest.mark.parametrize("length", [195, 150, 2, 0])
def test_going_back_further_leaves_fewer_tokens_as_they_are(isa: str, length: int) -> None:
    """The others are seen by their codes, which stay what they were."""
    heads = Heads(64, 4, 2)
    rows, others = random_rows(heads, 260), random_rows(heads, 150, seed=1)
    cache = heads.coded((4, 4)).cache()
    attend(isa, heads, [(cache, rows)])
    before = decoded(cache, False, 0)[4:length].copy()
    assert cache.truncate(length) == length
    found = in_pieces(isa, heads, cache, others, (1, 20, 129))
    text = type(rows)(
        *(np.concatenate([getattr(part, name)[:n] for part, n in ((rows, length), (others, 150))]) for name in "qkv")
    )
    sums = expected(heads, cache, text, kept_from=min(260 - 128, length))[length:]
    assert np.abs(found - sums).max() < WORDS * np.abs(sums).max()
    assert np.array_equal(decoded(cache, False, 0)[4:length], before)


def test_a_pass_that_fails_leaves_what_has_codes() -> None:
    """It may have taken the places of tokens that have none."""
    heads = Heads(64, 2, 1)
    cache = heads.coded((4, 4)).cache()
    attend(ISAS[0], heads, [(cache, random_rows(heads, 100))])
    for tokens, left in ((64, 100), (65, 36)):  # of a ring of 128, with 64 newest
        cache.reserve(100 + tokens)
        cache.view(tokens)
        assert cache.truncate(100) == left
    cache = heads.coded((4, 4)).cache()
    attend(ISAS[0], heads, [(cache, random_rows(heads, 10))])
    cache.reserve(600)
    cache.view(500)
    assert cache.truncate(10) == 4  # the first ones are never replaced


def test_memory_is_what_codes_take() -> None:
    plain = Shape(16, 8, 64, True, 1 << 17)
    assert plain.token_bytes == 16 * 8 * 2 * 64 * 2
    for bits, each in ((8, 8.25), (5, 5.25), (4, 4.25), (3, 3.25)):
        shape = CodedShape.of(plain, (bits, bits))
        assert 8 * shape.token_bytes == 16 * 8 * 2 * 64 * each
        cache = shape.cache()
        cache.reserve(4096)
        taken = [array.nbytes for arrays in (cache._keys, cache._values) for array in arrays]
        assert sum(taken) == 4096 * shape.token_bytes
        whole = [array.nbytes for arrays in cache._whole.values() for array in arrays]
        assert sum(whole) == shape.text_bytes == 132 * plain.token_bytes
    mixed = CodedShape.of(plain, (16, 4))
    assert 8 * mixed.token_bytes == 16 * 8 * 64 * (16 + 4.25)
    assert mixed.text_bytes == 132 * plain.token_bytes // 2


def test_a_cache_knows_what_it_grows_by() -> None:
    heads = Heads(64, 2, 1)
    shape = heads.coded((4, 4))
    cache = shape.cache()
    cache.expected = 1000
    assert cache.owed_bytes == 1000 * shape.token_bytes + shape.text_bytes
    assert cache.growth_bytes(200) == 200 * shape.token_bytes + shape.text_bytes
    attend(ISAS[0], heads, [(cache, random_rows(heads, 200))])
    assert cache.owed_bytes == 800 * shape.token_bytes
    assert cache.capacity == 256
    cache.reserve(300)
    assert cache.capacity == 1024


def test_heads_of_odd_sizes_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="its heads have 24 dimensions, and coded keys and values need a mult"):
        CodedShape.of(Shape(1, 1, 24, True, 99), (4, 4))
