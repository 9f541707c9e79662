"""Gradients through packed matrices, of every kind of codec and in every layout, against those of decoded weights."""

from __future__ import annotations

import pytest
import torch

from tests.support.kernel_samples import ISAS, activations, in_memory, one_thread
from waterfill import kernels
from waterfill.codecs import MENUS
from waterfill.kernels.reference import STORED

# Of every kind: grids of one to four weights, in bit fields and in radix words; bitshift rates of one to three
# registers; entropy-coded ones that are decoded into bytes and into 16 bits; levels.
CODECS = [
    *("higgs-p1-n16", "higgs-p1-n88", "higgs-p1-n256", "higgs-p2-n64", "higgs-p3-n512", "higgs-p4-n256"),
    *("bitshift-1", "bitshift-1.5", "bitshift-2", "bitshift-3.5", "bitshift-5"),
    *("trellis-s4-r2.0000", "trellis-s64-r3.0000", "trellis-s64-r5.0000"),
    "levels-8",
]
LAYOUTS = [STORED, *ISAS]
ROWS, WIDTH = 7, 1100  # one group of more than a power of two


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("codec", CODECS)
def test_the_gradient_of_the_activations_is_that_of_the_decoded_weights(codec: str, layout: str) -> None:
    packed, weight = in_memory(codec, layout, ROWS, WIDTH)
    upstream = activations(5, ROWS, seed=2)
    with one_thread():
        x = activations(5, WIDTH).requires_grad_()
        kernels.matmul(x, packed).backward(upstream)
        (expected,) = torch.autograd.grad((x.double() @ weight.double().T), x, upstream.double())
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_shared_products_are_those_of_each(layout: str) -> None:
    """Matrices of several codecs that are multiplied together."""
    names = ("higgs-p2-n64", "bitshift-2", "levels-8")
    matrices, weights = zip(*(in_memory(name, layout, ROWS, WIDTH) for name in names), strict=True)
    x = activations(3, WIDTH).requires_grad_()
    with one_thread():
        torch.cat(kernels.matmul_many(x, list(matrices)), 1).square().sum().backward()
        y = torch.cat([x.detach().double() @ weight.double().T for weight in weights], 1)
        expected = 2 * y @ torch.cat(weights).double()
    assert x.grad is not None
    # Forward products are of rounded activations: 8 bits of a group's largest where levels have 8.
    torch.testing.assert_close(x.grad.double(), expected, rtol=0, atol=0.03 * float(expected.abs().max()))


def test_every_kind_of_codec_on_a_menu_is_tested() -> None:
    kinds = {name.partition("-")[0] for menu in MENUS.values() for name in menu}
    assert kinds <= {name.partition("-")[0] for name in CODECS}
