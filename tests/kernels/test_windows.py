"""Products from the codes of a bitshift trellis: every instruction set gives the bits of the torch definition."""

from __future__ import annotations

import pytest
import torch

from tests.support.kernel_samples import EXPONENT, every_isa, needs_native, seeded
from waterfill.codecs import Bitshift, get_codec
from waterfill.codecs.bitshift.code import REGISTERS
from waterfill.kernels import cpu, reference
from waterfill.kernels.reference import Packed

RATES = tuple(REGISTERS)
SHAPES = [(1, 1), (5, 16), (4, 127), (7, 128), (9, 576), (6, 896), (3, 1535), (5, 1536), (11, 2600)]


def stored(rate: float, shape: tuple[int, int], seed: int = 0) -> Packed:
    """Any bytes at all, and scales of which some are 0."""
    codec, generator = get_codec(f"bitshift-{rate:g}"), seeded(seed)
    assert isinstance(codec, Bitshift)
    layout = codec.layout(shape)
    codes = torch.randint(256, layout["codes"].shape, generator=generator, dtype=torch.uint8)
    scales = torch.rand(layout["scales"].shape, generator=generator).to(torch.float16)
    scales[::3] = 0
    return Packed(codec, scales, codes, EXPONENT, shape)


@needs_native
@every_isa
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_the_definition(isa: str, rate: float, shape: tuple[int, int]) -> None:
    packed = stored(rate, shape)
    arranged = cpu.arrange(packed, isa)
    for tokens in (1, 2, 3, 5, 8, 40):
        x = torch.randn(tokens, shape[1], generator=seeded(tokens))
        (product,) = cpu.matmul_many(x, [arranged])
        assert torch.equal(product, reference.matmul_integer(x, packed))


@needs_native
@every_isa
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_those_that_were_stored(isa: str, rate: float, shape: tuple[int, int]) -> None:
    packed = stored(rate, shape, seed=1)
    numbers = torch.arange(shape[0]).flip(0)
    found = cpu.rows(cpu.arrange(packed, isa), numbers, rotated=True)
    assert torch.equal(found, packed.codec.decode_rotated(packed.codes, packed.scales, EXPONENT, shape[1]).flip(0))


@needs_native
@every_isa
def test_the_layout_takes_little_more_than_the_codes(isa: str) -> None:
    for rate in RATES:
        packed = stored(rate, (64, 4096))
        assert cpu.arrange(packed, isa).codes.numel() <= 1.07 * packed.codes.numel()
