"""The trellis codec: promised bytes and distortion, streams that native code and reference read alike, damage."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.codec_samples import relative_noise
from tests.support.kernel_samples import ISAS, LIBRARY, seeded
from waterfill.base.errors import ArtifactError, WaterfillError
from waterfill.codecs import Encoded, Trellis, get_codec, scale_exponent
from waterfill.codecs.hadamard import groups, rotate, unrotate
from waterfill.codecs.trellis.bitstream import scale_values, stream_rows
from waterfill.codecs.trellis.codec import LEAST_RATE, MOST_RATE, _decode_reference
from waterfill.codecs.trellis.curves import STATES
from waterfill.codecs.trellis.sizes import least_bytes

Shape = tuple[int, int]


def trellis(states: int = 8, rate: float = 3.0) -> Trellis:
    codec = get_codec(f"trellis-s{states}-r{rate:.4f}")
    assert isinstance(codec, Trellis)
    return codec


def gaussian(shape: Shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed))


def encoded(codec: Trellis, weight: torch.Tensor, rho: float = 1.0) -> Encoded:
    return codec.encode(weight, exponent=scale_exponent(float(weight.abs().max())), rho=rho)


def native_levels(codec: Trellis, isa: str, data: np.ndarray, shape: Shape) -> tuple[int, np.ndarray, np.ndarray]:
    """(status, codes, scales) of one instruction set."""
    assert LIBRARY is not None
    item = 2 if codec.wide else 1
    codes = np.zeros(math.prod(shape) * item, np.uint8)
    scales = np.zeros((shape[0], len(groups(shape[1]))), np.float16)
    source = np.ascontiguousarray(data)
    status = LIBRARY.raw.wf_trellis_decode(
        LIBRARY.isas[isa], codec.states, int(codec.wide), source.ctypes.data, len(source), *shape,
        codes.ctypes.data, scales.ctypes.data,
    )  # fmt: skip
    return status, codes, scales


def reference_levels(codec: Trellis, data: np.ndarray, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    codes = np.zeros(math.prod(shape) * (2 if codec.wide else 1), np.uint8)
    scales = np.zeros((shape[0], len(groups(shape[1]))), np.float16)
    _decode_reference(codec, data, shape, codes, scales)
    return codes, scales


# ------------------------------------------------------------------------------------------------------------- promises


@pytest.mark.parametrize("states", [1, 8, 64])
@pytest.mark.parametrize("rate", [0.5, 1.0, 2.0, 3.25, 4.5, 5.0, 7.0])
def test_bytes_are_as_promised_and_so_is_the_distortion(states: int, rate: float) -> None:
    codec, weight = trellis(states, rate), gaussian((512, 1024))
    matrix = encoded(codec, weight)
    assert matrix.buffers["streams"].numel() == 2 * int(rate * weight.numel() / 16)
    noise = relative_noise(codec.decode(matrix), weight)
    assert noise == pytest.approx(codec.distortion((512, 1024)), rel=0.02)
    assert noise == pytest.approx(matrix.noise_power / matrix.power, rel=1e-4)
    assert codec.menu_point((512, 1024)).rate_bits == pytest.approx(rate, abs=1e-4)


def test_sixty_four_states_are_within_six_hundredths_of_a_bit_of_the_bound() -> None:
    """Everything counted: streams, index, scales, states of the coder, padding."""
    weight = gaussian((1024, 1024), seed=3)
    for states, bits in ((8, 0.10), (64, 0.06)):
        for rate in (1.0, 2.0, 4.0):
            noise = relative_noise(trellis(states, rate).decode(encoded(trellis(states, rate), weight)), weight)
            assert rate + 0.5 * math.log2(noise) < bits


def test_rows_of_different_size_have_one_relative_error() -> None:
    weight = gaussian((256, 1024)) * torch.logspace(-3, 3, 256)[:, None]
    codec = trellis(8, 3.0)
    decoded = codec.decode(encoded(codec, weight))
    each = (decoded - weight).square().sum(1) / weight.square().sum(1)
    assert float(each.max()) < 2.0 * float(each.min())
    assert float(each.mean()) == pytest.approx(codec.distortion((256, 1024)), rel=0.1)


@pytest.mark.parametrize("rho", [0.0, 0.3, 1.0])
def test_the_gain_is_what_rho_asks_for(rho: float) -> None:
    codec, weight = trellis(8, 1.5), gaussian((256, 1024))
    decoded = codec.decode(encoded(codec, weight, rho)).double()
    u = float((decoded * weight).sum() / weight.double().square().sum())
    t2 = codec.distortion((256, 1024))
    assert u == pytest.approx((1 - t2) / (1 - t2 + rho * t2), rel=0.01)


@settings(max_examples=25)
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 1600)),
    st.sampled_from(STATES),
    st.floats(LEAST_RATE, MOST_RATE),
    st.integers(0, 99),
)
def test_any_shape_and_rate_keeps_its_bytes(shape: Shape, states: int, rate: float, seed: int) -> None:
    codec = trellis(states, rate)
    weight = gaussian(shape, seed)
    matrix = encoded(codec, weight)
    size = matrix.buffers["streams"].numel()
    assert size == codec.layout(shape)["streams"].shape[0]
    assert size <= max(codec.rate * math.prod(shape) / 8, least_bytes(shape))
    expected = reference_levels(codec, matrix.buffers["streams"].numpy(), shape)
    for isa in ISAS:
        status, codes, scales = native_levels(codec, isa, matrix.buffers["streams"].numpy(), shape)
        assert status == 0
        assert (codes == expected[0]).all()
        assert (scales == expected[1]).all()


@pytest.mark.parametrize("rate", [0.3, 2.0, 6.0])
def test_several_streams_of_a_large_matrix(rate: float) -> None:
    shape = (3 * stream_rows(2048) + 5, 2048)
    codec, weight = trellis(8, rate), gaussian(shape)
    matrix = encoded(codec, weight)
    assert relative_noise(codec.decode(matrix), weight) == pytest.approx(codec.distortion(shape), rel=0.02)
    ends = matrix.buffers["streams"].numpy()[:16].view("<u4")
    assert matrix.buffers["streams"].numel() - ends[-1] < 64  # hardly anything is padding
    sizes = np.diff([16, *ends.tolist()])[:3]
    assert sizes.max() < 1.02 * sizes.min()
    expected = reference_levels(codec, matrix.buffers["streams"].numpy(), shape)[0]
    assert (codec.to_levels(matrix.buffers["streams"], shape)[0].numpy() == expected).all()


def test_blocks_of_rows_give_the_same_bytes_as_a_whole_matrix_in_any_number_of_threads() -> None:
    shape = (5 * stream_rows(4096), 4096)
    codec, weight = trellis(8, 2.0), gaussian(shape)
    whole = encoded(codec, weight).buffers["streams"]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(encoded(codec, weight).buffers["streams"], whole)
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------- unusual matrices


def test_zeros_stay_zeros() -> None:
    codec = trellis()
    assert not codec.decode(encoded(codec, torch.zeros(64, 256))).any()
    weight = gaussian((64, 256))
    weight[::3] = 0
    decoded = codec.decode(encoded(codec, weight))
    assert not decoded[::3].any()
    assert relative_noise(decoded, weight) < 0.02


@pytest.mark.parametrize("kind", ["constant", "one large", "heavy tails", "two values", "uniform", "tiny"])
def test_matrices_that_are_not_gaussian(kind: str) -> None:
    weight = gaussian((128, 512))
    match kind:
        case "constant":
            weight = torch.full((128, 512), 0.37)
        case "one large":
            weight[5, 7] = 1e4
        case "heavy tails":
            weight = weight**5
        case "uniform":
            weight = unrotate(torch.rand(128, 512, generator=seeded(1)) - 0.5)
        case "two values":
            weight = weight.sign()
        case "tiny":
            weight *= 1e-20
    for codec in (trellis(8, 3.0), trellis(8, 7.5)):
        assert relative_noise(codec.decode(encoded(codec, weight)), weight) < 1.3 * codec.distortion((128, 512))


def test_bfloat16_is_encoded_as_float32() -> None:
    codec, weight = trellis(), gaussian((32, 256)).bfloat16()
    assert torch.equal(encoded(codec, weight).buffers["streams"], encoded(codec, weight.float()).buffers["streams"])


def test_scales_are_eighths_of_an_octave() -> None:
    scales = scale_values(np.array([0, 1, 9, 17, 5]), 0.75).astype(np.float32)
    assert scales[:4].tolist() == [0.0, 0.75, 1.5, 3.0]
    assert scales[4] == pytest.approx(0.75 * 2**0.5, rel=1e-3)
    weight = gaussian((64, 512)) * torch.logspace(0, 2, 64)[:, None]
    codec = trellis(8, 4.0)
    stored = codec.to_levels(encoded(codec, weight).buffers["streams"], (64, 512))[1].float()[:, 0]
    deviation = rotate(weight).square().mean(1).sqrt()
    assert float((stored / deviation).log2().std()) < 0.06


# ------------------------------------------------------------------------------------------------------- names, damage


@pytest.mark.parametrize(
    "name",
    ["trellis", "trellis-s8", "trellis-s8-r3", "trellis-s9-r3.0000", "trellis-s8-r0.2999", "trellis-s8-r9.0001"],
)
def test_names_that_are_no_codec(name: str) -> None:
    with pytest.raises(WaterfillError, match=r"is not a trellis codec; expected a name like trellis-s64-r3\.0000"):
        get_codec(name)


def test_wide_levels_are_a_form_in_memory() -> None:
    with pytest.raises(WaterfillError, match="neither levels-8 nor levels-16"):
        get_codec("levels-4")
    for action in (lambda c: c.encode(gaussian((2, 8))), lambda c: c.distortion((2, 8))):
        with pytest.raises(WaterfillError, match="nothing can be packed with it"):
            action(get_codec("levels-16"))


@settings(max_examples=200)
@given(st.data())
def test_damaged_streams_are_refused_by_all_or_read_alike_by_all(data: st.DataObject) -> None:
    rate = data.draw(st.sampled_from([0.5, 3.0, 6.0]))
    codec, shape = trellis(8, rate), (8, 300)
    good = encoded(codec, gaussian(shape)).buffers["streams"].numpy().copy()
    kind = data.draw(st.sampled_from(["flip", "cut", "byte", "index"]))
    if kind == "cut":
        good = good[: data.draw(st.integers(0, len(good) - 1))]
    elif kind == "index":
        good[:4].view("<u4")[0] = data.draw(st.integers(0, 2**32 - 1))
    else:
        place = data.draw(st.integers(0, len(good) - 1)) if data.draw(st.booleans()) else data.draw(st.integers(0, 40))
        good[place] = (
            good[place] ^ (1 << data.draw(st.integers(0, 7))) if kind == "flip" else data.draw(st.integers(0, 255))
        )
    try:
        expected = reference_levels(codec, good, shape)
    except ArtifactError:
        expected = None
    for isa in ISAS:
        status, codes, scales = native_levels(codec, isa, good, shape)
        assert (status == 0) == (expected is not None)
        if expected is not None:
            assert (codes == expected[0]).all()
            assert (scales.view(np.uint16) == expected[1].view(np.uint16)).all()


def test_the_message_names_the_stream() -> None:
    codec, shape = trellis(8, 2.0), (3 * stream_rows(2048), 2048)
    streams = encoded(codec, gaussian(shape)).buffers["streams"].clone()
    start = int(streams[:12].numpy().view("<u4")[0])
    streams[start + 5000] ^= 1
    with pytest.raises(ArtifactError, match="stream 1 of an entropy-coded matrix is damaged; fetch"):
        codec.to_levels(streams, shape)


def test_what_follows_the_last_stream_has_to_be_zeros() -> None:
    codec, shape = trellis(8, 1.0), (2 * stream_rows(2048), 2048)
    streams = encoded(codec, gaussian(shape)).buffers["streams"].numpy()
    padded = np.append(streams, np.zeros(2, np.uint8))
    assert all(native_levels(codec, isa, padded, shape)[0] == 0 for isa in ISAS)
    reference_levels(codec, padded, shape)
    padded[-1] = 1
    with pytest.raises(ArtifactError, match="stream 1 of an entropy-coded matrix is damaged") as refused:
        reference_levels(codec, padded, shape)
    assert "not zeros" in str(refused.value.__cause__)
    assert [native_levels(codec, isa, padded, shape)[0] for isa in ISAS] == [-3 - 1] * len(ISAS)
