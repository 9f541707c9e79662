"""Tensors that stand for packed weights: read, indexed and scaled as tensors are; no change is ever lost."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization
from transformers.pytorch_utils import Conv1D

from tests.support.codec_samples import higgs
from waterfill.base.errors import WaterfillError
from waterfill.codecs import Encoded
from waterfill.running.hf.experts import PackedExperts
from waterfill.running.hf.packed import PackedLinear, PackedMatrix, pack_linear
from waterfill.running.hf.stand_in import StandIn

OUT, IN = 8, 172
each_mode = pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
IDS = torch.tensor([[1, 5, 1], [0, 7, 2]])
X = torch.randn(3, IN, generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def _float_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are then those of the decoded matrix, but for rounding."""
    monkeypatch.setenv("WATERFILL_ACTIVATIONS", "float")


@cache
def encoded(seed: int) -> Encoded:
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed))
    return higgs("higgs-p1-n16").encode(weight, exponent=-12)


def fill(matrix: PackedMatrix, seed: int = 0) -> None:
    matrix.attach(higgs("higgs-p1-n16"), (OUT, IN), -12, torch.float32)
    matrix.scales, matrix.codes = (encoded(seed).buffers[key] for key in ("scales", "codes"))


def packed(conv: bool = False) -> tuple[PackedLinear, torch.Tensor]:
    """A packed module, and what its weight has to look like."""
    module = pack_linear(Conv1D(OUT, IN) if conv else nn.Linear(IN, OUT, bias=False))
    fill(module)
    return module, (module.dense().T if conv else module.dense()).contiguous()


READS: dict[str, Callable[[Any], Any]] = {
    "one row": lambda w: w[1],
    "rows by number": lambda w: w[IDS],
    "a slice": lambda w: w[1:, ::3],
    "a mask": lambda w: w[w > 0.5],
    "a new axis": lambda w: w[None, ..., 0],
    "iteration": lambda w: torch.stack(list(w)),
    "length": len,
    "shape": lambda w: (w.shape, w.ndim, w.numel(), w.stride(), w.is_contiguous(), w.dtype, w.device, w.layout),
    "equality": lambda w: w == w.clone(),
    "comparison": lambda w: w > 0,
    "arithmetic": lambda w: 2 * w - w / 3 + w**2 - (-w),
    "from the left": lambda w: torch.ones(2, len(w)) @ w,
    "from the right": lambda w: w @ torch.ones(w.shape[1], 2),
    "transposed": lambda w: torch.ones(2, w.shape[1]) @ w.T,
    "twice transposed": lambda w: F.linear(torch.ones(2, w.shape[1]), w.t().mT),
    "permuted": lambda w: torch.ones(2, w.shape[1]) @ w.permute(1, 0),
    "linear": lambda w: F.linear(bias=torch.ones(len(w)), input=torch.ones(2, w.shape[1]), weight=w),
    "addmm": lambda w: torch.addmm(torch.ones(w.shape[1]), torch.ones(2, len(w)), w),
    "einsum": lambda w: torch.einsum("oi,bi->bo", w, torch.ones(2, w.shape[1])),
    "embedding": lambda w: F.embedding(IDS, w),
    "embedding with padding": lambda w: F.embedding(IDS, w, 1, None, 2.0, False, False),
    "norm": lambda w: torch.linalg.vector_norm(w, dim=1),
    "sum": lambda w: w.sum(),
    "in a list": lambda w: torch.cat([w, w], 1),
    "view": lambda w: w.view(-1, 4).reshape(2, -1),
    "chunks": lambda w: torch.stack(w.chunk(2, dim=-1)),
    "dtype": lambda w: w.to(torch.bfloat16),
    "no other dtype": lambda w: w.float().to("cpu").contiguous(),
    "detached": lambda w: w.detach().data.cpu(),
    "clone": lambda w: w.clone(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
    "numpy": lambda w: w.detach().numpy(),
    "asarray": np.asarray,
    "list": lambda w: w.tolist(),
    "like": lambda w: torch.zeros_like(w),
    "where": lambda w: torch.where(w > 0, w, torch.zeros(()), out=None),
    "repeat": lambda w: w.unsqueeze(0).expand(2, -1, -1),
}


def same(found: Any, expected: Any) -> None:
    """Equal, but for the rounding of sums."""
    if isinstance(expected, torch.Tensor):
        assert found.shape == expected.shape
        torch.testing.assert_close(found.clone(), expected, atol=1e-3, rtol=1e-4)
    elif isinstance(expected, np.ndarray):
        assert np.array_equal(found, expected)
    else:
        assert found == expected


@each_mode
@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
def test_a_stand_in_reads_as_its_weight_does(conv: bool, mode: Any) -> None:
    module, dense = packed(conv)
    with mode():
        assert isinstance(module.weight, torch.Tensor)
        for read in READS.values():
            same(read(module.weight), read(dense))


def test_the_same_weight_is_the_same_object_while_it_is_held() -> None:
    module, _ = packed()
    assert module.weight is module.weight
    module.to(torch.bfloat16)
    assert module.weight.dtype == torch.bfloat16


def test_a_gradient_passes_through_what_is_not_a_product() -> None:
    module, dense = packed()
    gradients = []
    for weight in (module.weight, dense):
        x = torch.ones(IN, requires_grad=True)
        ((weight @ x).sum() + (weight * x).sum() + (x @ weight.T).sum()).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ changes in place

SCALINGS: dict[str, tuple[Callable[[Any], Any], float]] = {
    "mul_": (lambda m: m.weight.mul_(4), 4),
    "div_": (lambda m: m.weight.div_(2**3), 1 / 8),
    "div_ by a tensor": (lambda m: m.weight.div_(torch.tensor(0.5)), 2),
    "mul_ of a view of all": (lambda m: m.weight.data.T.detach().mul_(0.25), 0.25),
    "*=": (lambda m: operator.imul(m.weight, 2), 2),
    "one": (lambda m: m.weight.mul_(1), 1),
}


@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_powers_of_two_are_exact(scaling: str, conv: bool) -> None:
    change, factor = SCALINGS[scaling]
    module, dense = packed(conv)
    held, before = module.weight, module(X)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            change(module)
            assert torch.equal(module.weight.clone(), factor * dense)
            assert torch.equal(held.clone(), factor * dense), "whoever holds it already"
            assert torch.equal(module(X), factor * before)
            module.weight /= factor
            assert torch.equal(module(X), before)


def test_a_power_that_float32_does_not_hold_is_refused() -> None:
    module, _ = packed()
    with pytest.raises(WaterfillError, match=r"\[8, 172\] cannot be multiplied by 2\^120"):
        module.weight.mul_(2.0**120)
    with pytest.raises(WaterfillError, match=r"cannot be multiplied by 2\^-120"):
        module.weight.div_(2.0**120)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "copy_": lambda w: w.data.copy_(torch.ones(w.shape)),
    "by a number": lambda w: w.mul_(3),
    "by a negative": lambda w: w.mul_(-2),
    "by nothing": lambda w: w.mul_(0),
    "by infinity": lambda w: w.div_(float("inf")),
    "by a vector": lambda w: w.mul_(torch.full((w.shape[1],), 2.0)),
    "item": lambda w: operator.setitem(w, (0, 0), 1.0),
    "row": lambda w: operator.setitem(w, 1, torch.zeros(w.shape[1])),
    "by number": lambda w: operator.setitem(w, torch.tensor([1]), 0.0),
    "of a row": lambda w: w[0].zero_(),
    "of a row, by two": lambda w: w[0].mul_(2),
    "of an iterated row": lambda w: next(iter(w)).add_(1),
    "of a view of a view": lambda w: w.view(-1)[3:].reshape(-1).unsqueeze(0).fill_(1),
    "of what needs no copy": lambda w: w.float().contiguous().to("cpu").add_(1),
    "out": lambda w: torch.add(torch.ones(w.shape), 1, out=w),
    "out, of a part": lambda w: torch.add(torch.ones(w.shape[1]), 1, out=w[0]),
    "many": lambda w: torch._foreach_mul_([w], 2.0),
    "data": lambda w: setattr(w, "data", torch.ones(w.shape)),
    "gradient": lambda w: w.requires_grad_(),
    "parameter": nn.Parameter,
    "renormalised": lambda w: F.embedding(torch.tensor([1]), w, max_norm=0.1),
    "initialised": nn.init.xavier_uniform_,
    "a row initialised": lambda w: nn.init.zeros_(w.data[1]),
    "numpy": lambda w: operator.setitem(w.numpy(), 0, 1.0),
    "memory": lambda w: w.share_memory_(),
    "pointer": lambda w: w.data_ptr(),
}


@each_mode
def test_any_other_change_is_an_error(mode: Any) -> None:
    module, dense = packed()
    with mode():
        for change in CHANGES.values():
            with pytest.raises((WaterfillError, ValueError), match=r"packed weight \[.*weight.clone\(\)|read-only"):
                change(module.weight)
            assert torch.equal(module.weight.clone(), dense)


IN_PLACE = sorted(
    name for name in dir(torch.Tensor) if name.endswith("_") and not name.startswith("_") and name != "requires_grad_"
)
ARGUMENTS: tuple[tuple[Any, ...], ...] = (
    (),
    (2.0,),
    (2,),
    (torch.full((OUT, IN), 0.25),),
    (0, 1),
    (torch.zeros(OUT, IN, dtype=torch.bool), 1.0),
    (0, torch.tensor([0]), 1.0),
    (0, torch.zeros(1, IN, dtype=torch.int64), torch.ones(1, IN)),
    (torch.ones(OUT, IN), torch.ones(OUT, IN)),
)


def test_no_method_in_place_does_less_than_on_a_tensor() -> None:
    """Every one that torch has, with whatever arguments it takes: what is not refused is carried out."""
    with torch.no_grad():
        for name, arguments in product(IN_PLACE, ARGUMENTS):
            module, dense = packed()
            torch.manual_seed(0)
            try:
                getattr(module.weight, name)(*arguments)
            except Exception:  # of torch for arguments that do not fit, and ours
                continue
            getattr(dense, name)(*arguments)
            assert torch.equal(module.weight.clone().reshape(dense.shape), dense), (name, arguments)


@pytest.mark.parametrize("value", [nn.Parameter(torch.ones(OUT, IN)), torch.ones(OUT, IN), None])
def test_a_packed_weight_is_not_replaced(value: Any) -> None:
    module, dense = packed()
    with pytest.raises(WaterfillError, match="weight of PackedLinear is packed and cannot be replaced"):
        module.weight = value
    assert torch.equal(module.weight.clone(), dense)


# ----------------------------------------------------------------------------------------- before the values are there

INITIALISATIONS: dict[str, Callable[[Any], Any]] = {
    "normal_": lambda w: w.data.normal_(mean=0.0, std=0.02),
    "a padding row": lambda w: w.data[1].zero_(),
    "an item": lambda w: operator.setitem(w, 1, 0.0),
    "copy_": lambda w: w.copy_(torch.zeros(w.shape)),
    "data": lambda w: setattr(w, "data", torch.zeros(w.shape)),
    "scaled": lambda w: w.mul_(2),
    "divided": lambda w: w.div_(w.norm(dim=1, keepdim=True)),
    "torch": nn.init.kaiming_uniform_,
    "torch, truncated": nn.init.trunc_normal_,
    "torch, a row": lambda w: nn.init.zeros_(w[1]),
    "transformers": initialization.normal_,
    "transformers, a row": lambda w: initialization.zeros_(w[1]),
    "transformers, by hand": lambda w: initialization.copy_(w, torch.empty_like(w)),
}


@each_mode
def test_no_initialisation_touches_a_weight_that_is_being_loaded(mode: Any) -> None:
    module, dense = packed()
    with mode():
        for initialise in INITIALISATIONS.values():
            module.loading = True
            initialise(module.weight)
            assert module.weight.isnan().all(), "whoever reads it now is not to take it for the weight"
            module.end_loading()
            assert torch.equal(module.weight.clone(), dense)


def test_transformers_own_initialisation_takes_a_loaded_weight_for_initialised() -> None:
    module, dense = packed()
    initialization.normal_(module.weight)
    assert torch.equal(module.weight.clone(), dense)


# ------------------------------------------------------------------------------------------------------------- experts


@pytest.fixture
def experts() -> PackedExperts:
    made = PackedExperts(3, False, torch.float32)
    for index in range(3):
        fill(made.expert(index), seed=index)
    return made


EXPERT_READS: dict[str, Callable[[Any], Any]] = {
    "shape": lambda e: (e.shape, e.ndim, e.dtype, e.device, len(e)),
    "one": lambda e: e[1],
    "the last": lambda e: e[-1],
    "by tensor": lambda e: e[torch.tensor(2)],
    "several": lambda e: e[torch.tensor([2, 0])],
    "a part": lambda e: e[0, 1:3],
    "iteration": lambda e: torch.stack(list(e)),
    "batched": lambda e: torch.bmm(torch.ones(3, 2, IN), e.transpose(1, 2)),
    "product": lambda e: torch.ones(3, 2, OUT) @ e,
    "arithmetic": lambda e: 1 - 2 * e / 3,
    "comparison": lambda e: e > 0,
    "sum": lambda e: e.sum((1, 2)),
    "in a list": lambda e: torch.cat([e, e]),
}


@each_mode
def test_experts_read_as_one_tensor(experts: PackedExperts, mode: Any) -> None:
    dense = experts.dense()
    with mode():
        for read in EXPERT_READS.values():
            same(read(experts), read(dense))


def test_batched_products_of_transposed_experts_come_from_their_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    made = PackedExperts(3, True, torch.float32)
    for index in range(3):
        fill(made.expert(index), seed=index)
    x, dense = torch.randn(3, 2, IN), made.dense().mT  # as the model sees them, [expert, in, out]
    monkeypatch.setattr(PackedMatrix, "dense", lambda matrix: pytest.fail("a matrix was decoded"))
    for multiply in (torch.bmm, torch.Tensor.bmm):
        same(multiply(x, made.stand_in()), torch.bmm(x, dense))


def test_experts_are_scaled_together_and_changed_in_no_other_way(experts: PackedExperts) -> None:
    dense = experts.dense()
    experts.mul_(2)
    experts *= 2
    assert torch.equal(experts.dense(), 4 * dense)
    experts[1].div_(4)
    assert torch.equal(experts.dense()[1], dense[1])
    for change in (lambda: experts.zero_(), lambda: experts[0].zero_(), lambda: operator.setitem(experts, 0, 1.0)):
        with pytest.raises(WaterfillError, match="cannot be changed in place"):
            change()
    with pytest.raises(IndexError):
        experts[3]


def test_a_stand_in_says_what_it_is() -> None:
    assert repr(packed()[0].weight) == "StandIn(shape=(8, 172), dtype=torch.float32)"


class UsesItsWeight(nn.Module):
    """As models do that ask a layer for its dtype, or multiply with its weight themselves."""

    def __init__(self, inner: PackedLinear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.inner.weight
        return F.linear(x.to(weight.dtype), weight) + weight.sum()


def test_a_compiler_traces_stand_ins() -> None:
    module = UsesItsWeight(packed()[0])
    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(X), module(X))
    assert isinstance(module.inner.weight, StandIn)
