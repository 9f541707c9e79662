"""The rotation: orthonormal, the same bits everywhere, and what it is for: rows of any kind become Gaussian."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import hadamard

from waterfill.base import native
from waterfill.codecs import hadamard as module
from waterfill.codecs.grids import grid
from waterfill.codecs.hadamard import MAX_BLOCK, Group, fwht_, groups, rotate, signs, unrotate

AWKWARD = [172, 576, 768, 896, 1024, 1028]
ALL_KINDS = [1, 2, 3, 7, 64, 127, *AWKWARD, 1535, 1536, 2048, 4100, 11008, 14336]


def integers(rows: int, width: int) -> torch.Tensor:
    """Whole numbers from -2048 to 2047, float32 `[rows, width]`: Knuth's multiplicative hash of the position."""
    position = torch.arange(rows * width, dtype=torch.int64)
    return ((position * 2654435761 % 2**32 >> 20) - 2048).view(rows, width).to(torch.float32)


# -- groups -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [range(1, 2101), [2559, 2560, 4096, 4100, 11008, 14336, 28672, 53248]])
def test_groups_partition_the_row(widths: range | list[int]) -> None:
    for width in widths:
        parts = groups(width)
        assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])], width
        assert parts[-1].stop == width, width
        assert all(part.size == MAX_BLOCK for part in parts[:-1]), width
        assert parts[-1].size == width or 512 <= parts[-1].size <= 1535, width
        assert all(part.size >= 512 for part in parts) or width < 1024, width
        assert all(part.size <= 1535 for part in parts), width


def test_windows_cover_their_group_with_large_powers_of_two() -> None:
    for width in range(1, 2101):
        for part in groups(width):
            sizes = {stop - start for start, stop in part.windows}
            assert len(sizes) == 1
            block = sizes.pop()
            assert block & (block - 1) == 0
            assert part.size / 2 < block <= min(part.size, MAX_BLOCK)
            assert part.windows[0][0] == part.start
            assert max(stop for _, stop in part.windows) == part.stop
            assert len(part.windows) == (1 if block == part.size else 3)


def test_groups_of_the_documented_widths() -> None:
    assert groups(4096) == tuple(Group(a, a + 1024, ((a, a + 1024),)) for a in range(0, 4096, 1024))
    last = groups(11008)[-1]
    assert len(groups(11008)) == 11
    assert [(a - last.start, b - last.start) for a, b in last.windows] == [(0, 512), (256, 768), (0, 512)]
    assert groups(172) == (Group(0, 172, ((0, 128), (44, 172), (0, 128))),)


@pytest.mark.parametrize("width", [0, -4])
def test_a_row_without_coordinates_is_refused(width: int) -> None:
    with pytest.raises(ValueError, match=f"at least one coordinate, got width {width}"):
        groups(width)


# -- the transform ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 8, 64, 512, 1024])
def test_powers_of_two_are_sylvesters_hadamard_matrix_after_signs(size: int) -> None:
    expected = torch.from_numpy(hadamard(size) / math.sqrt(size))
    torch.testing.assert_close(fwht_(torch.eye(size, dtype=torch.float64)), expected)
    torch.testing.assert_close(rotate(torch.diag(signs(size, 0).double())), expected)


def sign_by_definition(coordinate: int, window: int) -> int:
    mixed = ((coordinate + (window + 1) * 7919) * 0x9E3779B1) % 2**32
    mixed = ((mixed ^ (mixed >> 15)) * 0x85EBCA77) % 2**32
    return -1 if mixed >> 31 else 1


def rotation_by_definition(width: int) -> np.ndarray:
    """`[width, width]`, to be multiplied with columns: the product of windows and signs, written out."""
    product = np.eye(width)
    for part in groups(width):
        for window, (start, stop) in enumerate(part.windows):
            flips = [sign_by_definition(i, window) for i in range(part.size)]
            product[part.start : part.stop] *= np.array(flips)[:, None]
            product[start:stop] = hadamard(stop - start) @ product[start:stop] / math.sqrt(stop - start)
    return product


@pytest.mark.parametrize("width", [3, 7, 64, 100, 172, 1028, 1600])
def test_equals_the_product_of_windows_and_signs(width: int) -> None:
    rotated = rotate(torch.eye(width, dtype=torch.float64))
    torch.testing.assert_close(rotated, torch.from_numpy(rotation_by_definition(width).T))


@pytest.mark.parametrize("width", [1, 2, 3, 5, 33, *AWKWARD, 1535, 1536])
def test_orthonormal(width: int) -> None:
    matrix = rotate(torch.eye(width, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("width", ALL_KINDS)
def test_unrotate_is_the_inverse(width: int) -> None:
    x = torch.randn(3, width, dtype=torch.float64)
    torch.testing.assert_close(unrotate(rotate(x)), x, rtol=0, atol=1e-13)
    torch.testing.assert_close(rotate(unrotate(x)), x, rtol=0, atol=1e-13)


@given(st.integers(1, 2100), st.integers(0, 2**32))
def test_keeps_the_norm_of_every_group(width: int, seed: int) -> None:
    x = torch.randn(2, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rotated = rotate(x)
    for part in groups(width):
        before, after = (values[:, part.start : part.stop].norm(dim=1) for values in (x, rotated))
        torch.testing.assert_close(after, before, rtol=1e-12, atol=0)


GOLDEN = {
    64: "6690ad9d0d6d2cfb",
    172: "ef6f2970affcac6f",
    576: "b2f536db445d465e",
    896: "50c38dcc22574936",
    1028: "7162bed6a1731e95",
    11008: "c522256f43a3f9a8",
}


@pytest.mark.parametrize("width", GOLDEN)
def test_exact_bits(width: int) -> None:
    rotated = rotate(integers(3, width))
    assert hashlib.blake2b(rotated.numpy().tobytes(), digest_size=8).hexdigest() == GOLDEN[width]


@pytest.mark.parametrize("width", [172, 1024, 11008])
def test_bits_do_not_depend_on_the_rows_beside(width: int) -> None:
    x = torch.randn(37, width)
    rotated = rotate(x)
    assert torch.equal(torch.cat([rotate(row[None]) for row in x]), rotated)
    assert torch.equal(rotate(x.T.contiguous().T), rotated)  # nor on how the rows lie in memory


# -- shapes, dtypes, autograd -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [64, 172, 1028, 4100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 0.1)])
def test_keeps_the_dtype_and_its_precision(width: int, dtype: torch.dtype, tolerance: float) -> None:
    x = torch.randn(5, width).to(dtype)
    before = x.clone()
    rotated = rotate(x)
    assert rotated.dtype == unrotate(x).dtype == dtype
    assert rotated.data_ptr() != x.data_ptr()
    assert torch.equal(x, before)
    torch.testing.assert_close(rotated.double(), rotate(x.double()), rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", [(172,), (1, 172), (2, 3, 172), (2, 1, 3, 1028), (4100,), (0, 576)])
def test_any_number_of_leading_axes(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    rotated = rotate(x)
    assert rotated.shape == shape
    assert torch.equal(rotated.reshape(-1, shape[-1]), rotate(x.reshape(-1, shape[-1])))


def test_strided_input() -> None:
    x = torch.randn(4, 10, 172)
    for view in (x[:, ::2], x.transpose(0, 1), torch.randn(172, 6).T):
        assert torch.equal(rotate(view), rotate(view.contiguous()))


@pytest.mark.parametrize("width", [8, 7, 1028])
def test_gradients_are_rotated_back(width: int) -> None:
    x = torch.randn(2, width, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, width, dtype=torch.float64)
    rotate(x).backward(upstream)
    torch.testing.assert_close(x.grad, unrotate(upstream))


def test_gradients_after_inference_mode_and_the_meta_device() -> None:
    """The signs are cached: those of the first call must serve whatever comes after."""
    signs.cache_clear()
    with torch.inference_mode():
        rotate(torch.randn(172))
    x = torch.randn(172, requires_grad=True)
    rotate(x).sum().backward()
    assert x.grad is not None
    signs.cache_clear()
    with torch.device("meta"):
        assert rotate(torch.randn(172)).device.type == "meta"
    assert rotate(torch.randn(172)).isfinite().all()


def test_fwht_works_in_place_on_a_slice() -> None:
    x = torch.randn(3, 20, dtype=torch.float64)
    expected = x.clone()
    expected[:, 4:12] @= torch.from_numpy(hadamard(8) / math.sqrt(8))
    assert fwht_(x[:, 4:12]).data_ptr() == x[:, 4:12].data_ptr()
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("size", [0, 3, 172])
def test_fwht_needs_a_power_of_two(size: int) -> None:
    with pytest.raises(ValueError, match=f"needs a power of two, got {size}"):
        fwht_(torch.zeros(2, size))


# -- what it is for ---------------------------------------------------------------------------------------------------


def t2_over_grids(weight: torch.Tensor) -> float:
    """t² of `weight` quantised to 16 levels a weight, group by group, over the t² that Gaussian weights would have."""
    points = grid(1, 16).points[:, 0]
    rotated = rotate(weight)
    noise = 0.0
    for part in groups(weight.shape[1]):
        x = rotated[:, part.start : part.stop]
        unit = x / x.square().mean(1, keepdim=True).sqrt()
        q = points[torch.bucketize(unit, (points[1:] + points[:-1]) / 2)]
        cosine2 = (x * q).sum(1).square() / (x.square().sum(1) * q.square().sum(1))
        noise += float((x.square().sum(1) * (1 - cosine2)).sum())  # with the best scale
    return noise / float(weight.square().sum()) / grid(1, 16).t2


def one_huge_column(normal: torch.Tensor, place: float) -> torch.Tensor:
    factor = torch.ones(normal.shape[1])
    factor[int(place * (normal.shape[1] - 1))] = 30
    return normal * factor


HEAVY_TAILS = {
    "huge first column": lambda normal: one_huge_column(normal, 0),
    "huge middle column": lambda normal: one_huge_column(normal, 0.5),
    "huge last column": lambda normal: one_huge_column(normal, 1),
    "log-normal": lambda normal: normal * torch.randn_like(normal).exp(),
    "log-normal columns": lambda normal: normal * torch.randn(normal.shape[1]).exp(),
    "1 % outliers": lambda normal: torch.where(torch.rand_like(normal) < 0.01, 20 * normal, normal),
    "constant rows": lambda normal: torch.ones_like(normal) + 0.01 * normal,
    "alternating blocks": lambda normal: normal + 3 * (-1.0) ** (torch.arange(normal.shape[1]) // 32),
    "Student t": lambda normal: torch.distributions.StudentT(3.0).sample(normal.shape),
}


@pytest.mark.parametrize("width", AWKWARD)
@pytest.mark.parametrize("kind", HEAVY_TAILS)
def test_heavy_tailed_rows_become_gaussian(kind: str, width: int) -> None:
    """Within 25 % of what the grid promises for Gaussian weights, at widths that are no power of two."""
    assert t2_over_grids(HEAVY_TAILS[kind](torch.randn(256, width))) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("width", AWKWARD)
def test_without_signs_they_would_not(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Overlapping windows alone undo one another; here is what the signs between them prevent."""
    monkeypatch.setattr(module, "signs", lambda size, window: torch.ones(size))
    monkeypatch.setattr(native, "isa", lambda: None)  # the native transform has its own
    assert max(t2_over_grids(make(torch.randn(256, width))) for make in HEAVY_TAILS.values()) > 4


@pytest.mark.parametrize("width", [96, *AWKWARD, 1535])
def test_no_single_weight_stays_concentrated(width: int) -> None:
    """The image of every unit vector looks Gaussian (kurtosis 3), where an unmixed one would have kurtosis `width`."""
    images = rotate(torch.eye(width, dtype=torch.float64))
    assert float((images**4).mean(1).max()) * width**2 < 5


def test_signs_are_balanced_and_differ_between_windows() -> None:
    first, second = signs(1024, 0), signs(1024, 1)
    assert set(first.tolist()) == {-1.0, 1.0}
    assert abs(float(first.sum())) < 4 * math.sqrt(1024)
    assert abs(float((first * second).sum())) < 4 * math.sqrt(1024)
