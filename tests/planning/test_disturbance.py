"""Noise of a plan's size in all matrices at once, and what a model loses with it."""

from __future__ import annotations

import copy
import math
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import models
from waterfill.base.errors import WaterfillError
from waterfill.codecs import get_codec
from waterfill.codecs.groups import group_sums
from waterfill.codecs.hadamard import groups
from waterfill.files.architecture import describe, parameters_of
from waterfill.files.blockwise import load_blockwise
from waterfill.files.checkpoint import open_checkpoint
from waterfill.files.original import load_original
from waterfill.planning.budget import Budget
from waterfill.planning.costs import matrix_view
from waterfill.planning.disturbance import Disturbance, Noise, _Numbers, _with_noise, disturbed, divergence, losses
from waterfill.planning.loss import Coefficients, predicted_kl
from waterfill.planning.plan import Plan
from waterfill.planning.planner import Request, make_plan
from waterfill.planning.sensitivity import Sensitivity

MODELS = ["llama", "gemma", "gpt2", "mixtral"]  # tied and not, stored the other way round, experts in one parameter


class Opened:
    """A tiny model, block by block and in memory."""

    def __init__(self, path: Path) -> None:
        checkpoint = open_checkpoint(path)
        self.architecture = describe(checkpoint)
        self.matrices = self.architecture.matrices
        self.blockwise = load_blockwise(checkpoint, torch.float32)
        self.whole: Any = load_original(checkpoint, torch.float32)
        self.whole.blockwise = None
        self.ids = torch.randint(0, 60, (3, 12), generator=torch.Generator().manual_seed(0))

    def noise(self, power: float, scale: float = 1.0) -> Disturbance:
        return Disturbance({matrix.name: Noise(scale, power) for matrix in self.matrices})

    def plan(self, **request: Any) -> tuple[Plan, Sensitivity]:
        tensors = {m.name: Coefficients(0.1 + i, 0.2 + i) for i, m in enumerate(self.matrices)}
        measured = Sensitivity("f", "fisher", {"kind": "self"}, 3.0, 10, tensors)
        return make_plan("m", self.architecture, measured, Budget(bits=4), Request(**request)), measured


@pytest.fixture(params=MODELS)
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Opened:
    return Opened(getattr(models, f"tiny_{request.param}")(tmp_path))


def slow(model: Any, opened: Opened, noise: Disturbance, seed: int, lead: int) -> list[float]:
    """The same with a copy of the model, whose matrices are changed one after the other."""
    other, numbers = copy.deepcopy(model), _Numbers(seed)
    with torch.no_grad():
        for matrix in opened.matrices:
            view = matrix_view(parameters_of(other)[matrix.parameter], matrix)
            rows, width = view.shape
            drawn = numbers.of(matrix.name, torch.arange(rows), width)
            scale, share = noise.noise[matrix.name]
            for group in groups(width):
                columns = slice(group.start, group.stop)
                part = view[:, columns].clone()
                sigma = (share * part.square().mean(1, keepdim=True)).sqrt()
                view[:, columns] = scale * part + sigma * drawn[:, columns]
        p, q = (each(input_ids=opened.ids).logits[:, lead:-1].double().log_softmax(-1) for each in (model, other))
    return [float(value) for value in (p.exp() * (p - q)).sum(-1).mean(1)]


def test_losses_are_those_of_a_model_with_that_noise(opened: Opened) -> None:
    for noise, lead in ((opened.noise(0.02, 0.97), 0), (opened.noise(0.3), 4)):
        expected = slow(opened.whole, opened, noise, 7, lead)
        for model in (opened.blockwise, opened.whole):
            (found,) = losses(model, opened.matrices, opened.ids, [noise], 7, lead=lead)
            assert found == pytest.approx(expected, rel=1e-3, abs=1e-7)
            assert len(found) == len(opened.ids)


def test_the_model_is_as_it_was_afterwards(opened: Opened) -> None:
    for model in (opened.blockwise, opened.whole):
        before = model(input_ids=opened.ids).logits
        losses(model, opened.matrices, opened.ids, [opened.noise(0.5)], 1)
        assert torch.equal(model(input_ids=opened.ids).logits, before)
        with suppress(KeyboardInterrupt), disturbed(model, opened.matrices, opened.noise(0.5), _Numbers(0)):
            assert not torch.equal(model(input_ids=opened.ids).logits, before)
            raise KeyboardInterrupt
        assert torch.equal(model(input_ids=opened.ids).logits, before)


def test_less_noise_loses_in_proportion(opened: Opened) -> None:
    whole, weak = losses(opened.blockwise, opened.matrices, opened.ids, [opened.noise(1e-3), opened.noise(2.5e-4)], 3)
    assert sum(weak) / sum(whole) == pytest.approx(0.25, rel=0.15)


def test_no_noise_loses_nothing(opened: Opened) -> None:
    ((*found,),) = losses(opened.blockwise, opened.matrices, opened.ids, [Disturbance({})], 3)
    assert found == [0.0] * 3


# -- of a plan --------------------------------------------------------------------------------------------------------


@pytest.fixture
def llama(tmp_path: Path) -> Opened:
    return Opened(models.tiny_llama(tmp_path))


def test_noise_is_that_of_the_plans_codecs(llama: Opened) -> None:
    plan, measured = llama.plan(gain="auto")
    noise = Disturbance.of(plan.tensors)
    assert list(noise.noise) == [tensor.name for tensor in plan.tensors if tensor.packed]
    expected = 0.0
    for tensor in plan.tensors:
        if tensor.packed:
            t2 = get_codec(tensor.codec).distortion(tensor.shape)
            expected += predicted_kl(measured.tensors[tensor.name], t2, tensor.rho)
    assert noise.predicted(measured) == pytest.approx(expected)
    assert noise.predicted(measured) == pytest.approx(plan.predicted.kl, rel=0.05)


def test_what_feedback_leaves_is_left_of_the_noise(llama: Opened) -> None:
    plan, measured = llama.plan(gain="unbiased")
    fed_back = [replace(tensor, feedback=0.25) for tensor in plan.tensors]
    plain, less = (Disturbance.of(tensors).predicted(measured) for tensors in (plan.tensors, fed_back))
    assert less == pytest.approx(0.25 * plain)


def test_what_stays_as_it_is_is_not_disturbed(llama: Opened) -> None:
    plan, measured = llama.plan()
    kept = [replace(tensor, codec="raw") for tensor in plan.tensors]
    assert Disturbance.of(kept).noise == {}
    assert Disturbance.of(kept).predicted(measured) == 0


def test_even_noise_loses_as_much_by_every_weight(llama: Opened) -> None:
    _, measured = llama.plan()
    even = Disturbance.even(llama.matrices, measured, 0.01)
    assert even.predicted(measured) == pytest.approx(0.01)
    each = {n: measured.tensors[n].alpha * noise.power for n, noise in even.noise.items()}
    sizes = {matrix.name: math.prod(matrix.shape) for matrix in llama.matrices}
    assert [each[n] / size for n, size in sizes.items()] == pytest.approx([0.01 / sum(sizes.values())] * len(sizes))


def test_even_noise_is_never_much_of_a_matrix(llama: Opened) -> None:
    _, measured = llama.plan()
    nothing = dict.fromkeys(measured.tensors, Coefficients(-1e-3, 0.0))
    for found in (measured, replace(measured, tensors=nothing)):
        assert all(0 < noise.power <= 0.1 for noise in Disturbance.even(llama.matrices, found, 1e3).noise.values())
    assert Disturbance.even(llama.matrices, replace(measured, tensors=nothing), 0.01).predicted(measured) > 0


def test_plans_are_told_apart_by_their_noise(llama: Opened) -> None:
    assert llama.noise(0.1).digest == llama.noise(0.1).digest
    assert len({llama.noise(0.1).digest, llama.noise(0.2).digest, llama.noise(0.1, 0.5).digest}) == 3


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_numbers_of_a_row_are_the_same_whoever_asks() -> None:
    numbers = _Numbers(5)
    whole = numbers.of("a", torch.arange(100), 64)
    assert torch.equal(numbers.of("a", torch.tensor([7, 99, 3]), 64), whole[[7, 99, 3]])
    assert torch.equal(_Numbers(5).of("a", torch.arange(100), 64), whole)
    assert not torch.equal(numbers.of("b", torch.arange(100), 64), whole)
    assert not torch.equal(_Numbers(6).of("a", torch.arange(100), 64), whole)


def test_numbers_are_normal_and_rows_have_nothing_to_do_with_each_other() -> None:
    drawn = _Numbers(1).of("a", torch.arange(2000), 256)
    assert float(drawn.mean()) == pytest.approx(0, abs=0.01)
    assert float(drawn.var()) == pytest.approx(1, abs=0.01)
    assert float(drawn.pow(4).mean()) == pytest.approx(3, abs=0.1)
    products = drawn[:500] @ drawn[:500].T / math.sqrt(256)
    products.fill_diagonal_(0)
    assert float(products.var()) == pytest.approx(1, abs=0.1)


def test_noise_has_each_groups_share_of_power() -> None:
    weight = torch.randn(400, 96, generator=torch.Generator().manual_seed(0))
    weight[:, 64:] *= 5
    error = _with_noise(weight, Noise(1.0, 0.04), _Numbers(0).of("a", torch.arange(400), 96)) - weight
    share = group_sums(error.square()).sum(0) / group_sums(weight.square()).sum(0)
    assert share.tolist() == pytest.approx([0.04] * len(share), rel=0.05)


def test_logits_that_are_no_numbers_are_refused(llama: Opened) -> None:
    with pytest.raises(WaterfillError, match="NaN or infinite logits"):
        losses(llama.blockwise, llama.matrices, llama.ids, [llama.noise(math.inf)], 0)


def test_tokens_that_are_never_written_lose_nothing() -> None:
    logits = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0))
    plain = [divergence(*logits[..., :8])]
    logits[..., 8] = -math.inf
    assert [divergence(*logits)] == pytest.approx(plain)
