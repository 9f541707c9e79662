"""Arithmetic on packed matrices: what the native kernels compute, against its definition in torch, to the bit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.codec_samples import encode, higgs
from tests.support.kernel_samples import (
    ISAS,
    activations,
    bits,
    every_isa,
    exact,
    needs_native,
    one_thread,
    same_bits,
    seeded,
    stored,
)
from waterfill import kernels
from waterfill.base.native import FLOAT_ACTIVATIONS
from waterfill.codecs.grids import available
from waterfill.codecs.integers import LIMITS, integer_grid
from waterfill.kernels import cpu as native
from waterfill.kernels import reference
from waterfill.kernels.reference import STORED, Packed

# Every width of a bit field with a path of its own, radix words and fields, 8 and 12-bit integers, p from 1 to 4.
CODECS = [
    *(f"higgs-p1-n{n}" for n in (2, 3, 4, 5, 8, 11, 16, 17, 32, 64, 88, 200, 256)),
    *(f"higgs-p2-n{n}" for n in (4, 8, 16, 32, 64, 88, 128, 256, 361, 1024)),
    *(f"higgs-p3-n{n}" for n in (64, 4096)),
    *(f"higgs-p4-n{n}" for n in (8, 16, 32, 64, 128, 256, 512, 4096)),
    "levels-8",
    "levels-16",
]
BYTES, WORDS = "higgs-p2-n16", "higgs-p1-n88"  # one codec of either precision
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SHAPES = [(1, 172), (33, 172), (7, 896), (33, 896), (1, 11008), (7, 11008)]
BATCHES = [(0, F32), (1, F32), (1, F16), (3, BF16), (17, F16), (40, F32), (40, BF16)]


@pytest.fixture(autouse=True)
def _integers_in_one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(FLOAT_ACTIVATIONS, raising=False)
    with one_thread():
        yield


@cache
def defined(codec: str, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """The product of 40 tokens by definition; the same for every instruction set."""
    return reference.matmul_integer(activations(40, shape[1], dtype), stored(codec, *shape))


# ------------------------------------------------------------------------------------------------------------ products


@every_isa
@pytest.mark.parametrize("codec", CODECS)
def test_products_are_those_of_the_definition_to_the_bit(isa: str, codec: str) -> None:
    for shape in SHAPES:
        matrix = native.arrange(stored(codec, *shape), isa)
        for tokens, dtype in BATCHES:
            y = kernels.matmul(activations(40, shape[1], dtype)[:tokens], matrix)
            assert same_bits(y, defined(codec, shape, dtype)[:tokens]), (shape, tokens, dtype)


@needs_native
@settings(max_examples=400)
@given(
    codec=st.sampled_from([*(f"higgs-p{p}-n{n}" for p, n in available()), "levels-8", "levels-16"]),
    isa=st.sampled_from(ISAS or [""]),
    out_features=st.integers(1, 70),
    width=st.integers(1, 2700),
    tokens=st.integers(1, 30),
    seed=st.integers(0, 99),
)
def test_any_shape_and_codec(codec: str, isa: str, out_features: int, width: int, tokens: int, seed: int) -> None:
    packed = stored(codec, out_features, width, seed)
    x = activations(tokens, width, seed=seed)
    assert same_bits(kernels.matmul(x, native.arrange(packed, isa)), reference.matmul_integer(x, packed))


@every_isa
@pytest.mark.parametrize("codec", [BYTES, WORDS, "higgs-p4-n4096"])
@pytest.mark.parametrize("magnitude", [1e-38, 1e-31, 1e-30, 1e-20, 1e20, 1e30, 1e35])
def test_very_small_and_very_large_activations(isa: str, codec: str, magnitude: float) -> None:
    packed, x = stored(codec, 7, 2100), magnitude * activations(14, 2100)
    x[3] *= 1e-4  # tokens have scales of their own
    y, expected = kernels.matmul(x, native.arrange(packed, isa)), reference.matmul_integer(x, packed)
    assert same_bits(y, expected)
    assert torch.isfinite(y).all()
    if magnitude > 1e-30:
        assert (y[0] != 0).any()


@every_isa
@pytest.mark.parametrize("codec", [BYTES, WORDS])
@pytest.mark.parametrize("tokens", [1, 3, 13])
def test_zero_activations_give_exact_zeros(isa: str, codec: str, tokens: int) -> None:
    matrix = native.arrange(stored(codec, 7, 2100), isa)
    for zeros in (torch.zeros(tokens, 2100), torch.full((tokens, 2100), -0.0)):
        assert same_bits(kernels.matmul(zeros, matrix), torch.zeros(tokens, 7))


@every_isa
@pytest.mark.parametrize("codec", [BYTES, WORDS])
@pytest.mark.parametrize("tokens", [1, 3, 13])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so_and_leaves_other_tokens_alone(
    isa: str, codec: str, tokens: int, poison: float
) -> None:
    packed, x = stored(codec, 7, 2100), activations(tokens, 2100)
    matrix, clean = native.arrange(packed, isa), kernels.matmul(x, native.arrange(packed, isa))
    x[tokens // 2, 2099] = poison  # in the last group only
    y, expected = kernels.matmul(x, matrix), reference.matmul_integer(x, packed)
    assert y[tokens // 2].isnan().all()
    assert expected[tokens // 2].isnan().all()
    others = torch.arange(tokens) != tokens // 2
    assert same_bits(y[others], clean[others])
    assert same_bits(expected[others], clean[others])


@every_isa
def test_activations_may_lie_in_memory_in_any_way_and_are_only_read(isa: str) -> None:
    matrix = native.arrange(stored(BYTES, 7, 172), isa)
    base = activations(12, 344)
    kept = base.clone()
    views = [base[:, ::2], base[:, 172:], base.view(344, 12).T[:, 5:177], base[3:4, :172].expand(6, 172), base[0, 172:]]
    for x in views:
        assert same_bits(kernels.matmul(x, matrix), kernels.matmul(x.clone().contiguous(), matrix))
    deep = base.view(2, 3, 4, 172).transpose(0, 2)
    assert same_bits(kernels.matmul(deep, matrix), kernels.matmul(deep.reshape(24, 172), matrix).view(4, 3, 2, 7))
    assert same_bits(base, kept)


@every_isa
def test_double_activations_are_computed_as_floats(isa: str) -> None:
    matrix, x = native.arrange(stored(BYTES, 7, 172), isa), activations(3, 172)
    assert torch.equal(kernels.matmul(x.double(), matrix), kernels.matmul(x, matrix).double())


@pytest.mark.parametrize("layout", [STORED, *ISAS[:1]])
@pytest.mark.parametrize("width", [1, 171, 173, 344])
def test_activations_of_another_width_are_refused(layout: str, width: int) -> None:
    packed = stored(BYTES, 7, 172)
    matrix = packed if layout == STORED else native.arrange(packed, layout)
    with pytest.raises(ValueError, match=f"x has {width} features, but the matrix multiplies 172"):
        kernels.matmul(torch.zeros(2, width), matrix)
    with pytest.raises(ValueError, match=f"x has {width} features"):
        kernels.matmul_many(torch.zeros(2, width), [matrix])


@pytest.mark.parametrize(("codec", "noise"), [(BYTES, 0.011), ("higgs-p1-n4", 0.011), (WORDS, 7e-4)])
def test_integers_cost_little(codec: str, noise: float) -> None:
    """Of Gaussian activations, in 127 steps to the largest of a group, under 1.1 %; in 2047 steps a sixteenth of it."""
    weight = torch.randn(64, 2048, generator=seeded(2))
    encoded = encode(codec, weight)
    packed = Packed(higgs(codec), encoded.buffers["scales"], encoded.buffers["codes"], encoded.exponent, encoded.shape)
    x = activations(32, 2048)
    expected, _ = exact(x, packed)
    error = reference.matmul_integer(x, packed).double() - expected
    assert noise / 3 < error.norm() / expected.norm() < noise


def test_integer_grids_are_close_to_their_points() -> None:
    for p, n in available():
        codec = higgs(f"higgs-p{p}-n{n}")
        grid = integer_grid(codec)
        assert np.abs(grid.units).max() <= LIMITS[grid.precision]
        error = grid.units * grid.step - codec.array.astype(np.float64)
        assert np.square(error).mean() < 0.03 * codec.grid.t2, "rounding adds little to the grid's own error"


# -------------------------------------------------------------------------------------------------- float activations


@every_isa
@pytest.mark.parametrize("codec", CODECS)
def test_float_activations_are_exact_but_for_rounding(isa: str, codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for shape, (tokens, dtype) in zip(SHAPES[1:], itertools.cycle([(3, F32), (17, F32), (0, F32)]), strict=False):
        packed, x = stored(codec, *shape), activations(tokens, shape[1], dtype)
        matrix = native.arrange(packed, isa)
        monkeypatch.setenv(FLOAT_ACTIVATIONS, "float")
        y = kernels.matmul(x, matrix)
        monkeypatch.delenv(FLOAT_ACTIVATIONS)
        expected, magnitude = exact(x, packed)
        # 16 partial sums, the 30 additions of a rotation and a few roundings: each product meets so many
        bound = (shape[1] / 16 + 40) * torch.finfo(F32).eps * magnitude
        assert (y - expected).abs().le(bound).all(), (shape, tokens)
        assert (reference.matmul(x, packed) - expected).abs().le(bound).all()
        assert not tokens or not same_bits(y, kernels.matmul(x, matrix)), "integers give something else"


@every_isa
def test_float_activations_of_half_precision_are_widened(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FLOAT_ACTIVATIONS, "float")
    matrix = native.arrange(stored(BYTES, 7, 172), isa)
    for dtype in (BF16, F16):
        x = activations(3, 172, dtype)
        x[0, :5] = torch.tensor([0.0, -0.0, 6e-8, -3e-6, 1e-38]).to(dtype)  # subnormal numbers too
        assert same_bits(kernels.matmul(x, matrix), kernels.matmul(x.float(), matrix).to(dtype))


# ----------------------------------------------------------------------------------------------------------- several


@pytest.mark.parametrize("mode", ["", "float"])
@pytest.mark.parametrize("layout", [STORED, *ISAS])
@pytest.mark.parametrize("tokens", [0, 1, 5, 13])
def test_many_products_at_once_are_the_separate_ones(
    layout: str, mode: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codecs whose integers have 8 and 12 bits, in either order of columns, take turns."""
    monkeypatch.setenv(FLOAT_ACTIVATIONS, mode)
    names = ["higgs-p1-n4", "higgs-p2-n1024", WORDS, BYTES, "higgs-p3-n64", WORDS, "higgs-p2-n256", "higgs-p4-n4096"]
    matrices = [stored(name, 5 + 3 * i, 1100) for i, name in enumerate(names)]
    if layout != STORED:
        matrices = [native.arrange(matrix, layout) for matrix in matrices]
    x = activations(tokens, 1100, BF16)
    together = kernels.matmul_many(x, matrices)
    assert [tuple(y.shape) for y in together] == [(tokens, 5 + 3 * i) for i in range(len(names))]
    for y, matrix in zip(together, matrices, strict=True):
        assert same_bits(y, kernels.matmul(x, matrix)), matrix.codec.name


# --------------------------------------------------------------------------------------------------------------- rows


@every_isa
@pytest.mark.parametrize("codec", CODECS)
def test_rows_and_the_whole_matrix_are_the_decoded_ones_to_the_bit(isa: str, codec: str) -> None:
    for shape in [(1, 172), (33, 896), (7, 1030), (6, 2561)]:
        packed = stored(codec, *shape)
        matrix, weight = native.arrange(packed, isa), kernels.dense(packed)
        assert same_bits(kernels.dense(matrix), weight)
        rotated = torch.cat([tile for _, _, tile in reference.tiles(packed)])
        assert same_bits(native.rows(matrix, torch.arange(shape[0]), rotated=True), rotated)
        ids = torch.randint(shape[0], (2, 5), generator=seeded(0))  # some twice
        for layout in (packed, matrix):
            assert same_bits(kernels.rows(layout, ids), weight[ids])
            assert same_bits(kernels.rows(layout, ids.T.to(torch.int32)), weight[ids.T])


@pytest.mark.parametrize("layout", [STORED, *ISAS])
def test_ids(layout: str) -> None:
    packed = stored(BYTES, 7, 172)
    matrix = packed if layout == STORED else native.arrange(packed, layout)
    assert kernels.rows(matrix, torch.empty(3, 0, dtype=torch.int64)).shape == (3, 0, 172)
    assert same_bits(kernels.rows(matrix, torch.tensor(6)), kernels.dense(packed)[6])
    for bad in (-1, 7, 1 << 40, -(1 << 40)):
        with pytest.raises(IndexError):
            kernels.rows(matrix, torch.tensor([0, bad, 3]))


def test_half_precision_of_the_samples_is_compared_by_bits() -> None:
    """The comparison itself: equal numbers with other bits differ, equal NaN do not."""
    zeros, nan = torch.zeros(2), torch.full((2,), float("nan"))
    assert not same_bits(zeros, -zeros)
    assert not same_bits(zeros, zeros.half())
    assert same_bits(nan, nan.clone())
    assert bits(zeros.half()).dtype == torch.int16
