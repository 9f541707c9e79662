"""Least squares against numpy's, and what they are worth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tuning.pruning.conftest import KV_HEADS, LAYERS, Family, loaded
from waterfill.files.architecture import describe
from waterfill.files.checkpoint import open_checkpoint
from waterfill.planning.probe import Probe, probe_tokens
from waterfill.tuning.pruning import refitting
from waterfill.tuning.pruning.refitting import Refitted, refitted
from waterfill.tuning.pruning.scoring import loss_of, open_model, score
from waterfill.tuning.pruning.selection import Shape, select
from waterfill.tuning.pruning.structure import structure_of
from waterfill.tuning.pruning.writing import write


def test_the_best_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refitting, "DAMPING", 1e-9)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    w, kept = torch.randn(5, 12, generator=generator), torch.tensor([0, 2, 3, 7, 8, 11])
    found = refitted(w, x.T @ x, kept)
    expected = np.linalg.lstsq(x[:, kept].double().numpy(), (x.double() @ w.double().T).numpy(), rcond=None)[0].T
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_damping_holds_weights_where_they_are() -> None:
    """The minimum of the damped sum of squares, by its gradient; and nothing moves where nothing flows."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(20, 6, generator=generator), torch.randn(3, 6, generator=generator)
    kept = torch.tensor([1, 4, 5])
    moments = x.T @ x
    found = refitted(w, moments, kept).requires_grad_()
    damping = refitting.DAMPING * float(moments[kept, kept].mean())
    lost = (x.double() @ w.double().T - x[:, kept].double() @ found.T).square().sum()
    (lost + damping * (found - w[:, kept].double()).square().sum()).backward()
    assert found.grad is not None
    assert float(found.grad.abs().max()) < 1e-4
    assert torch.equal(refitted(w, torch.zeros(6, 6), kept), w[:, kept].double())


def test_the_model_loses_less(ref_llama: Path, tmp_path: Path) -> None:
    """On texts of its own that nothing was fitted on."""
    checkpoint = open_checkpoint(ref_llama)
    structure, architecture = structure_of(checkpoint), describe(checkpoint)
    model = open_model(checkpoint, torch.float32)
    tokens = probe_tokens(loaded(ref_llama), None, Probe(sequences=20, length=64))
    fitted, tried = tokens[:16], tokens[16:]
    selection = select(score(checkpoint, structure, model, fitted, "random", 0), Shape(6, 2, 640))
    lost = []
    for refit in (False, True):
        weights = Refitted(checkpoint, architecture, structure, selection, fitted, torch.float32)
        options = {"weights": weights} if refit else {}
        write(checkpoint, structure, selection, tmp_path / str(refit), None, **options)  # type: ignore[arg-type]
        pruned = open_model(open_checkpoint(tmp_path / str(refit)), torch.float32)
        lost.append(sum(loss_of(model, pruned, tried)))
    assert lost[1] < 0.7 * lost[0]


def test_what_loses_nothing_stays(family: Family) -> None:
    checkpoint = open_checkpoint(family("llama"))
    structure, architecture = structure_of(checkpoint), describe(checkpoint)
    tokens = torch.randint(250, (4, 16), generator=torch.Generator().manual_seed(0))
    scores = score(checkpoint, structure, None, tokens, "random", 0)
    selection = select(scores, Shape(2, KV_HEADS, 64), torch.tensor([1.0, 0.0, 1.0]))
    given = Refitted(checkpoint, architecture, structure, selection, tokens, torch.float32)
    for layer in range(LAYERS):
        for name, shape in (("self_attn.o_proj", None), ("mlp.up_proj", None), ("mlp.down_proj", (48, 64))):
            member = structure.members[f"model.layers.{layer}.{name}.weight"]
            weight = given(member.tensor)
            assert (None if weight is None else tuple(weight.shape)) == (None if layer == 1 else shape)
    everything = replace(architecture, tensors=architecture.kept)
    without = Refitted(checkpoint, everything, structure, selection, tokens, torch.float32)
    assert without(structure.members["model.layers.0.mlp.down_proj.weight"].tensor) is None
