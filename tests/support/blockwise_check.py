"""A model that is read block by block beside the same one loaded as a whole: logits, and all that gradients sum up to.

Gradients of tables come row by row, in any order, and some are taken back; compared is what a sum over rows can be made
of: the gradient's power, its product with the weights, and both powers' products.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import LlamaModel

from tests.support.family_check import token_ids
from waterfill.files.architecture import parameters_of
from waterfill.files.blockwise import load_blockwise
from waterfill.files.checkpoint import Checkpoint, open_checkpoint
from waterfill.files.model_calls import read
from waterfill.files.original import load_original

Sums = dict[str, Tensor]
TOLERANCE = 1e-5


def both(path: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The model of a checkpoint block by block, and as a whole."""
    checkpoint: Checkpoint = open_checkpoint(path)
    return load_blockwise(checkpoint, dtype), load_original(checkpoint, dtype).requires_grad_(False)


def logits_of(model: Any, ids: Tensor | None = None) -> Tensor:
    torch.manual_seed(0)  # Reformer hashes at random
    return read(model, token_ids() if ids is None else ids)


def assert_same(path: Path, ids: Tensor | None = None) -> Any:
    """Logits and gradients of every parameter; returns the model that is read block by block."""
    blockwise, whole = both(path)
    with torch.no_grad():
        found, expected = logits_of(blockwise, ids), logits_of(whole, ids)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * float(expected.std()))
    if blockwise.blockwise is not None:
        assert_gradients(blockwise, whole, set(parameters_of(whole)), ids)
    return blockwise


def assert_gradients(blockwise: Any, whole: Any, wanted: Set[str], ids: Tensor | None = None) -> None:
    """Of these parameters; where the whole model gives any."""
    try:
        expected = whole_sums(whole, wanted, ids)
    except AssertionError:  # Reformer's own: it has gradients in training only
        return
    found = blockwise_sums(blockwise, wanted, ids)
    scale = torch.stack(list(expected.values())).amax(0)
    for names in _tied(whole, wanted):
        a, b = (sum((sums.get(name, torch.zeros(4)) for name in names), torch.zeros(4)) for sums in (found, expected))
        # The product may cancel; what counts there is how large its terms are.
        margins = TOLERANCE * b[[0, 3, 2]] + 1e-9 * scale[[0, 3, 2]]
        assert ((a - b)[:3].abs() <= margins).all(), f"{names[0]}: {a.tolist()}, not {b.tolist()}"


def _tied(model: Any, wanted: Set[str]) -> Iterator[list[str]]:
    """Names of the same parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in parameters_of(model).items():
        if name in wanted:
            names.setdefault(id(parameter), []).append(name)
    yield from names.values()


def slope_of(logits: Tensor) -> Tensor:
    return torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))


def whole_sums(model: Any, wanted: Set[str], ids: Tensor | None = None) -> Sums:
    """Of a model in memory, by parameter."""
    parameters = {name: parameter for name, parameter in parameters_of(model).items() if name in wanted}
    for parameter in parameters.values():
        parameter.requires_grad_()
    try:
        logits = logits_of(model, ids)
        logits.backward(slope_of(logits))
        named = {names[0]: parameters[names[0]] for names in _tied(model, wanted)}
        return {name: _sums(p.detach(), p.grad) for name, p in named.items() if p.grad is not None}
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False).grad = None


def blockwise_sums(model: Any, wanted: Set[str], ids: Tensor | None = None) -> Sums:
    """Of a model that is read block by block."""
    sums: Sums = {}

    def consume(name: str, weight: Tensor, gradient: Tensor, sign: int) -> None:
        assert name in wanted
        sums[name] = sums.get(name, torch.zeros(4, dtype=torch.float64)) + sign * _sums(weight, gradient)

    with model.blockwise.gradients(wanted, consume):
        logits = logits_of(model, ids)
        logits.backward(slope_of(logits))
    return sums


def _sums(weight: Tensor, gradient: Tensor) -> Tensor:
    """Power of the gradient; its product with the weights; powers of both, row by row; size of the product's terms."""
    w, g = (each.double().reshape(len(each) if each.ndim else 1, -1) for each in (weight, gradient))
    rows = g.square().sum(1) * w.square().sum(1)
    return torch.stack([g.square().sum(), (g * w).sum(), rows.sum(), rows.sqrt().sum()])


@contextmanager
def llama_that(before: Any) -> Iterator[None]:
    """Llamas call this with themselves and the token ids; what it returns takes the place of what they look up."""
    forward = LlamaModel.forward

    def changed(self: Any, input_ids: Tensor, **options: Any) -> Any:
        return forward(self, **{**options, "inputs_embeds": before(self, input_ids)})

    with mock.patch.object(LlamaModel, "forward", changed):
        yield
