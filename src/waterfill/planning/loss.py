"""The loss model: two coefficients per tensor, and the gain that they call for.

A quantiser of relative error t2 maps a rotated block w to q with cos^2(w, q) = 1 - t2. Scaled so that the projection of
the reconstruction on w is u, the error splits into a part along w, (u - 1) w, and a part orthogonal to it of relative
power u^2 tau, tau = t2 / (1 - t2). With alpha the cost of noise orthogonal to w and beta = 1/2 w'Fw that of scaling:

    KL  =  alpha u^2 tau  +  beta (1 - u)^2                 nats per token

    MSE scale         u = 1 - t2      alpha t2 (1 - t2) + beta t2^2   (the beta term bends the linearity theorem)
    unbiased scale    u = 1           alpha tau
    between them      u = 1 / (1 + rho tau)

rho = 0 is the unbiased scale and rho = 1 the MSE scale, so `rho` is the one number that a codec needs; the codec
applies it block by block, with each block's own measured tau. The gain costs no byte: it goes into the stored scale.

The formula alone is least at rho = alpha / beta. What that would gain where alpha is the smaller is not there when
measured: shrinking a weight saves noise only if nothing downstream normalises, and transformers normalise everywhere
(docs/design.md §5). So rho is chosen as the square of that ratio, which leans towards unbiased unless alpha is as large
as beta, and is the MSE scale where it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from waterfill.base.typed import Count, Magnitude, Range

Floats = npt.NDArray[np.float64]
Gain = Literal["auto", "mse", "unbiased"]
Number = TypeVar("Number", float, Floats)
GAINS: tuple[Gain, ...] = ("auto", "mse", "unbiased")
Cost = Annotated[float, Range(-0.01, 1e12)]
"""What disturbing a tensor costs, nats per token; an estimate of nothing may come out just below zero."""


@dataclass(frozen=True)
class Coefficients:
    """Cost of disturbing one tensor, KL in nats per token, with standard errors."""

    alpha: Cost  # per unit of relative power of noise orthogonal to the weights
    beta: Cost  # per squared relative change of scale
    alpha_stderr: Magnitude = 0.0
    beta_stderr: Magnitude = 0.0
    tokens: Count | None = None  # of the probe that the tensor was multiplied with; None where they were not counted


def gain_rho(gain: Gain, coefficients: Coefficients) -> float:
    """The `rho` that a gain policy means for a tensor. Without a usable beta the MSE scale is the safe choice."""
    if gain == "unbiased":
        return 0.0
    if gain == "mse" or coefficients.beta <= 0:
        return 1.0
    return min(max(coefficients.alpha, 0.0) / coefficients.beta, 1.0) ** 2


def projection(t2: Number, rho: Number) -> Number:
    """u, the projection of the reconstruction on the original, of a codec with distortion `t2` and gain `rho`."""
    return (1 - t2) / (1 - t2 + rho * t2)


def predicted_kl(coefficients: Coefficients, t2: float, rho: float, along: float = 0.0) -> float:
    """Both terms, KL in nats per token. Negative estimates are noise about zero, and count as zero.

    `along` is the share of the noise that lies along the weights, and is a random error of scale: 0 where a codec's
    gain is exact in every group, 1/n where it is that of many groups of n weights.
    """
    u = projection(t2, rho)
    noise = u * u * t2 / (1 - t2)
    return max(coefficients.alpha, 0.0) * noise + max(coefficients.beta, 0.0) * ((1 - u) ** 2 + along * noise)


def predicted_kls(alpha: Floats, beta: Floats, t2: Floats, rho: Floats, along: Floats) -> Floats:
    """`predicted_kl` of arrays that broadcast, equal to it in every bit: float64, nats per token."""
    u = projection(t2, rho)
    noise = u * u * t2 / (1 - t2)
    scale = np.float_power(1 - u, 2)  # the C library's, as of single numbers; a product may differ in the last bit
    return np.maximum(alpha, 0.0) * noise + np.maximum(beta, 0.0) * (scale + along * noise)


def relative_error(t2: float, rho: float) -> float:
    """||W' - W||^2 / ||W||^2 with gain `rho`, for a codec whose MSE-scaled distortion is `t2`."""
    u = projection(t2, rho)
    return (1 - u) ** 2 + u * u * t2 / (1 - t2)
