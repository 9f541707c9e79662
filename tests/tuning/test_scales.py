"""Scales as parameters: their gradients against autograd's through decoded weights, and what training leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import waterfill
from tests.support import models
from tests.support.kernel_samples import ISAS, activations, in_memory, one_thread, same_bits
from waterfill import kernels
from waterfill.base.native import FLOAT_ACTIVATIONS
from waterfill.codecs.groups import per_weight
from waterfill.codecs.hadamard import rotate
from waterfill.kernels import reference
from waterfill.kernels.reference import STORED, Packed
from waterfill.running.hf.packed import PackedMatrix
from waterfill.tuning.scales import TrainedScales, train_scales

CODECS = ["higgs-p1-n88", "higgs-p3-n512", "bitshift-3.5", "levels-8"]
ROWS = 21  # more than a tile of rows
each_layout = pytest.mark.parametrize("layout", [STORED, *ISAS])
each_codec = pytest.mark.parametrize("codec", CODECS)
each_width = pytest.mark.parametrize("width", [172, 2100])  # one group, and two


@pytest.fixture(autouse=True)
def _float_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FLOAT_ACTIVATIONS, "float")


def some_gains(packed: Packed) -> nn.Parameter:
    shape = kernels.scales_of(packed).shape
    return nn.Parameter(1 + 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(5)))


def trained(packed: Packed) -> TrainedScales:
    """With gains that are not ones."""
    gains = some_gains(packed)
    made = TrainedScales(packed, nn.Parameter(torch.ones_like(gains)))
    with torch.no_grad():
        made.gains.copy_(gains)
    return made


def dense_product(x: Tensor, gains: Tensor, weight: Tensor) -> Tensor:
    """x W^T with every group of W times its gain, float64; in the rotated basis, where groups are apart."""
    return rotate(x.double()) @ (rotate(weight.double()) * per_weight(gains.double(), weight.shape[1])).T


# ------------------------------------------------------------------------------------------------------------ gradients


@each_width
@each_layout
@each_codec
def test_gradients_of_a_product_are_those_of_autograd(codec: str, layout: str, width: int) -> None:
    packed, weight = in_memory(codec, layout, ROWS, width)
    scales = trained(packed)
    x, upstream = activations(5, width), activations(5, ROWS, seed=2)
    known = scales.gains.detach().requires_grad_()
    with one_thread():
        mine = x.clone().requires_grad_()
        y = scales.multiply(mine)
        y.backward(upstream)
        (of_gains,) = torch.autograd.grad(dense_product(x, known, weight), known, upstream.double())
    close(y, dense_product(x, known, weight), 1e-3)  # fp16 rounds scales by up to 2^-11
    close(scales.gains.grad, of_gains, 1e-3)
    close(mine.grad, upstream.double() @ scales.dense().double(), 1e-5)


@each_width
@each_layout
def test_gradients_of_rows_that_are_looked_up_are_those_of_autograd(layout: str, width: int) -> None:
    packed, weight = in_memory("higgs-p2-n64", layout, ROWS, width)
    scales = trained(packed)
    ids, upstream = torch.tensor([[3, 20, 3], [0, 3, 7]]), activations(6, width, seed=2).view(2, 3, width)
    known = scales.gains.detach().requires_grad_()
    rows = scales.rows(ids)
    rows.backward(upstream)
    expected = (rotate(weight.double()) * per_weight(known.double(), width))[ids]
    (of_gains,) = torch.autograd.grad(expected, known, rotate(upstream.double()))
    close(rotate(rows.detach()), expected, 1e-3)
    close(scales.gains.grad, of_gains, 1e-3)
    assert not scales.gains.grad[5].any(), "row 5 was not looked up"  # type: ignore[index]


def test_parts_are_computed_by_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    x, upstream = activations(4, 2100), activations(4, ROWS, seed=2)
    packed, _ = in_memory("higgs-p2-n64", STORED, ROWS, 2100)
    whole = kernels.scale_gradient(x, upstream, packed)
    monkeypatch.setattr(reference, "TILE_WEIGHTS", 4 * 2100)
    assert len(list(reference.tiles(packed))) == 6
    close(kernels.scale_gradient(x, upstream, packed), whole, 1e-6)


def close(got: Any, expected: Tensor, share: float) -> None:
    torch.testing.assert_close(
        got.double(), expected.double(), rtol=0, atol=share * float(expected.detach().abs().max())
    )


# --------------------------------------------------------------------------------------------------- scales and layouts


@each_width
@each_layout
@each_codec
def test_scales_are_read_and_written_in_every_layout(codec: str, layout: str, width: int) -> None:
    packed, _ = in_memory(codec, layout, ROWS, width)
    stored, weight = in_memory(codec, STORED, ROWS, width)
    assert same_bits(kernels.scales_of(packed), stored.scales)
    codes = packed.codes.clone()
    others = (stored.scales * torch.linspace(0.5, 2, stored.scales.numel()).view_as(stored.scales)).half()
    kernels.set_scales(packed, others)
    assert same_bits(kernels.scales_of(packed), others)
    assert torch.equal(packed.codes, codes)
    expected = rotate(weight) * per_weight(others.float() / stored.scales.float(), width)
    close(rotate(kernels.dense(packed)), expected.double(), 1e-5)


# ------------------------------------------------------------------------------------------------------- loaded models


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.tiny_llama(tmp_path_factory.mktemp("scales") / "llama", tied=True)


def packed_model(checkpoint: Path, out: Path, codec: str) -> Path:
    waterfill.pack(checkpoint, out, bits=9, codecs=[codec], alpha="uniform", feedback="none")
    return out


def test_only_scales_of_a_loaded_model_are_trained(checkpoint: Path, tmp_path: Path) -> None:
    model = waterfill.load(packed_model(checkpoint, tmp_path / "packed", "bitshift-3"), dtype=torch.float32)
    ids = torch.arange(48).view(2, 24)
    before = model(input_ids=ids).logits
    codes = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith(".codes")}
    scales = train_scales(model)
    assert scales.keys() == {name for name, module in model.named_modules() if isinstance(module, PackedMatrix)}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {f"{name}.gains" for name in scales}
    assert torch.equal(model(input_ids=ids).logits, before), "gains are ones"
    optimizer = torch.optim.SGD([scale.gains for scale in scales.values()], lr=0.05)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(torch.equal(buffer, codes[name]) for name, buffer in model.named_buffers() if name in codes)
    first = {name: scale.scales for name, scale in scales.items()}
    trained_logits = model(input_ids=ids).logits
    with torch.no_grad():
        for scale in scales.values():
            scale.gains.fill_(1)
    assert torch.equal(model(input_ids=ids).logits, before), "another task's scales are another task's model"
    with torch.no_grad():
        for name, scale in scales.items():
            scale.gains.copy_(first[name].float() / scale._first)
    torch.testing.assert_close(model(input_ids=ids).logits, trained_logits, rtol=0, atol=1e-2)


def test_what_has_no_scales_in_its_file_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    model = waterfill.load(packed_model(checkpoint, tmp_path / "trellis", "trellis"))
    with pytest.raises(waterfill.WaterfillError, match=r"no matrix .* scale per row and group \(they are trellis\)"):
        train_scales(model)
    model = waterfill.load(packed_model(checkpoint, tmp_path / "grids", "higgs-p1-n16"))
    train_scales(model)
    with pytest.raises(waterfill.WaterfillError, match="trained already"):
        train_scales(model)
