"""What sensitivities are made of: sampled labels, and noise of each group's power, orthogonal to its weights."""

from __future__ import annotations

import pytest
import torch

from waterfill.codecs.groups import group_sums
from waterfill.files.architecture import Architecture
from waterfill.planning import costs
from waterfill.planning.costs import Costs, row_costs
from waterfill.planning.estimators import _drawn, group_power, orthogonal, sampled_score

WIDTHS = [1, 3, 64, 172, 1600, 2600]  # one group, and several


@pytest.mark.parametrize("width", WIDTHS[1:])
def test_noise_is_orthogonal_to_the_weights_and_keeps_its_power(width: int) -> None:
    weight = torch.randn(200, width) * torch.logspace(-2, 2, width)
    noise = orthogonal(torch.randn(200, width), weight)
    along = group_sums(noise * weight) / (group_sums(noise.square()) * group_sums(weight.square())).sqrt()
    assert along.abs().max() < 1e-3
    assert group_power(noise).mean() == pytest.approx(1, rel=0.15 if width == 3 else 0.03)


@pytest.mark.parametrize("width", WIDTHS)
def test_cost_is_the_expected_square_of_gradient_times_noise(width: int) -> None:
    weight, gradient = torch.randn(1, width), torch.randn(1, width) + 0.5
    gradient = gradient + weight  # a slope along the weights must not count
    cost = float(row_costs(weight, gradient).sum())
    draws = torch.randn(20_000, width)
    size = torch.cat([group_power(weight)[:, [i]].expand(1, n) for i, n in enumerate(_sizes(width))], dim=1)
    noise = orthogonal(draws, weight.expand_as(draws).contiguous()) * size.sqrt()
    assert cost == pytest.approx(float((noise @ gradient.T).square().mean()), rel=0.05, abs=1e-9)


def _sizes(width: int) -> list[int]:
    return [int(n) for n in group_sums(torch.ones(1, width))[0]]


def test_gradients_along_the_weights_cost_nothing() -> None:
    weight = torch.randn(5, 172)
    assert float(row_costs(weight, 3 * weight).sum()) == pytest.approx(0, abs=1e-2)
    assert float(row_costs(weight, torch.zeros(5, 172)).sum()) == 0
    assert float(row_costs(torch.zeros(5, 172), weight).sum()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_score_of_sampled_labels_is_what_automatic_differentiation_gives(dtype: torch.dtype) -> None:
    part = torch.randint(40, (3, 7), generator=torch.Generator().manual_seed(2))
    logits = (3 * torch.randn(3, 7, 40)).to(dtype).requires_grad_()
    slope, nll = sampled_score(logits.detach(), part, torch.Generator().manual_seed(5))
    log_p = logits.float().log_softmax(-1)[:, :-1]
    labels = _drawn(log_p.detach().exp().flatten(0, 1), torch.Generator().manual_seed(5))
    (expected,) = torch.autograd.grad(log_p.flatten(0, 1).gather(1, labels).sum(), logits)
    assert slope.dtype == dtype
    torch.testing.assert_close(slope, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-5)
    assert float(slope[:, -1].abs().max()) == 0, "nothing follows the last token"
    assert nll == pytest.approx(torch.nn.functional.nll_loss(log_p.flatten(0, 1), part[:, 1:].flatten()).item())


def test_labels_are_drawn_from_the_predictions() -> None:
    """So that the score has the mean zero, and the covariance of one draw."""
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0]).expand(1, 40_001, 4)
    slope, _ = sampled_score(logits, torch.zeros(1, 40_001, dtype=torch.int64), torch.Generator().manual_seed(0))
    p, score = logits[0, 0].softmax(-1), slope[0, :-1]
    torch.testing.assert_close(score.mean(0), torch.zeros(4), atol=0.01, rtol=0)
    torch.testing.assert_close(score.T @ score / 40_000, p.diag() - p.outer(p), atol=0.01, rtol=0)


def test_costs_of_rows_add_up_to_those_of_the_whole(dense: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    (matrix,) = (matrix for matrix in dense.matrices if matrix.name == "lm_head")
    weight, gradient, wrong = (torch.randn(matrix.shape) for _ in range(3))
    whole, parts = Costs([matrix]), Costs([matrix])
    whole.add(matrix.parameter, weight, gradient, 1)
    monkeypatch.setattr(costs, "CHUNK_WEIGHTS", 300)
    parts.add(matrix.parameter, weight[100:], gradient[100:], 1)
    parts.add(matrix.parameter, weight[:100], wrong[:100], 1)
    parts.add(matrix.parameter, weight[:100], wrong[:100], -1)
    parts.add(matrix.parameter, weight[:100], gradient[:100], 1)
    parts.add("another", weight, gradient, 1)
    assert parts.across == pytest.approx(whole.across, rel=1e-4)
    assert parts.along == pytest.approx(whole.along, abs=1e-2)
    assert whole.across["lm_head"] == pytest.approx(float(row_costs(weight, gradient).sum()))
    assert whole.along["lm_head"] == pytest.approx(float((weight * gradient).sum()), abs=1e-2)
