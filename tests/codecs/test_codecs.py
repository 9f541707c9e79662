"""Codecs by their names, the registry that others can join, and the bits of HIGGS, which never change."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Iterator, Mapping

import pytest
import torch

import waterfill.codecs.higgs
from tests.support.codec_samples import encode, higgs, relative_noise
from waterfill.base.errors import WaterfillError
from waterfill.codecs import BufferLayout, Codec, Encoded, Higgs, get_codec, register_codec
from waterfill.codecs import contract as registry

# -- names, the registry ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gptq", "gptq-4", "", "-", "HIGGS-p1-n4", "higgsx-p1-n4", "raw"])
def test_unknown_families_are_refused(name: str) -> None:
    with pytest.raises(WaterfillError, match=f"codec '{name}' is unknown; known families are .*higgs"):
        get_codec(name)


@pytest.mark.parametrize(
    "name",
    [
        "higgs",
        "higgs-",
        "higgs-p2",
        "higgs-n16-p2",
        "higgs-p2-n16-x",
        "higgs-p2-n16\n",
        "higgs-p2-n016",
        "higgs-p٢-n16",
    ],
)
def test_other_names_of_the_family_are_refused(name: str) -> None:
    with pytest.raises(WaterfillError, match="is not a HIGGS codec; expected a name like higgs-p2-n16"):
        get_codec(name)


@pytest.mark.parametrize("name", ["higgs-p1-n257", "higgs-p1-n1", "higgs-p9-n16", "higgs-p4-n4097"])
def test_grids_that_do_not_exist_are_refused(name: str) -> None:
    with pytest.raises(WaterfillError, match="there is no grid of"):
        get_codec(name)


def test_the_module_and_the_function_of_one_name_are_both_there() -> None:
    module = waterfill.codecs.higgs
    assert inspect.ismodule(module)
    assert module.higgs("higgs-p2-n16") is get_codec("higgs-p2-n16")


def test_codecs_are_shared_and_named_after_their_grid() -> None:
    codec = higgs("higgs-p2-n16")
    assert get_codec("higgs-p2-n16") is codec
    assert (codec.name, codec.p, codec.n) == ("higgs-p2-n16", 2, 16)


class SignsOnly(Codec):
    """A third party's codec: the sign of every weight, one byte each, and one scale."""

    def __init__(self, name: str) -> None:
        self.name = name

    def layout(self, shape: tuple[int, int]) -> Mapping[str, BufferLayout]:
        return {"signs": BufferLayout("U8", shape, shape[1]), "scale": BufferLayout("F32", (shape[0], 1), 4)}

    def distortion(self, shape: tuple[int, int]) -> float:
        return 1 - 2 / math.pi

    def encode(self, weight: torch.Tensor, *, exponent: int = 0, rho: float = 1.0) -> Encoded:
        scale = weight.abs().mean(1, keepdim=True)
        buffers = {"signs": (weight >= 0).to(torch.uint8), "scale": scale}
        noise = (weight.sign() * scale - weight).square().sum()
        return Encoded(tuple(weight.shape), buffers, exponent, float(noise), float(weight.square().sum()))

    def decode(self, encoded: Encoded) -> torch.Tensor:
        return (2.0 * encoded.buffers["signs"] - 1) * encoded.buffers["scale"]


@pytest.fixture
def signs_family() -> Iterator[None]:
    register_codec("signs", SignsOnly)
    yield
    del registry._FAMILIES["signs"]
    get_codec.cache_clear()


@pytest.mark.usefixtures("signs_family")
def test_a_third_party_can_register_a_codec() -> None:
    codec = get_codec("signs-v2")
    assert codec.name == "signs-v2"
    assert get_codec("signs").name == "signs"
    point = codec.menu_point((3, 8))
    assert (point.size_bytes, point.rate_bits) == (3 * 8 + 3 * 4, 12.0)
    weight = torch.randn(200, 300)
    encoded = codec.encode(weight)
    assert encoded.noise_power / encoded.power == pytest.approx(point.t2, rel=0.05)
    assert relative_noise(codec.decode(encoded), weight) == pytest.approx(point.t2, rel=0.05)
    with pytest.raises(ValueError, match="codec family 'signs' is registered already"):
        register_codec("signs", SignsOnly)
    with pytest.raises(WaterfillError, match="known families are bitshift, higgs, levels, nested, signs, trellis"):
        get_codec("sign")


def test_a_familys_name_cannot_be_taken_twice() -> None:
    with pytest.raises(ValueError, match="codec family 'higgs' is registered already"):
        register_codec("higgs", SignsOnly)
    assert isinstance(get_codec("higgs-p1-n2"), Higgs)


# -- the format does not drift ----------------------------------------------------------------------------------------


def digest(tensor: torch.Tensor) -> str:
    return hashlib.blake2b(tensor.contiguous().view(torch.uint8).numpy().tobytes(), digest_size=8).hexdigest()


def fixed_matrix() -> torch.Tensor:
    """Whole numbers from -2048 to 2047, `[5, 172]`."""
    position = torch.arange(5 * 172, dtype=torch.int64)
    return ((position * 2654435761 % 2**32 >> 20) - 2048).view(5, 172).to(torch.float32)


ENCODED = {  # name: (scales, codes), with rho = 1/4
    "higgs-p1-n3": ("45d74c43fdbffd09", "36d5f9d3558d9558"),
    "higgs-p1-n16": ("d6b705a6427015f7", "b6b5806d5285cb78"),
    "higgs-p2-n64": ("2bae9c99a508d6c3", "29b98da51639269e"),
    "higgs-p3-n64": ("2ee081af8d8d13f1", "44d294d1165027be"),
    "higgs-p4-n256": ("f0afb235387fa4f4", "9cd719b042531972"),
}


@pytest.mark.parametrize("name", ENCODED)
def test_golden_encoding(name: str) -> None:
    buffers = encode(name, fixed_matrix(), rho=0.25).buffers
    assert (digest(buffers["scales"]), digest(buffers["codes"])) == ENCODED[name]


DECODED = {
    "higgs-p1-n3": "8171a4e57370e228",
    "higgs-p1-n16": "46aa1f4918428d39",
    "higgs-p2-n64": "673e6bfc203c9843",
    "higgs-p3-n64": "ff30964a9fda3818",
    "higgs-p4-n256": "b0b57605cadd8206",
}


@pytest.mark.parametrize("name", DECODED)
def test_golden_decoding(name: str) -> None:
    """Exact bits of float32, on every machine: bytes of a fixed sequence, decoded at a width with windows and signs."""
    codec = higgs(name)
    row_bytes = codec.row_bytes(1028)
    codes = torch.arange(3 * row_bytes, dtype=torch.int64).mul(2654435761).bitwise_and(0xFFFFFFFF) >> 24
    if codec.n == 3:
        codes %= 243  # five ternary digits
    scales = torch.tensor([[0.3], [1000.0], [7e-6]], dtype=torch.float16)
    decoded = codec.decode(Encoded((3, 1028), {"scales": scales, "codes": codes.to(torch.uint8)}, -7, 0.0, 0.0))
    assert digest(decoded) == DECODED[name]
