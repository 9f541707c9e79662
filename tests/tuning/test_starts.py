"""Starts of adapters: LoftQ's against the singular value decomposition, ApiQ's against gradients and its own aim."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import waterfill
from tests.support import models
from waterfill.base.native import FLOAT_ACTIVATIONS
from waterfill.files.checkpoint import open_checkpoint
from waterfill.files.original import load_tokenizer, model_of
from waterfill.tuning.apiq import DAMPING, nearest, start_by_apiq
from waterfill.tuning.loftq import start_by_loftq
from waterfill.tuning.parts import Adapter

RANK = 6
TEXTS = list(torch.randint(256, (24, 48), generator=torch.Generator().manual_seed(7)))


@pytest.fixture(autouse=True)
def _float_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FLOAT_ACTIVATIONS, "float")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.tiny_llama(tmp_path_factory.mktemp("starts") / "llama")


@pytest.fixture(scope="module")
def packed(checkpoint: Path) -> Path:
    out = checkpoint.parent / "packed"
    waterfill.pack(checkpoint, out, bits=9, codecs=["higgs-p1-n3"], alpha="uniform", feedback="none")
    return out


def load(path: Path) -> Any:
    return waterfill.load(path, dtype=torch.float32)


def added(adapter: Adapter) -> dict[str, Tensor]:
    """What every layer of an adapter adds to its weight, by PEFT's own account."""
    return {name: layer.get_delta_weight("default").detach() for name, layer in adapter.layers.items()}


def logits_error(model: Any, original: Any) -> float:
    ids = torch.stack(TEXTS)
    with torch.no_grad():
        return float((model(input_ids=ids).logits - original(input_ids=ids).logits).square().mean())


@pytest.mark.parametrize("alpha", [RANK, 24])
def test_loftq_is_the_best_approximation_of_what_was_lost(checkpoint: Path, packed: Path, alpha: int) -> None:
    model, original = load(packed), model_of(checkpoint, dtype=torch.float32)
    adapter = Adapter(model, rank=RANK, alpha=alpha, seed=0)
    assert len(adapter.layers) == 2 * 7
    start_by_loftq(adapter, open_checkpoint(checkpoint), RANK)
    for name, delta in added(adapter).items():
        lost = original.get_submodule(name).weight - adapter.layers[name].base_layer.dense()
        u, s, vh = torch.linalg.svd(lost.detach().double())
        best = u[:, :RANK] @ torch.diag(s[:RANK]) @ vh[:RANK]
        torch.testing.assert_close(delta.double(), best, rtol=0, atol=1e-5)


def test_the_closed_form_is_what_gradients_find() -> None:
    """| D - B A X |² from many starts is never less; where the rank is whole it is the least-squares solution."""
    torch.manual_seed(1)
    x = torch.randn(12, 200) * torch.linspace(0.2, 3, 12)[:, None]
    d = torch.randn(9, 12) @ x + torch.randn(9, 200)
    moments, cross = x @ x.T, d @ x.T
    damped = moments + DAMPING * moments.diagonal().mean() * torch.eye(12)

    def error(b: Tensor, a: Tensor) -> Tensor:  # | D - BAX |² and the damping, up to what does not depend on BA
        product = b @ a
        return ((product @ damped) * product).sum() - 2 * (product * cross).sum()

    least = float(error(*nearest(cross, moments, 3)))
    for seed in range(3):
        torch.manual_seed(seed)
        b, a = torch.randn(9, 3).requires_grad_(), torch.randn(3, 12).requires_grad_()
        optimizer = torch.optim.LBFGS([b, a], lr=0.5, max_iter=400, line_search_fn="strong_wolfe")

        def closure(b: Tensor = b, a: Tensor = a, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            value = error(b, a)
            value.backward()
            return value

        optimizer.step(closure)
        found = float(error(b, a).detach())
        assert found >= least - 1e-4 * abs(least)
        assert found == pytest.approx(least, rel=0.02), "which is the same, but for saddles"
    whole = torch.matmul(*nearest(cross, moments, 9))
    torch.testing.assert_close(whole, cross @ torch.linalg.inv(damped), rtol=0, atol=1e-4)


def test_apiq_brings_every_block_nearer_to_the_original(checkpoint: Path, packed: Path) -> None:
    model, original = load(packed), model_of(checkpoint, dtype=torch.float32)
    start = logits_error(model, original)
    adapter = Adapter(model, rank=RANK, alpha=RANK, seed=0)
    losses = start_by_apiq(adapter, model, original, TEXTS, RANK)
    assert len(losses) == 2
    assert all(loss.after < 0.8 * loss.before for loss in losses)
    by_outputs = logits_error(model, original)
    start_by_loftq(adapter, open_checkpoint(checkpoint), RANK)
    by_weights = logits_error(model, original)
    assert by_outputs < by_weights < start


def test_a_rank_that_is_whole_gives_the_original_back(checkpoint: Path, packed: Path) -> None:
    """Every layer can then be made up for; only the damping is in the way, and head and embedding, which have none."""
    model, original = load(packed), model_of(checkpoint, dtype=torch.float32)
    before = logits_error(model, original)
    adapter = Adapter(model, rank=64, alpha=64, seed=0)
    start_by_loftq(adapter, open_checkpoint(checkpoint), 64)
    for name, delta in added(adapter).items():
        weight = adapter.layers[name].base_layer.dense() + delta
        torch.testing.assert_close(weight, original.get_submodule(name).weight, rtol=0, atol=1e-5)
    assert logits_error(model, original) < before


@pytest.mark.parametrize("init", ["loftq", "apiq"])
def test_stock_peft_loads_a_start(checkpoint: Path, packed: Path, tmp_path: Path, init: str) -> None:
    text = tmp_path / "text"
    model_path = models.tiny_llama(tmp_path / "model", layers=1, tokenizer=True)
    waterfill.pack(model_path, tmp_path / "packed", bits=9, codecs=["higgs-p1-n3"], alpha="uniform", feedback="none")
    text.write_text("Once upon a time there was a small model, which forgot most of what it knew. " * 30)
    options: dict[str, Any] = {"text": text, "what": "lora", "teacher": model_path, "steps": 0, "context": 16}
    plain, begun = (
        waterfill.tune(tmp_path / "packed", tmp_path / each, init=each, rank=RANK, **options)
        for each in ("default", init)
    )
    assert begun.after < plain.after
    assert plain.after == plain.before
    model = PeftModel.from_pretrained(load(tmp_path / "packed"), tmp_path / init)
    ids = torch.tensor(load_tokenizer(model_path)(text.read_text())["input_ids"])[None, :64]
    with torch.no_grad():
        with_adapter = model(input_ids=ids).logits
        with model.disable_adapter():
            without = model(input_ids=ids).logits
    original = model_of(model_path, dtype=torch.float32)(input_ids=ids).logits
    assert (with_adapter - original).square().mean() < (without - original).square().mean()
