"""One pass of each sensitivity estimator: a model and a few sequences in, raw alpha and beta per tensor out.

`waterfill.sensitivity` explains what is estimated and averages the passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from waterfill.base.errors import WaterfillError
from waterfill.codecs.groups import group_sizes, group_sums, per_weight
from waterfill.files.architecture import Matrix, parameters_of
from waterfill.files.blockwise import CHUNK_WEIGHTS
from waterfill.files.model_calls import read
from waterfill.planning.costs import Costs, matrix_view
from waterfill.planning.products import Products, gradients, watched

PERTURB_LEVELS = (0.005, 0.01, 0.02, 0.04)  # relative noise power; the published fits stay below 0.09
SCALE_STEP = 0.05  # relative change of scale by which `perturb_pass` measures beta, both ways
KEPT_BYTES = 5 << 26  # of what a pass computes that are kept for the way back; more is computed again


@dataclass(frozen=True)
class ProbePass:
    """One pass: raw estimates per tensor, and how many tokens came by it."""

    alpha: dict[str, float]
    beta: dict[str, float]
    tokens: dict[str, int]
    nll: float


def fisher_pass(
    model: Any, matrices: Sequence[Matrix], part: torch.Tensor, generator: torch.Generator, *, lead: int = 0
) -> ProbePass:
    """Gradients of one sampled labelling of `part`, int64 `[sequences, length]`, behind its first `lead` tokens."""
    positions = part.shape[0] * (part.shape[1] - 1 - lead)
    costs = Costs(matrices, int(torch.randint(1 << 62, (1,), generator=generator)))
    products = Products(matrices, costs)
    wanted = {matrix.parameter for matrix in matrices}
    with gradients(model, wanted, costs, kept_bytes=KEPT_BYTES), watched(model, products):
        with products:
            logits = read(model, part)
        slope, nll = sampled_score(logits.detach(), part, generator, lead)
        with products.returning():
            logits.backward(slope)
        del logits, slope
    # No gradient comes to what no token came by.
    alpha = {name: 0.5 * across / positions for name, across in costs.across.items()}
    beta = {name: 0.5 * along**2 / positions for name, along in costs.along.items()}
    return ProbePass(alpha, beta, products.tokens(beta, positions), nll)


def sampled_score(
    logits: torch.Tensor, part: torch.Tensor, generator: torch.Generator | None, lead: int = 0
) -> tuple[torch.Tensor, float]:
    """Gradient, by the logits `[sequences, tokens, vocabulary]`, of the summed log-probability of labels drawn from
    their own predictions, or of the tokens themselves without a generator: one-hot less probability, 0 at the first
    `lead` tokens, which are context, and at the last one, which predicts nothing here. And the mean negative
    log-probability of the tokens themselves."""
    predicting, following = logits[:, lead:-1], part[:, lead + 1 :]
    slope = torch.zeros(logits.shape)
    rows = slope[:, lead:-1]
    rows.copy_(predicting.to(torch.float32).softmax(-1))
    probabilities = rows.flatten(0, 1)
    check_probabilities(probabilities)
    of_tokens = rows.gather(2, following[..., None]).clamp_min(torch.finfo(torch.float32).tiny)
    nll = -float(of_tokens.log().mean())
    drawn = following if generator is None else _drawn(probabilities, generator)
    labels = drawn.view(*following.shape, 1)
    rows.neg_().scatter_add_(2, labels, torch.ones_like(labels, dtype=slope.dtype))
    return slope.to(logits.dtype), nll


def _drawn(probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A label for each row `[positions, vocabulary]`, int64 `[positions, 1]`: where a uniform number falls among their
    sums, which costs a fifth of `multinomial`'s exponential numbers for every entry."""
    labels = []
    for rows in probabilities.split(max(1, CHUNK_WEIGHTS // probabilities.shape[1])):
        sums = rows.cumsum(1)
        draws = torch.rand(len(rows), 1, generator=generator) * sums[:, -1:]
        labels.append(torch.searchsorted(sums, draws, right=True).clamp_max(rows.shape[1] - 1))
    return torch.cat(labels)


def check_probabilities(p: torch.Tensor) -> None:
    """Refuse probabilities, or their logarithms, that NaN or infinite logits have made.

    Raises:
        WaterfillError: some are NaN.
    """
    if bool(p.sum().isnan()):  # the sum needs no temporary
        raise WaterfillError(
            "the model gives NaN or infinite logits on the probe, which say nothing about its sensitivities; "
            "check its weights, and measure it in float32 or bfloat16 rather than float16"
        )


@torch.inference_mode()
def perturb_pass(
    model: Any, matrices: Sequence[Matrix], part: torch.Tensor, generator: torch.Generator, *, lead: int = 0
) -> ProbePass:
    """KL on `part`, int64 `[sequences, length]`, behind its first `lead` tokens, as one matrix after the other is
    disturbed."""
    parameters = parameters_of(model)
    products = Products(matrices)
    with watched(model, products), products:
        reference = _log_probabilities(model, part, lead)
    alpha: dict[str, float] = {}
    beta: dict[str, float] = {}
    for matrix in matrices:
        weight = matrix_view(parameters[matrix.parameter], matrix)
        alpha[matrix.name], beta[matrix.name] = _perturb(model, part, lead, reference, weight, generator)
    nll = -float(reference.gather(1, part[:, lead + 1 :].reshape(-1, 1)).mean())
    return ProbePass(alpha, beta, products.tokens(beta, len(reference)), nll)


def _perturb(
    model: Any,
    part: torch.Tensor,
    lead: int,
    reference: torch.Tensor,
    weight: torch.Tensor,
    generator: torch.Generator,
) -> tuple[float, float]:
    """alpha and beta of one matrix; `weight`, a view into the model, is disturbed in place and put back."""
    original = weight.clone()
    sigma = per_weight(group_power(original.to(torch.float32)).sqrt(), original.shape[1])

    def rise(disturbed: torch.Tensor) -> float:
        weight.copy_(disturbed)
        return _kl(reference, _log_probabilities(model, part, lead))

    def noise(level: float) -> torch.Tensor:
        drawn = torch.randn(original.shape, generator=generator)
        return orthogonal(drawn, original.to(torch.float32)) * sigma * math.sqrt(level)

    try:
        noisy = [rise(original + noise(level)) for level in PERTURB_LEVELS]
        scaled = [rise(original * (1 + step)) for step in (SCALE_STEP, -SCALE_STEP)]
    finally:
        weight.copy_(original)
    slope = sum(t * r for t, r in zip(PERTURB_LEVELS, noisy, strict=True)) / sum(t * t for t in PERTURB_LEVELS)
    return slope, sum(scaled) / 2 / SCALE_STEP**2


def _log_probabilities(model: Any, part: torch.Tensor, lead: int) -> torch.Tensor:
    logits = read(model, part)[:, lead:-1].flatten(0, 1)
    return torch.as_tensor(logits.to(torch.float32).log_softmax(-1))


def _kl(reference: torch.Tensor, other: torch.Tensor) -> float:
    return float((reference.exp() * (reference - other)).sum(-1).double().mean())


def orthogonal(noise: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Take from unit noise, group by group, its part along the weights, and give the rest the power of the whole."""
    along = group_sums(noise * weight) / group_sums(weight.square()).clamp_min(torch.finfo(weight.dtype).tiny)
    sizes = group_sizes(weight.shape[1], weight.dtype)
    rest = noise - per_weight(along, weight.shape[1]) * weight
    return rest * per_weight((sizes / (sizes - 1).clamp_min(1)).sqrt().expand_as(along), weight.shape[1])


def group_power(weight: torch.Tensor) -> torch.Tensor:
    """mean(w^2) of each group, `[rows, in]` -> `[rows, groups]`; the rotation leaves it unchanged."""
    return group_sums(weight.square()) / group_sizes(weight.shape[1], weight.dtype)
