"""The kernels as torch operators: schema, shapes without data, compilation, export, gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.library import opcheck

from tests.support.codec_samples import encode, higgs
from tests.support.kernel_samples import ISAS, activations, one_thread, same_bits, stored
from waterfill import kernels
from waterfill.base.native import FLOAT_ACTIVATIONS
from waterfill.kernels import cpu as native
from waterfill.kernels.reference import STORED, Packed
from waterfill.running.hf.packed import PackedEmbedding, PackedLinear

OPS = torch.ops.waterfill
ALL_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
LAYOUTS = [STORED, *ISAS[:1]]
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(autouse=True)
def _floats_in_one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both layouts then compute the same, but for rounding."""
    monkeypatch.setenv(FLOAT_ACTIVATIONS, "float")
    with one_thread():
        yield


def matrix(layout: str, codec: str = "higgs-p2-n16", out_features: int = 7, width: int = 172) -> Packed:
    packed = stored(codec, out_features, width)
    return packed if layout == STORED else native.arrange(packed, layout)


def of_one(x: torch.Tensor, packed: Packed) -> tuple[Any, ...]:
    return (x, packed.scales, packed.codes, packed.codec.name, packed.exponent, packed.shape[0], packed.layout)


def of_two(x: torch.Tensor, a: Packed, b: Packed) -> tuple[Any, ...]:
    _, *columns, layout = zip(of_one(x, a), of_one(x, b), strict=True)
    return (x, *map(list, columns), layout[0])


def close(y: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5 * float(expected.detach().abs().max()))


# ------------------------------------------------------------------------------------------------------------- opcheck


@each_layout
@pytest.mark.parametrize("tokens", [(), (3,), (2, 3), (0,)])
def test_operators_keep_the_rules_of_torch(layout: str, tokens: tuple[int, ...]) -> None:
    """They write to no argument, return no argument, and say the right shapes and dtypes before they run."""
    a, b = matrix(layout), matrix(layout, "higgs-p1-n88", 5)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(*tokens, 172).to(dtype)
        opcheck(OPS.matmul.default, of_one(x, a), test_utils=ALL_CHECKS)
        opcheck(OPS.matmul_many.default, of_two(x, a, b), test_utils=ALL_CHECKS)
    ids = torch.randint(7, tokens)
    opcheck(OPS.rows.default, (*of_one(ids, a)[:-1], 172, layout), test_utils=ALL_CHECKS)


@each_layout
def test_products_keep_the_rules_of_autograd(layout: str) -> None:
    opcheck(OPS.matmul.default, of_one(torch.randn(3, 172, requires_grad=True), matrix(layout)), test_utils=ALL_CHECKS)


# ----------------------------------------------------------------------------------------------------------- gradients


@each_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_dense_weight(layout: str, dtype: torch.dtype) -> None:
    packed = matrix(layout)
    weight = kernels.dense(packed)
    x = activations(6, 172).view(2, 3, 172).to(dtype).requires_grad_()
    upstream = torch.randn(2, 3, 7).to(dtype)
    kernels.matmul(x, packed).backward(upstream)
    assert x.grad is not None
    assert x.grad.dtype == dtype
    expected = (upstream.float() @ weight).to(dtype)
    torch.testing.assert_close(x.grad, expected, rtol=1e-5 if dtype == torch.float32 else 0.016, atol=1e-4)


@each_layout
def test_gradients_pass_through_tiles(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.reference, "TILE_WEIGHTS", 3 * 172)
    x, packed = activations(2, 172).requires_grad_(), matrix(layout, out_features=8)
    kernels.matmul(x, packed).sum().backward()
    assert x.grad is not None
    close(x.grad, kernels.dense(packed).sum(0).expand(2, 172))


@each_layout
@pytest.mark.filterwarnings("error:.*an autograd kernel was not registered")
def test_gradients_of_many_products_add_up(layout: str) -> None:
    x, a, b = activations(3, 172).requires_grad_(), matrix(layout), matrix(layout, "higgs-p1-n88", 5)
    first, second = kernels.matmul_many(x, [a, b])
    (first.sum() + 2 * second.sum()).backward()
    assert x.grad is not None
    close(x.grad, (kernels.dense(a).sum(0) + 2 * kernels.dense(b).sum(0)).expand(3, 172))
    opcheck(OPS.matmul_many.default, of_two(x.detach().requires_grad_(), a, b), test_utils=ALL_CHECKS)
    again = activations(3, 172).requires_grad_()
    kernels.matmul_many(again, [a, b])[1].sum().backward()  # the other one is not used
    assert again.grad is not None
    close(again.grad, kernels.dense(b).sum(0).expand(3, 172))


# ------------------------------------------------------------------------------------------------- compile and export


class Tiny(nn.Module):
    """Ids to numbers through all three operators."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.embedding = filled(PackedEmbedding(), layout, 50, 172)
        self.q, self.k = (filled(PackedLinear(), layout, 64, 172) for _ in range(2))
        self.o = filled(PackedLinear(), layout, 7, 64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        q, k = kernels.matmul_many(self.embedding(ids), [self.q.packed, self.k.packed])
        result: torch.Tensor = self.o(torch.tanh(q) * k)
        return result


def filled(module: Any, layout: str, out_features: int, width: int) -> Any:
    codec = "higgs-p1-n16"
    encoded = encode(codec, torch.randn(out_features, width))
    module.attach(higgs(codec), encoded.shape, encoded.exponent, torch.float32)
    module.load_state_dict(dict(encoded.buffers), assign=True)
    module.bias = None
    if layout != STORED:
        arranged = native.arrange(module.packed, layout)
        module.scales, module.codes, module.layout = arranged.scales, arranged.codes, layout
    return module


IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 49, 0]])


@each_layout
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_model_compiles_without_a_break(layout: str, backend: str) -> None:
    model = Tiny(layout).eval()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.inference_mode():
        assert same_bits(compiled(IDS), model(IDS))
        assert same_bits(compiled(IDS[:, :3]), model(IDS[:, :3])), "another shape"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_compiled_product_has_its_gradient(layout: str) -> None:
    packed, gradients = matrix(layout), []
    torch.compiler.reset()
    for product in (kernels.matmul, torch.compile(kernels.matmul, fullgraph=True, backend="aot_eager")):
        x = activations(3, 172).requires_grad_()
        product(x, packed).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


@each_layout
def test_a_model_exports_as_one_node_per_product(layout: str) -> None:
    model = Tiny(layout).eval()
    tokens = torch.export.Dim("tokens", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (IDS,), dynamic_shapes=({1: tokens},))
        called = [node.target for node in program.graph.nodes if node.op == "call_function"]
        assert [target for target in called if "waterfill" in str(target)] == [
            OPS.rows.default,
            OPS.matmul_many.default,
            OPS.matmul.default,
        ]
        for ids in (IDS, IDS[:, :3]):
            assert same_bits(program.module()(ids), model(ids))
