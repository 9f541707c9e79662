"""The lossless codec: every bit comes back, the bytes are those of the reference, and damage is refused."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from waterfill.base import native
from waterfill.base.dtypes import TORCH_DTYPES, WEIGHT_DTYPES
from waterfill.base.errors import ArtifactError
from waterfill.codecs import lossless
from waterfill.codecs.entropy import DamagedError

NAMES = {TORCH_DTYPES[name]: name for name in WEIGHT_DTYPES}
DTYPES = list(NAMES)
N = lossless.STREAM_NUMBERS
SIGNED = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_round_trip(tensor: torch.Tensor) -> torch.Tensor:
    buffer = lossless.encode(tensor)
    assert buffer.dtype == torch.uint8
    assert len(buffer) % 2 == 0
    decoded = lossless.decode(buffer, tuple(tensor.shape), tensor.dtype)
    assert decoded.dtype == tensor.dtype
    assert decoded.shape == tensor.shape
    assert bits(decoded) == bits(tensor)
    values = lossless.decode_floats(buffer.numpy(), tuple(tensor.shape), NAMES[tensor.dtype])
    assert (values.dtype, values.shape) == (np.float32, tuple(tensor.shape))
    assert np.array_equal(values, tensor.to(torch.float32).numpy(), equal_nan=True)
    return buffer


def gaussian(count: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return (0.02 * torch.randn(count, generator=torch.Generator().manual_seed(seed))).to(dtype)


def patterns(dtype: torch.dtype) -> torch.Tensor:
    """Zeros of both signs, infinities, NaN with payloads, denormals, the least and the greatest numbers."""
    item = dtype.itemsize * 8
    mantissa = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}[dtype]
    top = ((1 << (item - 1 - mantissa)) - 1) << mantissa
    found = [0, 1, 2, (1 << mantissa) - 1, 1 << mantissa, top - 1, top, top + 1, top + (1 << mantissa) - 1]
    found += [value | 1 << (item - 1) for value in found]
    signed = [value - (1 << item) if value >> (item - 1) else value for value in found]
    return torch.tensor(signed, dtype=SIGNED[dtype]).view(dtype)


@pytest.fixture(params=["native", "none"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """With the native library, and by the reference."""
    if request.param == "none":
        monkeypatch.setenv(native.ISA_VARIABLE, "none")
    elif native.library() is None:
        pytest.skip("the native kernels were not built")
    native.isa.cache_clear()
    yield request.param
    monkeypatch.undo()
    native.isa.cache_clear()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 5), (2, 3), (5, 7, 11), (200, 129), (1, 1, 40_001)])
def test_every_shape_comes_back(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert_round_trip(gaussian(int(np.prod(shape)), dtype).reshape(shape))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_are_no_ordinary_ones(dtype: torch.dtype) -> None:
    odd = patterns(dtype)
    assert_round_trip(odd)
    assert_round_trip(odd.repeat(300))
    assert_round_trip(torch.cat([gaussian(9000, dtype), odd, gaussian(30, dtype)]))
    assert_round_trip(torch.full((70_000,), float("nan"), dtype=dtype))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
def test_constants_take_next_to_nothing(dtype: torch.dtype) -> None:
    for value in (0.0, 1.0, -0.0123):
        assert len(assert_round_trip(torch.full((N,), value, dtype=dtype))) < 600


@pytest.mark.usefixtures("isa")
def test_noise_takes_a_byte_more_per_stream() -> None:
    noise = torch.randint(-(1 << 15), 1 << 15, (50_000,), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    assert len(assert_round_trip(noise.view(torch.float16))) == 4 + 1 + 2 * 50_000 + 1


@settings(max_examples=60)
@given(data=st.binary(max_size=4000), dtype=st.sampled_from(DTYPES), repeat=st.integers(1, 40))
def test_any_bits_come_back(data: bytes, dtype: torch.dtype, repeat: int) -> None:
    data = data[: len(data) // dtype.itemsize * dtype.itemsize] * repeat
    assert_round_trip(torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype))


@settings(max_examples=40)
@given(
    scale=st.integers(-120, 120),
    count=st.integers(1, 20_000),
    kinds=st.integers(1, 400),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_native_and_reference_write_the_same_bytes(
    scale: int, count: int, kinds: int, dtype: torch.dtype, seed: int
) -> None:
    if native.library() is None:
        pytest.skip("the native kernels were not built")
    draw = torch.Generator().manual_seed(seed)
    values = (torch.randn(kinds, generator=draw).double() * 2.0**scale).to(dtype)
    numbers = values[torch.randint(kinds, (count,), generator=draw)]
    (stream,) = lossless.encode_streams([numbers])
    assert stream == lossless.encode_reference(numbers.view(torch.uint8).numpy(), dtype.itemsize)
    assert lossless.decode_reference(stream, dtype.itemsize, count).tobytes() == bits(numbers)


def test_the_bytes_of_an_example() -> None:
    """As docs/format.md shows them."""
    tensor = torch.tensor([1.0, -1.5, 2.0, 1.25] * 8).to(torch.bfloat16)
    buffer = assert_round_trip(tensor).numpy().tobytes()
    lengths, head, mantissas, rest = buffer[:4], buffer[4:5], buffer[5:37], buffer[37:]
    assert head == b"\x01"  # the plane of exponents alone
    assert mantissas == bytes([0x00, 0x81, 0x00, 0x40] * 8)
    # first symbol 127, last 128, both occur, frequencies 3072 and 1024; then one state and its words
    assert rest[:6] == bytes([127, 128, 0b11, 0x00, 0x0C, 0x40])
    assert rest[6:] == bytes.fromhex("1aa1d803 d0b8 00")  # a zero byte makes their number even
    assert int.from_bytes(lengths, "little") == 1 + 32 + 6 + 4 + 2


def test_every_instruction_set_decodes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    library = native.library()
    if library is None:
        pytest.skip("the native kernels were not built")
    samples = [gaussian(N + 50_000, dtype) for dtype in DTYPES]
    buffers = [lossless.encode(sample) for sample in samples]
    for name in library.isas:
        monkeypatch.setattr(native, "isa", lambda name=name: name)
        for sample, buffer in zip(samples, buffers, strict=True):
            assert bits(lossless.decode(buffer, tuple(sample.shape), sample.dtype)) == bits(sample), name


def test_several_streams_and_parts_of_any_length() -> None:
    tensor = gaussian(2 * N + 12_345, torch.bfloat16)
    buffer = assert_round_trip(tensor)
    sizes = np.frombuffer(buffer.numpy(), "<u4", 3)
    assert len(buffer) == lossless.buffer_bytes(sizes.tolist())
    cuts = [0, 1, 1, 77_777, N, N + 1, 2 * N + 5, 2 * N + 12_345]
    parts = [tensor[a:b] for a, b in pairwise(cuts)]
    data = b"".join(lossless.encode_streams(parts))
    assert buffer.numpy()[12 : 12 + len(data)].tobytes() == data
    many = gaussian(lossless.BLOCK_STREAMS * N + N + 3, torch.bfloat16)
    assert_round_trip(many)
    transposed = tensor[: 512 * 600].view(512, 600).T
    assert_round_trip(transposed)


@pytest.mark.parametrize(("dtype", "planes"), [(torch.bfloat16, 1), (torch.float16, 1), (torch.float32, 1)])
def test_within_half_a_percent_of_the_entropy_of_exponents(dtype: torch.dtype, planes: int) -> None:
    """Of weights: the other fields are left as they are."""
    tensor = gaussian(4 * N, dtype)
    mantissa = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}[dtype]
    exponent = (
        tensor.view(SIGNED[dtype]).numpy().astype(np.int64) >> mantissa & (1 << 8 * dtype.itemsize - 1 - mantissa) - 1
    )
    share = np.bincount(exponent) / len(exponent)
    entropy = -float(np.sum(share[share > 0] * np.log2(share[share > 0])))
    ideal = (entropy + 1 + mantissa) * len(exponent) / 8
    assert ideal * 0.99 < len(lossless.encode(tensor)) < ideal * 1.005


def test_weights_that_came_from_fewer_bits_pay_for_those_only() -> None:
    tensor = gaussian(2 * N, torch.bfloat16)
    assert len(lossless.encode(tensor.float())) < 1.01 * len(lossless.encode(tensor))
    assert len(lossless.encode(gaussian(2 * N, torch.float32).half().float())) < 0.86 / 2 * 4 * 2 * N


def test_logarithms_are_the_same_on_every_machine() -> None:
    exact = np.log2(np.arange(1, 4097)) * 2**lossless.LOG_BITS
    assert np.abs(exact - np.floor(exact) - 0.5).min() > 1e-6


# ------------------------------------------------------------------------------------------------------------- damage


@pytest.fixture(scope="module", params=DTYPES)
def sample(request: pytest.FixtureRequest) -> tuple[torch.Tensor, torch.Tensor]:
    tensor = gaussian(9_000, torch.bfloat16).to(request.param)  # several coded planes where it is fp32
    return tensor, lossless.encode(tensor)


@pytest.mark.usefixtures("isa")
def test_truncated_at_every_length(sample: tuple[torch.Tensor, torch.Tensor]) -> None:
    tensor, buffer = sample
    for length in [*range(60), *range(60, len(buffer), 997), len(buffer) - 2, len(buffer) - 1]:
        with pytest.raises(ArtifactError, match="damaged"):
            lossless.decode(buffer[:length], tuple(tensor.shape), tensor.dtype)


@pytest.mark.usefixtures("isa")
def test_flipped_bits_are_refused_or_change_no_more_than_numbers(sample: tuple[torch.Tensor, torch.Tensor]) -> None:
    """What no check can see is a bit of what is stored as it is; digests are for that."""
    tensor, buffer = sample
    draw = np.random.default_rng(0)
    refused = 0
    heads = [(at, bit) for at in range(5) for bit in range(8)]
    for at, bit in [*heads, *((int(draw.integers(5, len(buffer))), int(draw.integers(8))) for _ in range(15))]:
        damaged = buffer.clone()
        damaged[at] ^= 1 << bit
        try:
            decoded = lossless.decode(damaged, tuple(tensor.shape), tensor.dtype)
        except ArtifactError:
            refused += 1
        else:
            assert decoded.shape == tensor.shape
            assert bits(decoded) != bits(tensor)
    assert refused >= len(heads)


@settings(max_examples=150)
@given(data=st.binary(max_size=300), count=st.integers(0, 3000), dtype=st.sampled_from(DTYPES))
def test_arbitrary_bytes_never_crash(data: bytes, count: int, dtype: torch.dtype) -> None:
    body = data + bytes((len(data) + 4) % 2)
    buffer = np.frombuffer(len(data).to_bytes(4, "little") + body, np.uint8)
    try:
        decoded = lossless.decode(torch.from_numpy(buffer.copy()), (count,), dtype)
    except ArtifactError:
        return
    assert decoded.numel() == count


@settings(max_examples=100)
@given(at=st.integers(0, 400), value=st.integers(0, 255), dtype=st.sampled_from(DTYPES))
def test_native_and_reference_refuse_the_same(at: int, value: int, dtype: torch.dtype) -> None:
    if native.library() is None:
        pytest.skip("the native kernels were not built")
    numbers = gaussian(300, torch.bfloat16).to(dtype)
    (stream,) = lossless.encode_streams([numbers])
    changed = bytearray(stream)
    changed[at % len(stream)] = value
    buffer = len(changed).to_bytes(4, "little") + bytes(changed) + bytes(len(changed) % 2)
    try:
        found = lossless.decode_reference(bytes(changed), dtype.itemsize, 300).tobytes()
    except DamagedError:
        found = None
    tensor = torch.from_numpy(np.frombuffer(buffer, np.uint8).copy())
    if found is None:
        with pytest.raises(ArtifactError):
            lossless.decode(tensor, (300,), dtype)
    else:
        assert bits(lossless.decode(tensor, (300,), dtype)) == found


def test_nothing_is_allocated_for_a_shape_that_the_streams_cannot_fill() -> None:
    buffer = lossless.encode(torch.zeros(1000, dtype=torch.bfloat16))
    for shape in [(1 << 50,), (1 << 20, 1 << 20), (N + 1,), (1 << 19,)]:
        with pytest.raises(ArtifactError, match="damaged"):
            lossless.decode(buffer, shape, torch.bfloat16)
    lengths = np.array([100, (1 << 32) - 1], "<u4").tobytes()
    with pytest.raises(ArtifactError, match="index"):
        lossless.decode(torch.frombuffer(bytearray(lengths + bytes(100)), dtype=torch.uint8), (N + 1,), torch.bfloat16)
