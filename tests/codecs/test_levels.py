"""Eight bits: the nearest level of each group's scale."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from waterfill.codecs import get_codec, scale_exponent
from waterfill.codecs.groups import group_sums, per_weight
from waterfill.codecs.hadamard import rotate
from waterfill.codecs.levels import MOST_LEVEL, REACH

CODEC = get_codec("levels-8")


def gaussian(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("shape", [(64, 512), (40, 576), (16, 1536), (1, 1), (3, 7), (5, 2600)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 300.0])
def test_it_loses_what_it_says(shape: tuple[int, int], scale: float) -> None:
    weight = gaussian(shape) * scale
    encoded = CODEC.encode(weight, exponent=scale_exponent(float(weight.abs().max())))
    decoded = CODEC.decode(encoded)
    error = float((decoded - weight).square().sum() / weight.square().sum())
    assert error == pytest.approx(encoded.noise_power / encoded.power, rel=0.02, abs=1e-7)
    if weight.numel() > 10_000:
        assert error == pytest.approx(CODEC.distortion(shape), rel=0.1)  # of which few weights far out are a fifteenth
    assert error < 3 * CODEC.distortion(shape)


def test_codes_are_the_nearest_levels_of_a_step_by_the_groups_size() -> None:
    weight = gaussian((6, 1600)) * torch.logspace(-2, 2, 6)[:, None]
    encoded = CODEC.encode(weight)
    rotated = rotate(weight).numpy().astype(np.float64)
    sums = per_weight(group_sums(torch.from_numpy(rotated) ** 2), 1600).numpy()
    sizes = per_weight(group_sums(torch.ones(6, 1600)), 1600).numpy()
    levels = rotated / np.sqrt(sums / sizes) * MOST_LEVEL / REACH
    found = encoded.buffers["codes"].numpy().reshape(6, -1)[:, :1600].astype(int) - 128
    assert np.abs(found).max() <= MOST_LEVEL
    assert np.abs(found - np.clip(levels, -MOST_LEVEL, MOST_LEVEL)).max() < 0.501


def test_its_reach_loses_the_least() -> None:
    def lost(reach: float) -> float:
        x = gaussian((1000, 1000))
        step = reach / MOST_LEVEL
        levels = (x / step).round().clamp(-MOST_LEVEL, MOST_LEVEL)
        return float((levels * step - x).square().mean())

    assert lost(REACH) < min(lost(REACH - 0.4), lost(REACH + 0.5))
    assert lost(REACH) == pytest.approx(CODEC.distortion((1000, 1000)), rel=0.05)


def test_zeros_are_zeros() -> None:
    weight = gaussian((3, 512))
    weight[1] = 0
    assert float(CODEC.decode(CODEC.encode(weight))[1].abs().max()) == 0
