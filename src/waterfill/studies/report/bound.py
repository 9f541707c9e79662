"""How far a packed model is from what information theory allows.

A Gaussian weight that is known with relative noise power D costs at least ½ log2(1/D) bits: Shannon's bound, for any
coder of any complexity. `ideal_bits` is that price for one matrix; `least_loss` pours a whole budget at that price.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from waterfill.codecs import get_codec
from waterfill.planning.loss import relative_error
from waterfill.planning.plan import TensorPlan


def mse_distortion(relative_error: float, rho: float) -> float:
    """D of the codes themselves: what the relative noise power would be with the least-squares scale.

    Inverts `relative_error` of planning.loss: a gain other than the least-squares one adds noise that costs no bits.
    """
    e = relative_error
    a, b = rho * rho * (1 - e), 1 - 2 * e * rho  # a tau² + b tau = e
    tau = 2 * e / (b + math.sqrt(b * b + 4 * a * e))
    return tau / (1 + tau)


def coded_t2(tensor: TensorPlan, measured_t2: float) -> float:
    """Relative noise power of the codes themselves. Error feedback makes more noise of theirs, which costs no bits, and
    is all that can be measured then: the codec's own figure stands for it."""
    if tensor.feedback is None:
        return measured_t2
    return relative_error(get_codec(tensor.codec).distortion(tensor.shape), tensor.rho)


def ideal_bits(distortion: float) -> float:
    """Least bits per weight at which a Gaussian source can be known with noise power `distortion`, 0 < D <= 1."""
    return max(0.0, 0.5 * math.log2(1 / distortion))


def ideal_bytes(tensors: Sequence[TensorPlan], measured_t2: dict[str, float]) -> float:
    """Bytes that the matrices would take if each were coded at Shannon's bound for the noise that it has."""
    total = 0.0
    for tensor in tensors:
        error = coded_t2(tensor, measured_t2.get(tensor.name, 0.0))
        if not tensor.packed or error <= 0:
            total += tensor.size_bytes  # as it is: nothing lost, nothing to gain
        else:
            total += tensor.weights * ideal_bits(mse_distortion(error, tensor.rho)) / 8
    return total


def least_loss(tensors: Sequence[TensorPlan], payload_bytes: float) -> float:
    """Least loss, nats per token, of matrices coded at Shannon's bound within `payload_bytes`: reverse water-filling.

    Minimises the sum of alpha D over D with sum of weights ½ log2(1/D) bits: D = min(1, level · weights / alpha).
    """
    bits = 8 * payload_bytes
    costs = [(max(tensor.alpha, 0.0), tensor.weights) for tensor in tensors]
    costs = [(alpha, weights) for alpha, weights in costs if alpha > 0]
    if not costs:
        return 0.0

    def noise(log_level: float) -> list[float]:
        return [min(1.0, math.exp(log_level + math.log(weights / alpha))) for alpha, weights in costs]

    low, high = -200.0, 200.0  # of the level's logarithm
    for _ in range(200):
        middle = (low + high) / 2
        used = sum(weights * ideal_bits(d) for d, (_, weights) in zip(noise(middle), costs, strict=True))
        low, high = (middle, high) if used > bits else (low, middle)
    return math.fsum(alpha * d for d, (alpha, _) in zip(noise(high), costs, strict=True))
