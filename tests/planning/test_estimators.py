"""The noise that sensitivities are for: of each group's power, and orthogonal to its weights."""

from __future__ import annotations

import pytest
import torch

from waterfill.codecs.groups import group_sums
from waterfill.planning.estimators import _noise_cost, _orthogonal, group_power

WIDTHS = [1, 3, 64, 172, 1600, 2600]  # one group, and several


@pytest.mark.parametrize("width", WIDTHS[1:])
def test_noise_is_orthogonal_to_the_weights_and_keeps_its_power(width: int) -> None:
    weight = torch.randn(200, width) * torch.logspace(-2, 2, width)
    noise = _orthogonal(torch.randn(200, width), weight)
    along = group_sums(noise * weight) / (group_sums(noise.square()) * group_sums(weight.square())).sqrt()
    assert along.abs().max() < 1e-3
    assert group_power(noise).mean() == pytest.approx(1, rel=0.15 if width == 3 else 0.03)


@pytest.mark.parametrize("width", WIDTHS)
def test_cost_is_the_expected_square_of_gradient_times_noise(width: int) -> None:
    weight, gradient = torch.randn(1, width), torch.randn(1, width) + 0.5
    gradient = gradient + weight  # a slope along the weights must not count
    cost = float(_noise_cost(weight, gradient))
    draws = torch.randn(20_000, width)
    size = torch.cat([group_power(weight)[:, [i]].expand(1, n) for i, n in enumerate(_sizes(width))], dim=1)
    noise = _orthogonal(draws, weight.expand_as(draws).contiguous()) * size.sqrt()
    assert cost == pytest.approx(float((noise @ gradient.T).square().mean()), rel=0.05, abs=1e-9)


def _sizes(width: int) -> list[int]:
    return [int(n) for n in group_sums(torch.ones(1, width))[0]]


def test_gradients_along_the_weights_cost_nothing() -> None:
    weight = torch.randn(5, 172)
    assert float(_noise_cost(weight, 3 * weight)) == pytest.approx(0, abs=1e-2)
    assert float(_noise_cost(weight, torch.zeros(5, 172))) == 0
    assert float(_noise_cost(torch.zeros(5, 172), weight)) == 0
