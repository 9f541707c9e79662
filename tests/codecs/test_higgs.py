"""The HIGGS codec: what a plan is promised before it sees a weight is what encoding delivers, to the byte."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.codec_samples import decode, encode, higgs, relative_noise
from waterfill.codecs import buffer_bytes, get_codec, scale_exponent
from waterfill.codecs.grids import grid
from waterfill.codecs.hadamard import groups, rotate, unrotate
from waterfill.codecs.indices import unpack
from waterfill.files.architecture import describe, read_rows
from waterfill.files.checkpoint import open_checkpoint
from waterfill.planning.loss import projection, relative_error

WIDTHS = [32, 172, 576, 896, 1028]
OF_EVERY_P = ["higgs-p1-n16", "higgs-p2-n64", "higgs-p3-n64", "higgs-p4-n256"]
GAINS = [0.0, 0.1, 0.5, 1.0]


def per_group(values: torch.Tensor) -> torch.Tensor:
    """Sums over every group of every row, float64 `[rows, groups]`."""
    return torch.stack([values[:, g.start : g.stop].double().sum(1) for g in groups(values.shape[1])], dim=1)


# -- distortion -------------------------------------------------------------------------------------------------------

GAUSSIAN = [
    *("higgs-p1-n2", "higgs-p1-n4", "higgs-p1-n16", "higgs-p1-n256"),
    *("higgs-p2-n4", "higgs-p2-n16", "higgs-p2-n64", "higgs-p2-n256"),
    *("higgs-p3-n8", "higgs-p3-n64", "higgs-p3-n512"),
    *("higgs-p4-n8", "higgs-p4-n256", "higgs-p4-n1024"),
]


@pytest.mark.parametrize("name", GAUSSIAN)
def test_gaussian_weights_lose_what_the_grid_promises(name: str) -> None:
    weight = 0.02 * torch.randn(64, 1024)
    encoded = encode(name, weight)
    promised = get_codec(name).menu_point((64, 1024)).t2
    assert promised == higgs(name).grid.t2
    assert encoded.noise_power / encoded.power == pytest.approx(promised, rel=0.05)
    assert relative_noise(get_codec(name).decode(encoded), weight) == pytest.approx(promised, rel=0.05)


@pytest.mark.parametrize("rho", GAINS)
@pytest.mark.parametrize("name", OF_EVERY_P)
def test_noise_with_a_gain_is_what_the_loss_model_says(name: str, rho: float) -> None:
    weight = torch.randn(64, 1024)
    promised = relative_error(get_codec(name).menu_point((64, 1024)).t2, rho)
    assert relative_noise(decode(name, weight, rho), weight) == pytest.approx(promised, rel=0.05)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", OF_EVERY_P)
def test_reported_noise_is_that_of_the_decoded_rows(name: str, width: int) -> None:
    weight = 3 * torch.randn(7, width)
    encoded = encode(name, weight, rho=0.3)
    noise = (get_codec(name).decode(encoded).double() - weight.double()).square().sum()
    assert encoded.noise_power == pytest.approx(float(noise), rel=1e-4)
    assert encoded.power == pytest.approx(float(weight.double().square().sum()), rel=1e-5)
    assert encoded.shape == (7, width)


@pytest.mark.parametrize("name", ["higgs-p1-n16", "higgs-p2-n64", "higgs-p4-n256"])
def test_trained_weights_lose_what_the_grid_promises(name: str, ref_llama: Path) -> None:
    checkpoint = open_checkpoint(ref_llama)
    codec = get_codec(name)
    ratios = {}
    for matrix in describe(checkpoint).matrices:
        rows = read_rows(checkpoint, matrix, 0, matrix.shape[0])[:: 8 if matrix.role == "embedding" else 1]
        encoded = codec.encode(rows, exponent=scale_exponent(float(rows.abs().max())))
        ratios[matrix.name] = encoded.noise_power / encoded.power / codec.distortion(matrix.shape)
    assert len(ratios) == 43
    assert max(ratios.values()) < 1.05
    assert min(ratios.values()) > 0.94  # less noise than promised: scales follow rows of 256, the grid does not


# -- scales -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", OF_EVERY_P)
def test_mse_scale_is_the_least_squares_one(name: str, width: int) -> None:
    """<w, w'> = |w'|^2 in every group: no other scale has less error."""
    weight = torch.randn(9, width) * torch.logspace(-2, 2, 9)[:, None]
    decoded = decode(name, weight, rho=1.0)
    torch.testing.assert_close(
        per_group(weight * decoded) / per_group(decoded.square()),
        torch.ones(9, len(groups(width)), dtype=torch.float64),
        rtol=0,
        atol=6e-4,  # half a step of fp16
    )


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", OF_EVERY_P)
def test_unbiased_scale_projects_exactly(name: str, width: int) -> None:
    """<w, w'> = |w|^2 in every group."""
    weight = torch.randn(9, width) * torch.logspace(-2, 2, 9)[:, None]
    decoded = decode(name, weight, rho=0.0)
    ratio = per_group(weight * decoded) / per_group(weight.square())
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=6e-4)


@given(name=st.sampled_from(OF_EVERY_P), width=st.sampled_from(WIDTHS), rho=st.floats(0, 1), seed=st.integers(0, 2**31))
@settings(max_examples=60)
def test_every_gain_projects_as_the_loss_model_says(name: str, width: int, rho: float, seed: int) -> None:
    """Per group, with that group's own measured t²; and the direction of the reconstruction does not depend on rho."""
    weight = torch.randn(3, width, generator=torch.Generator().manual_seed(seed))
    decoded = decode(name, weight, rho)
    inner, power, square = per_group(weight * decoded), per_group(weight.square()), per_group(decoded.square())
    t2 = 1 - inner.square() / power / square
    expected = torch.tensor([[projection(float(value), rho) for value in row] for row in t2], dtype=torch.float64)
    torch.testing.assert_close(inner / power, expected, rtol=6e-4, atol=0)
    noise = per_group((decoded - weight).square()) / power
    formula = torch.tensor([[relative_error(float(value), rho) for value in row] for row in t2], dtype=torch.float64)
    torch.testing.assert_close(noise, formula, rtol=0.02, atol=1e-6)


def test_gain_changes_scales_and_not_codes() -> None:
    weight = torch.randn(5, 576)
    mse, unbiased = (encode("higgs-p2-n16", weight, rho).buffers for rho in (1.0, 0.0))
    assert torch.equal(mse["codes"], unbiased["codes"])
    assert (mse["scales"] < unbiased["scales"]).all()


# -- codes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["higgs-p1-n3", "higgs-p1-n16", "higgs-p1-n256", *OF_EVERY_P[1:], "higgs-p2-n1024", "higgs-p4-n4096"]
)
def test_every_code_is_the_nearest_point(name: str) -> None:
    """Brute force in float64, with the last vector of each row filled up with zeros."""
    codec = higgs(name)
    weight = torch.randn(4, 172)
    weight[3] = unrotate(torch.nn.functional.one_hot(torch.tensor(7), 172).float())  # one coordinate of 13, all else 0
    vectors = -(-172 // codec.p)
    codes = unpack(encode(name, weight).buffers["codes"].view(4, -1), vectors, codec.n)
    unit = rotate(weight.double())
    unit = unit / unit.square().mean(1, keepdim=True).sqrt()
    padded = torch.nn.functional.pad(unit, (0, vectors * codec.p - 172)).view(4, vectors, 1, codec.p)
    distances = (padded - codec.grid.points.double()).square().sum(-1)
    chosen = distances.gather(-1, codes[..., None])[..., 0]
    torch.testing.assert_close(chosen, distances.min(-1).values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [*WIDTHS, 1, 5, 2100])
@pytest.mark.parametrize("name", [*OF_EVERY_P, "higgs-p1-n3", "higgs-p3-n8"])
def test_bytes_are_those_of_the_layout(name: str, width: int) -> None:
    codec = get_codec(name)
    for rows in (1, 2, 5):
        layout = codec.layout((rows, width))
        encoded = encode(name, torch.randn(rows, width))
        assert list(layout) == list(encoded.buffers) == ["scales", "codes"]
        assert encoded.buffers["scales"].dtype == torch.float16
        assert encoded.buffers["codes"].dtype == torch.uint8
        assert tuple(encoded.buffers["scales"].shape) == layout["scales"].shape == (rows, len(groups(width)))
        used = rows * layout["codes"].row_bytes
        assert encoded.buffers["codes"].shape == (used,)
        assert layout["codes"].shape == (used + used % 2,)
        assert rows * layout["scales"].row_bytes == encoded.buffers["scales"].nbytes
        point = codec.menu_point((rows, width))
        assert (
            point.size_bytes
            == sum(map(buffer_bytes, layout.values()))
            == used + used % 2 + 2 * rows * len(groups(width))
        )
        assert point.rate_bits == 8 * point.size_bytes / (rows * width)
        assert point.codec == name


@pytest.mark.parametrize(
    ("name", "rate_bits"),
    [("higgs-p1-n4", 2), ("higgs-p1-n3", 1.6016), ("higgs-p2-n16", 2), ("higgs-p4-n256", 2), ("higgs-p2-n64", 3)],
)
def test_rate_is_that_of_the_grid_and_a_scale_per_1024(name: str, rate_bits: float) -> None:
    assert get_codec(name).menu_point((4096, 4096)).rate_bits == pytest.approx(rate_bits + 16 / 1024, rel=3e-4)


@pytest.mark.parametrize("width", [*WIDTHS, 2100])
@pytest.mark.parametrize("name", [*OF_EVERY_P, "higgs-p1-n3"])
def test_blocks_of_rows_are_encoded_as_the_whole(name: str, width: int) -> None:
    weight = torch.randn(23, width)
    exponent = scale_exponent(float(weight.abs().max()))
    codec = get_codec(name)
    whole = codec.encode(weight, exponent=exponent, rho=0.2)
    for step in (1, 7):
        blocks = [codec.encode(block, exponent=exponent, rho=0.2) for block in weight.split(step)]
        for key, data in whole.buffers.items():
            assert torch.equal(torch.cat([block.buffers[key] for block in blocks]), data)
        assert math.fsum(block.noise_power for block in blocks) == pytest.approx(whole.noise_power, rel=1e-6)
        assert math.fsum(block.power for block in blocks) == pytest.approx(whole.power, rel=1e-6)


@pytest.mark.parametrize("name", OF_EVERY_P)
def test_decoding_in_the_rotated_basis_row_by_row(name: str) -> None:
    codec = higgs(name)
    encoded = encode(name, torch.randn(6, 1100))
    codes, scales = encoded.buffers["codes"], encoded.buffers["scales"]
    rotated = codec.decode_rotated(codes, scales, encoded.exponent, 1100)
    decoded = codec.decode(encoded)
    assert rotated.dtype == decoded.dtype == torch.float32
    torch.testing.assert_close(rotate(decoded), rotated, rtol=0, atol=1e-5)
    padded = torch.nn.functional.pad(codes, (0, 2), value=255)
    assert torch.equal(codec.decode_rotated(padded, scales, encoded.exponent, 1100), rotated)
    for row in (0, 5):
        codes_of_row = codes.view(6, -1)[row : row + 1]
        alone = codec.decode_rotated(codes_of_row, scales[row : row + 1], encoded.exponent, 1100)
        assert torch.equal(alone, rotated[row : row + 1])


# -- rows and matrices out of the ordinary ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_input_dtypes(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 172).to(dtype)
    encoded, expected = encode("higgs-p2-n16", weight), encode("higgs-p2-n16", weight.float())
    assert all(torch.equal(encoded.buffers[key], expected.buffers[key]) for key in expected.buffers)
    assert weight.dtype == dtype


@pytest.mark.parametrize("name", [*OF_EVERY_P, "higgs-p1-n2", "higgs-p1-n3"])
@pytest.mark.parametrize("rho", [0.0, 1.0])
def test_zero_rows_stay_zero(name: str, rho: float) -> None:
    weight = torch.randn(5, 1100)
    weight[[0, 3]] = 0
    weight[4, :] = -0.0
    decoded = decode(name, weight, rho)
    assert decoded[[0, 3, 4]].eq(0).all()
    assert decoded.isfinite().all()
    assert decode(name, torch.zeros(2, 172), rho).eq(0).all()
    assert encode(name, torch.zeros(2, 172)).noise_power == 0


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", OF_EVERY_P)
def test_a_single_weight(name: str, width: int) -> None:
    """Its image has entries of like magnitude, which every grid hits about as well as Gaussian ones."""
    weight = torch.zeros(3, width)
    weight[0, 0], weight[1, width - 1], weight[2, width // 2] = 1, -5, 1e-3
    assert relative_noise(decode(name, weight), weight) < 2 * higgs(name).grid.t2
    assert decode(name, weight, rho=0.0).isfinite().all()


@pytest.mark.parametrize("width", [*WIDTHS, 1024])
@pytest.mark.parametrize("name", [*OF_EVERY_P, "higgs-p1-n2", "higgs-p1-n4"])
@pytest.mark.parametrize("rho", [0.0, 1.0])
def test_constant_rows(name: str, width: int, rho: float) -> None:
    """Without signs before the first window, all of such a row would be in one coordinate."""
    weight = torch.tensor([[1.0], [-3.99], [1e-4]]).expand(3, width).contiguous()
    decoded = decode(name, weight, rho)
    expected = relative_error(higgs(name).grid.t2, rho)
    assert relative_noise(decoded, weight) < 2 * expected


@pytest.mark.parametrize("magnitude", [1e-30, 1e-7, 1.0, 65504.0, 1e30])
@pytest.mark.parametrize("name", ["higgs-p1-n16", "higgs-p2-n64"])
def test_any_magnitude(name: str, magnitude: float) -> None:
    """A power of two changes nothing but the exponent; any other factor changes roundings alone."""
    weight = torch.randn(4, 576)
    power_of_two = 2.0 ** round(math.log2(magnitude))
    encoded, shifted = encode(name, weight), encode(name, weight * power_of_two)
    assert shifted.exponent - encoded.exponent == round(math.log2(magnitude))
    assert all(torch.equal(shifted.buffers[key], encoded.buffers[key]) for key in encoded.buffers)
    assert torch.equal(higgs(name).decode(shifted), higgs(name).decode(encoded) * power_of_two)
    scaled = weight * magnitude
    assert relative_noise(decode(name, scaled) / magnitude, scaled / magnitude) == pytest.approx(
        relative_noise(decode(name, weight), weight), rel=0.01
    )


@pytest.mark.parametrize("magnitude", [1e-45, 1e-38, 1e-36])
def test_vanishing_matrices_are_stored_as_well_as_fp16_can(magnitude: float) -> None:
    weight = torch.randn(4, 576).clamp(-3, 3) / 3 * magnitude
    weight[0, 0] = magnitude
    encoded = encode("higgs-p1-n16", weight)
    assert math.isfinite(encoded.noise_power)
    assert encoded.noise_power <= 1.001 * encoded.power
    decoded = higgs("higgs-p1-n16").decode(encoded)
    assert decoded.isfinite().all()
    assert float(decoded.abs().max()) <= 10 * magnitude


@given(st.floats(2.0**-100, 1e38, exclude_min=True))
def test_exponent_gives_the_scales_twelve_bits_of_headroom(largest: float) -> None:
    exponent = scale_exponent(largest)
    assert 2.0**11 <= largest / 2.0**exponent < 2.0**12
    assert scale_exponent(largest * 2) == exponent + 1


def test_exponent_of_nothing() -> None:
    assert scale_exponent(0.0) == 0
    assert scale_exponent(1e-45) == scale_exponent(2.0**-101)


def test_rows_of_very_different_power() -> None:
    """Rows a millionth as large as the largest keep their precision: scales have a range, not just digits."""
    weight = torch.randn(5, 576) * torch.tensor([1e-6, 1e-4, 1e-2, 1, 100.0])[:, None]
    decoded = decode("higgs-p1-n16", weight)
    noise = per_group((decoded - weight).square()) / per_group(weight.square())
    torch.testing.assert_close(noise[:, 0], torch.full((5,), grid(1, 16).t2, dtype=torch.float64), rtol=0.35, atol=0)
