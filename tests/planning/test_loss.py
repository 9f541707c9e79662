"""The two-coefficient loss: its formulas, its best gain, and vectors that behave as it says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from waterfill.planning.loss import (
    GAINS,
    Coefficients,
    gain_rho,
    predicted_kl,
    predicted_kls,
    projection,
    relative_error,
)

POSITIVE = st.floats(1e-9, 1e3)
ANY = st.floats(-1e3, 1e3)
DISTORTION = st.floats(1e-5, 0.5)
SHARE = st.floats(0, 1)


def kl_at(alpha: float, beta: float, u: float, t2: float) -> float:
    """alpha u^2 t2 / (1 - t2) + beta (1 - u)^2, the formula of docs/design.md."""
    return alpha * u**2 * t2 / (1 - t2) + beta * (1 - u) ** 2


@given(POSITIVE, POSITIVE, DISTORTION)
def test_the_three_gains(alpha: float, beta: float, t2: float) -> None:
    c = Coefficients(alpha, beta)
    mse, unbiased, auto = (predicted_kl(c, t2, gain_rho(gain, c)) for gain in ("mse", "unbiased", "auto"))
    assert mse == pytest.approx(kl_at(alpha, beta, 1 - t2, t2))
    assert mse == pytest.approx(alpha * t2 * (1 - t2) + beta * t2**2)
    assert unbiased == pytest.approx(kl_at(alpha, beta, 1, t2))
    assert unbiased == pytest.approx(alpha * t2 / (1 - t2))
    u = 1 / (1 + min(alpha / beta, 1) ** 2 * t2 / (1 - t2))
    assert auto == pytest.approx(kl_at(alpha, beta, u, t2))


@given(ANY, ANY, DISTORTION)
def test_the_chosen_gain_is_never_worse(alpha: float, beta: float, t2: float) -> None:
    c = Coefficients(alpha, beta)
    kl = {gain: predicted_kl(c, t2, gain_rho(gain, c)) for gain in GAINS}
    assert 0 <= kl["auto"] <= min(kl.values()) * (1 + 1e-9)


@given(POSITIVE, POSITIVE, DISTORTION)
def test_the_formula_alone_is_least_at_alpha_over_beta(alpha: float, beta: float, t2: float) -> None:
    c = Coefficients(alpha, beta)
    ratio = alpha / beta
    least = predicted_kl(c, t2, ratio)
    assert least == pytest.approx(alpha * projection(t2, ratio) * t2 / (1 - t2))
    assert least <= min(predicted_kl(c, t2, rho) for rho in (0.0, ratio / 2, ratio * 2, 1.0)) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("alpha", "beta", "rho"),
    [(1, 4, 0.0625), (10, 1, 1), (-1, 10, 0), (0, 10, 0), (1, 0, 1), (1, -5, 1), (0, 0, 1), (1e300, 1e-300, 1)],
)
def test_the_chosen_rho(alpha: float, beta: float, rho: float) -> None:
    c = Coefficients(alpha, beta)
    assert gain_rho("auto", c) == rho
    assert (gain_rho("mse", c), gain_rho("unbiased", c)) == (1, 0)


@given(ANY, ANY, DISTORTION, st.floats(0, 1))
def test_negative_estimates_count_as_zero(alpha: float, beta: float, t2: float, rho: float) -> None:
    expected = predicted_kl(Coefficients(max(alpha, 0), max(beta, 0)), t2, rho)
    assert predicted_kl(Coefficients(alpha, beta), t2, rho) == expected >= 0


@given(POSITIVE, POSITIVE, st.floats(0, 1))
def test_nothing_lost_costs_nothing(alpha: float, beta: float, rho: float) -> None:
    assert predicted_kl(Coefficients(alpha, beta), 0.0, rho) == 0
    assert relative_error(0.0, rho) == 0
    assert projection(0.0, rho) == 1


@given(POSITIVE, POSITIVE, DISTORTION, DISTORTION)
def test_more_distortion_costs_more(alpha: float, beta: float, one: float, other: float) -> None:
    assume(abs(one - other) > 1e-9)
    c = Coefficients(alpha, beta)
    for gain in GAINS:
        rho = gain_rho(gain, c)
        assert predicted_kl(c, min(one, other), rho) < predicted_kl(c, max(one, other), rho)


@given(DISTORTION, st.floats(0, 1))
def test_error_is_least_with_the_mse_scale(t2: float, rho: float) -> None:
    assert relative_error(t2, 1.0) == pytest.approx(t2)
    assert relative_error(t2, 0.0) == pytest.approx(t2 / (1 - t2))
    assert relative_error(t2, rho) >= t2 * (1 - 1e-12)


@pytest.mark.parametrize("t2", [0.01, 0.11748, 0.4])
@pytest.mark.parametrize("rho", [0.0, 0.1, 0.7, 1.0])
def test_simulated_vectors(t2: float, rho: float) -> None:
    """A vector of cos² = 1 - t² to the original, scaled to the projection u, has just the error that is predicted, and
    costs what a quadratic loss with alpha and beta charges for it."""
    generator = torch.Generator().manual_seed(0)
    w, noise = torch.randn(2, 1_000_000, dtype=torch.float64, generator=generator)
    noise -= w * (noise @ w) / (w @ w)
    q = math.sqrt(1 - t2) * w / w.norm() + math.sqrt(t2) * noise / noise.norm()
    reconstruction = projection(t2, rho) * (w @ w) / (w @ q) * q
    error = reconstruction - w
    assert float(error @ error / (w @ w)) == pytest.approx(relative_error(t2, rho), rel=1e-9)

    alpha, beta = 0.3, 2.0
    along = float(error @ w / (w @ w))
    across = error - along * w
    charged = alpha * float(across @ across / (w @ w)) + beta * along**2
    assert charged == pytest.approx(predicted_kl(Coefficients(alpha, beta), t2, rho), rel=1e-9)


@given(st.lists(st.tuples(ANY, ANY, DISTORTION, SHARE, SHARE), min_size=1))
def test_many_losses_are_those_of_one_at_a_time(rows: list[tuple[float, float, float, float, float]]) -> None:
    found = predicted_kls(*np.array(rows).T)
    expected = [predicted_kl(Coefficients(a, b), t2, rho, along) for a, b, t2, rho, along in rows]
    assert found.tolist() == expected, "to the bit"
