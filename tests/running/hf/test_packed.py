"""Packed modules against dense ones with the decoded weights, and whole packed models through transformers.

The dense twin of an artifact is built from the reader and the codecs alone: it shares no code with the runtime.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.support import models
from waterfill import kernels
from waterfill.codecs import Encoded, Higgs, get_codec
from waterfill.kernels import reference
from waterfill.running.hf.experts import PackedExperts
from waterfill.running.hf.packed import (
    PackedEmbedding,
    PackedLinear,
    PackedMatrix,
    TiedLinear,
    pack_embedding,
    pack_linear,
    tie,
)
from waterfill.running.hf.stand_in import StandIn

FAMILIES: dict[str, Callable[..., Path]] = {
    name.removeprefix("tiny_"): builder for name, builder in vars(models).items() if name.startswith("tiny_")
}
WIDTHS = [64, 172, 576, 896, 1100]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# ------------------------------------------------------------------------------------------------------ packed modules


@pytest.fixture(autouse=True)
def _float_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here is the runtime; what integers cost is tested with the kernels."""
    monkeypatch.setenv("WATERFILL_ACTIVATIONS", "float")


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows of 172 per tile: matrices do not end where tiles do."""
    monkeypatch.setattr(reference, "TILE_WEIGHTS", 3 * 172)


def higgs(n: int = 16) -> Higgs:
    codec = get_codec(f"higgs-p1-n{n}")
    assert isinstance(codec, Higgs)
    return codec


def encoded(out_features: int, width: int, codec: Higgs, exponent: int = -12) -> Encoded:
    weight = torch.randn(out_features, width, generator=torch.Generator().manual_seed(width))
    return codec.encode(weight, exponent=exponent)


def fill(module: PackedMatrix, codec: Higgs, matrix: Encoded, dtype: torch.dtype) -> None:
    module.attach(codec, matrix.shape, matrix.exponent, dtype)
    module.load_state_dict(dict(matrix.buffers), strict=False, assign=True)


def packed_linear(
    width: int, out_features: int = 7, *, bias: bool = False, conv: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[PackedLinear, torch.Tensor]:
    """A packed module, and its decoded weight float32 [out, in]."""
    codec = higgs()
    matrix = encoded(out_features, width, codec)
    module: nn.Module
    if conv:
        module = Conv1D(out_features, width)
        nn.init.normal_(module.bias)
    else:
        module = nn.Linear(width, out_features, bias=bias)
    packed = pack_linear(module.to(dtype))
    fill(packed, codec, matrix, dtype)
    return packed, codec.decode(matrix)


def packed_embedding(
    width: int, dtype: torch.dtype = torch.float32, embedding: nn.Embedding | None = None
) -> tuple[PackedEmbedding, torch.Tensor]:
    """A packed embedding of 50 rows, and its decoded weight float32 [50, width]."""
    codec = higgs()
    matrix = encoded(50, width, codec)
    packed = pack_embedding(embedding or nn.Embedding(50, width))
    fill(packed, codec, matrix, dtype)
    return packed, codec.decode(matrix)


def assert_rounded(y: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the rounding of float32 sums, and of the result to its own dtype."""
    steps = 2 if y.dtype != torch.float32 else 64
    torch.testing.assert_close(y, expected, rtol=steps * torch.finfo(y.dtype).eps, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["bias", "plain", "conv"])
def test_packed_linear_is_its_dense_twin(kind: str, width: int, dtype: torch.dtype, small_tiles: None) -> None:
    module, weight = packed_linear(width, bias=kind == "bias", conv=kind == "conv", dtype=dtype)
    for batch in ((), (3,), (2, 5), (2, 3, 4), (0,)):
        x = torch.randn(*batch, width).to(dtype)
        expected = F.linear(x.float(), weight).to(dtype)  # one rounding; a bias is added after it
        if module.bias is not None:
            expected = expected + module.bias
        y = module(x)
        assert y.dtype == dtype
        assert y.shape == expected.shape
        assert_rounded(y, expected)
    assert (module.bias is None) == (kind == "plain")
    assert (module.in_features, module.out_features) == (width, 7)


def test_tiles_bound_the_scratch_and_change_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    module, weight = packed_linear(896, out_features=50)
    x = torch.randn(4, 896)
    whole = module(x)
    tiles: list[int] = []
    decode = Higgs.decode_rotated

    def counted(*arguments: Any) -> torch.Tensor:
        tile = decode(*arguments)
        tiles.append(tile.numel())
        return tile

    monkeypatch.setattr(Higgs, "decode_rotated", counted)
    for rows in (1, 7, 25, 50, 1000):
        monkeypatch.setattr(reference, "TILE_WEIGHTS", rows * 896 + 5)
        tiles.clear()
        torch.testing.assert_close(module(x), whole, atol=1e-4, rtol=1e-5)
        assert sum(tiles) == 50 * 896
        assert max(tiles) <= rows * 896
        assert torch.equal(kernels.dense(module.packed), weight), "decoding does not depend on the tiles"


def test_the_gradient_reaches_the_input() -> None:
    module, weight = packed_linear(172, bias=True)
    x = torch.randn(2, 3, 172, requires_grad=True)
    upstream = torch.randn(2, 3, 7)
    module(x).backward(upstream)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, upstream @ weight, atol=1e-4, rtol=1e-5)
    assert module.bias is not None
    assert module.bias.grad is not None
    assert not any(buffer.requires_grad for buffer in module.buffers())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_packed_embedding_looks_up_the_decoded_rows(width: int, dtype: torch.dtype) -> None:
    module, weight = packed_embedding(width, dtype)
    for ids in (torch.tensor(3), torch.tensor([49, 0, 49]), torch.tensor([[1, 2], [2, 1]])):
        assert torch.equal(module(ids), F.embedding(ids, weight).to(dtype))
    assert module(torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0, width)
    assert (module.num_embeddings, module.embedding_dim) == (50, width)


def test_packed_embedding_decodes_no_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = packed_embedding(172)
    decoded_rows: list[int] = []
    decode = Higgs.decode_rotated

    def counted(codec: Higgs, codes: torch.Tensor, *more: Any) -> torch.Tensor:
        decoded_rows.append(len(codes))
        return decode(codec, codes, *more)

    monkeypatch.setattr(Higgs, "decode_rotated", counted)
    module(torch.tensor([[4, 9, 4], [9, 9, 4]]))
    assert decoded_rows == [2]


class ScaledEmbedding(nn.Embedding):
    """As Gemma's: scales what it looks up."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__(rows, width)
        self.register_buffer("scale", torch.tensor(3.0), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.scale


def test_a_subclass_keeps_what_it_does_around_the_look_up() -> None:
    module, weight = packed_embedding(64, embedding=ScaledEmbedding(50, 64))
    assert isinstance(module, ScaledEmbedding)
    assert torch.equal(module(torch.tensor([7, 8])), 3 * weight[7:9])
    assert type(packed_embedding(64)[0]) is PackedEmbedding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_tied_head_multiplies_with_the_packed_embedding(bias: bool, dtype: torch.dtype, small_tiles: None) -> None:
    embedding, weight = packed_embedding(172, dtype)
    head: Any = nn.Linear(172, 50, bias=bias).to(dtype)
    tie(head, embedding)
    assert isinstance(head, TiedLinear)
    x = torch.randn(2, 3, 172).to(dtype)
    expected = F.linear(x.float(), weight).to(dtype)
    if head.bias is not None:
        expected = expected + head.bias
    assert_rounded(head(x), expected)
    assert list(head.buffers()) == [], "the embedding owns the buffers"
    assert (head.in_features, head.out_features) == (172, 50)


@pytest.mark.parametrize("transposed", [False, True])
def test_packed_experts_index_like_a_fused_parameter(transposed: bool) -> None:
    codec = higgs()
    experts = PackedExperts(3, transposed, torch.bfloat16)
    expected = []
    for index in range(3):
        matrix = encoded(6, 96 + 32 * index, codec)
        fill(experts.expert(index), codec, matrix, torch.bfloat16)
        weight = codec.decode(matrix).to(torch.bfloat16)
        expected.append(weight.T if transposed else weight)
    for index in (0, torch.tensor(2), 1):
        assert torch.equal(experts[index], expected[int(index)])
    assert len(experts) == 3
    assert set(experts.state_dict()) == {f"{index}.{key}" for index in range(3) for key in ("scales", "codes")}


def test_moving_to_a_dtype_changes_the_activations_and_no_stored_bit() -> None:
    module, _ = packed_linear(172, bias=True)
    scales, codes = module.scales.clone(), module.codes.clone()
    for move, dtype in (
        (nn.Module.half, torch.float16),
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (nn.Module.double, torch.float64),
        (nn.Module.float, torch.float32),
        (lambda m: m.to("cpu"), torch.float32),
    ):
        move(module)
        assert module.dtype == module.weight.dtype == dtype
        assert module.bias is not None
        assert module.bias.dtype == dtype
        assert module.scales.dtype == torch.float16
        assert torch.equal(module.scales.view(torch.int16), scales.view(torch.int16))
        assert torch.equal(module.codes, codes)
        assert module(torch.randn(2, 172, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("conv", [False, True])
def test_the_weight_that_model_code_sees_is_decoded_only_when_computed_with(
    conv: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, decoded = packed_linear(172, conv=conv, dtype=torch.bfloat16)
    expected = (decoded.T if conv else decoded).to(torch.bfloat16)
    weight: Any = module.weight
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "dense", None)
        assert isinstance(weight, StandIn)
        assert (weight.dtype, weight.device, weight.shape, weight.ndim) == (
            torch.bfloat16,
            torch.device("cpu"),
            expected.shape,
            2,
        )
        x = torch.randn(3, 172).to(torch.bfloat16)
        product = x @ weight if conv else F.linear(x, weight)
        assert torch.equal(product, kernels.matmul(x, module.packed)), "from the codes"
        bias = torch.ones(len(decoded), dtype=torch.bfloat16)
        assert conv or torch.equal(F.linear(x, weight, bias), product + bias)
    exact = x.float() @ decoded.T
    torch.testing.assert_close(product.float(), exact, atol=0.05 * float(exact.std()), rtol=0)
    assert torch.equal(torch.stack([weight, weight])[1], expected), "also inside lists"
    assert torch.equal(weight.float(), expected.float())
    assert weight.numel() == expected.numel()
