"""Gradients that are taken where products are: the same sums, with no weight kept for the way back."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.support import models
from waterfill.files import blockwise
from waterfill.files.architecture import Architecture, Matrix, describe
from waterfill.files.blockwise import load_blockwise
from waterfill.files.checkpoint import open_checkpoint
from waterfill.files.model_calls import read
from waterfill.files.original import load_original
from waterfill.planning import estimators
from waterfill.planning.costs import Costs
from waterfill.planning.estimators import fisher_pass
from waterfill.planning.products import Products, gradients, watched


class Twice(nn.Module):
    """A matrix that is multiplied with more than once."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)


def used_twice(model: Twice, x: Tensor) -> Tensor:
    return torch.tanh(model.linear(torch.tanh(model.linear(x)))).square().sum()


def one_use_dropped(model: Twice, x: Tensor) -> Tensor:
    model.linear(x + 1)
    return model.linear(x).square().sum()


def input_without_gradient(model: Twice, x: Tensor) -> Tensor:
    return model.linear(x.detach()).square().sum()


@pytest.fixture
def matrix(dense: Architecture) -> Matrix:
    chosen = next(matrix for matrix in dense.matrices if matrix.name.endswith("up_proj"))
    return replace(chosen, name="linear", parameter="linear.weight", shape=(8, 8))


@pytest.mark.parametrize("function", [used_twice, one_use_dropped, input_without_gradient])
def test_a_matrix_is_the_sum_of_its_products(function: Callable[[Twice, Tensor], Tensor], matrix: Matrix) -> None:
    torch.manual_seed(1)
    model, x = Twice(), torch.randn(2, 5, 8)
    function(model, x).backward()
    weight = model.linear.weight
    assert weight.grad is not None
    expected, found = Costs([matrix]), Costs([matrix])
    expected.add(matrix.parameter, weight.detach(), weight.grad, 1)
    weight.grad = None
    products = Products([matrix], found)
    with gradients(model, {matrix.parameter}, found), watched(model, products):
        with products:
            loss = function(model, x)
        with products.returning():
            loss.backward()
    assert weight.grad is None, "it is not taken twice"
    assert found.across == pytest.approx(expected.across, rel=1e-4)
    assert found.along == pytest.approx(expected.along, rel=1e-4)


def test_weights_are_not_kept_with_what_was_multiplied(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(models.tiny_llama(tmp_path, layers=3))
    matrices = describe(checkpoint).matrices
    model, alive = load_blockwise(checkpoint, torch.float32), list[weakref.ref[Tensor]]()

    class Watching(Products):
        def read(self, name: str, weight: Tensor, again: Callable[[], Tensor]) -> None:
            if ".layers." in name and weight.ndim > 1:
                alive.append(weakref.ref(weight))
            super().read(name, weight, again)

    found = Costs(matrices)
    products = Watching(matrices, found)
    wanted = {matrix.parameter for matrix in matrices}
    with gradients(model, wanted, found, kept_bytes=1 << 30), watched(model, products):
        with products:
            logits = read(model, torch.arange(12)[None])
        gc.collect()
        assert len(alive) == 3 * 7
        assert not [weight for weight in alive if weight() is not None]
        with products.returning():
            logits.square().sum().backward()
    assert len(alive) == 3 * 7, "blocks are not computed again"
    assert all(found.across.values())


@pytest.mark.parametrize("family", ["llama", "gemma", "mixtral", "gpt2"])
def test_what_is_kept_changes_nothing(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(getattr(models, f"tiny_{family}")(tmp_path))
    matrices, ids = describe(checkpoint).matrices, torch.arange(24).view(2, 12)
    whole = load_original(checkpoint, torch.float32).requires_grad_(False)
    for matrix in matrices:
        whole.get_parameter(matrix.parameter).requires_grad_()
    passes = [fisher_pass(whole, matrices, ids, torch.Generator().manual_seed(0), lead=3)]
    for kept_bytes in (0, 20_000, 1 << 30):
        monkeypatch.setattr(estimators, "KEPT_BYTES", kept_bytes)
        model = load_blockwise(checkpoint, torch.float32)
        passes.append(fisher_pass(model, matrices, ids, torch.Generator().manual_seed(0), lead=3))
    for other in passes[1:]:
        assert other.tokens == passes[0].tokens
        for name, alpha in passes[0].alpha.items():
            assert other.alpha[name] == pytest.approx(alpha, rel=2e-3), name
            assert other.beta[name] == pytest.approx(passes[0].beta[name], rel=1e-2, abs=1e-9), name


def test_rows_of_a_tied_head_that_no_token_looks_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head is multiplied some rows at a time, and of some of them the text has no token."""
    checkpoint = open_checkpoint(models.tiny_llama(tmp_path, tied=True))
    matrices, ids = describe(checkpoint).matrices, torch.arange(24).view(2, 12) % 9
    passes = []
    for weights in (1 << 24, 64 * 50):
        monkeypatch.setattr(blockwise, "CHUNK_WEIGHTS", weights)
        model = load_blockwise(checkpoint, torch.float32)
        passes.append(fisher_pass(model, matrices, ids, torch.Generator().manual_seed(0), lead=3))
    for name, alpha in passes[0].alpha.items():
        assert passes[1].alpha[name] == pytest.approx(alpha, rel=1e-3), name


def test_tokens_that_give_context_alone_predict_nothing(tmp_path: Path) -> None:
    """A pass with a lead is one in which the first tokens' predictions have no slope; context counts all the same."""
    checkpoint = open_checkpoint(models.tiny_llama(tmp_path))
    matrices = describe(checkpoint).matrices
    model = load_blockwise(checkpoint, torch.float32)
    ids = torch.randint(250, (1, 12), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        log_p = read(model, ids)[0, 5:-1].log_softmax(-1)
    found = fisher_pass(model, matrices, ids, torch.Generator().manual_seed(0), lead=5)
    assert found.nll == pytest.approx(-float(log_p.gather(1, ids[0, 6:, None]).mean()), rel=1e-4)
    changed = ids.clone()
    changed[0, 0] += 1
    other = fisher_pass(model, matrices, changed, torch.Generator().manual_seed(0), lead=5)
    assert other.alpha["model.layers.0.self_attn.v_proj"] != found.alpha["model.layers.0.self_attn.v_proj"]
