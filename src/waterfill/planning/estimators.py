"""One pass of each sensitivity estimator: a model and a few sequences in, raw alpha and beta per tensor out.

`waterfill.sensitivity` explains what is estimated and averages the passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from waterfill.base.errors import WaterfillError
from waterfill.codecs.groups import group_sizes, group_sums, per_weight
from waterfill.files.architecture import Matrix, parameters_of
from waterfill.files.blockwise import CHUNK_WEIGHTS, Watcher
from waterfill.files.model_calls import read

PERTURB_LEVELS = (0.005, 0.01, 0.02, 0.04)  # relative noise power; the published fits stay below 0.09
SCALE_STEP = 0.05  # relative change of scale by which `perturb_pass` measures beta, both ways
# Functions that multiply with a weight, or look its rows up, and where their two operands are.
_PRODUCTS = {"linear": (0, 1), "embedding": (0, 1), "matmul": (0, 1), "mm": (0, 1), "addmm": (1, 2)}


@dataclass(frozen=True)
class ProbePass:
    """One pass: raw estimates per tensor, and how many tokens came by it."""

    alpha: dict[str, float]
    beta: dict[str, float]
    tokens: dict[str, int]
    nll: float


def fisher_pass(model: Any, matrices: Sequence[Matrix], part: torch.Tensor, generator: torch.Generator) -> ProbePass:
    """Gradients of one sampled labelling of `part`, int64 `[sequences, length]`."""
    positions = part.shape[0] * (part.shape[1] - 1)
    costs = _Costs(matrices)
    with _gradients(model, {matrix.parameter for matrix in matrices}, costs.add):
        with _arrivals(model, matrices) as arrivals:
            logits = read(model, part)
        slope, nll = _sampled_score(logits.detach(), part, generator)
        logits.backward(slope)
        del logits, slope
    # No gradient comes to what no token came by.
    alpha = {name: 0.5 * across / positions for name, across in costs.across.items()}
    beta = {name: 0.5 * along**2 / positions for name, along in costs.along.items()}
    return ProbePass(alpha, beta, arrivals.tokens(beta, positions), nll)


def _sampled_score(logits: torch.Tensor, part: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, float]:
    """Gradient, by the logits `[sequences, tokens, vocabulary]`, of the summed log-probability of labels drawn from
    their own predictions: one-hot less probability, 0 at the last token, which predicts nothing here. And the mean
    negative log-probability of the tokens themselves."""
    following = part[:, 1:].flatten()
    slope = logits.to(torch.float32).softmax(-1)
    predictions = slope[:, :-1].flatten(0, 1)
    check_probabilities(predictions)
    of_tokens = logits[:, :-1].flatten(0, 1).gather(1, following[:, None])[:, 0].to(torch.float32)
    nll = float((logits[:, :-1].to(torch.float32).logsumexp(-1).flatten() - of_tokens).mean())
    labels = _drawn(predictions, generator).view(*part[:, 1:].shape, 1)
    slope.neg_()[:, :-1].scatter_add_(2, labels, torch.ones_like(labels, dtype=slope.dtype))
    slope[:, -1] = 0
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


class _Costs:
    """Sums over the groups of every matrix, from gradients of whole parameters or of some of their rows."""

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        self.across = {matrix.name: 0.0 for matrix in matrices}  # of (gradient . noise)^2
        self.along = {matrix.name: 0.0 for matrix in matrices}  # of gradient . weight
        self._by_parameter: dict[str, list[Matrix]] = {}
        for matrix in matrices:
            self._by_parameter.setdefault(matrix.parameter, []).append(matrix)

    def add(self, name: str, weight: torch.Tensor, gradient: torch.Tensor, sign: int) -> None:
        """A parameter's, by its state-dict name; `sign` -1 takes back what was added."""
        for matrix in self._by_parameter.get(name, ()):
            views = matrix_view(weight, matrix), matrix_view(gradient, matrix)
            for w, g in zip(*(view.split(max(1, CHUNK_WEIGHTS // view.shape[1])) for view in views), strict=True):
                w, g = w.to(torch.float32), g.to(torch.float32)
                self.across[matrix.name] += sign * float(_noise_cost(w, g))
                self.along[matrix.name] += sign * float((g * w).sum(1).double().sum())


@contextmanager
def _gradients(
    model: Any, wanted: Set[str], consume: Callable[[str, torch.Tensor, torch.Tensor, int], None]
) -> Iterator[None]:
    """Hand out gradients as `Blockwise.gradients` does; of a model in memory, whose parameters must require them."""
    if (blockwise := getattr(model, "blockwise", None)) is not None:
        with blockwise.gradients(wanted, consume):
            yield
        return

    def arrived(name: str, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        consume(name, parameter.detach(), parameter.grad, 1)
        parameter.grad = None  # one tensor's at a time

    parameters = parameters_of(model)
    handles = [
        parameters[name].register_post_accumulate_grad_hook(partial(arrived, name))
        for name in wanted
        if parameters[name].requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _arrivals(model: Any, matrices: Sequence[Matrix]) -> Iterator[_Arrivals]:
    """Count who comes by which matrix inside of the block."""
    arrivals = _Arrivals(matrices)
    if (blockwise := getattr(model, "blockwise", None)) is not None:
        with blockwise.watched(arrivals), arrivals:
            yield arrivals
        return
    parameters = parameters_of(model)
    for name in {matrix.parameter for matrix in matrices}:
        arrivals.read(name, parameters[name])
    with arrivals:
        yield arrivals


class _Arrivals(TorchFunctionMode, Watcher):
    """Counts the tokens that every matrix is multiplied with inside the block, whatever module's code does it."""

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        super().__init__()
        self._by_parameter: dict[str, list[Matrix]] = {}
        for matrix in matrices:
            self._by_parameter.setdefault(matrix.parameter, []).append(matrix)
        self._matrices: dict[int, Matrix] = {}
        self._rows = {matrix.name: 0 for matrix in matrices}

    def read(self, name: str, weight: torch.Tensor) -> None:
        # Experts are views into one parameter, told apart by where they begin.
        self._matrices |= {_stored(weight, m).data_ptr(): m for m in self._by_parameter.get(name, ())}

    def forgotten(self, name: str, weight: torch.Tensor) -> None:
        for matrix in self._by_parameter.get(name, ()):
            self._matrices.pop(_stored(weight, matrix).data_ptr(), None)

    def multiplied(self, name: str, tokens: int) -> None:
        for matrix in self._by_parameter.get(name, ()):
            self._rows[matrix.name] += tokens

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        places = _PRODUCTS.get(getattr(function, "__name__", ""))
        if places is not None and len(args) > places[1]:
            self._count(*(args[place] for place in places))
        return function(*args, **(kwargs or {}))

    def _count(self, a: Any, b: Any) -> None:
        for weight, tokens in ((a, b), (b, a)):
            if isinstance(weight, torch.Tensor) and isinstance(tokens, torch.Tensor):
                matrix = self._matrices.get(weight.data_ptr())
                if matrix is not None:
                    width = matrix.shape[1] if tokens.is_floating_point() else 1
                    self._rows[matrix.name] += tokens.numel() // width

    def tokens(self, measured: Mapping[str, float], positions: int) -> dict[str, int]:
        """By matrix. What was multiplied in a way that is not counted, but has an effect, counts as met by all."""
        return {name: rows or (positions if measured[name] else 0) for name, rows in self._rows.items()}


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
def perturb_pass(model: Any, matrices: Sequence[Matrix], part: torch.Tensor, generator: torch.Generator) -> ProbePass:
    """KL on `part`, int64 `[sequences, length]`, as one matrix after the other is disturbed."""
    parameters = parameters_of(model)
    with _arrivals(model, matrices) as arrivals:
        reference = _log_probabilities(model, part)
    alpha: dict[str, float] = {}
    beta: dict[str, float] = {}
    for matrix in matrices:
        weight = matrix_view(parameters[matrix.parameter], matrix)
        alpha[matrix.name], beta[matrix.name] = _perturb(model, part, reference, weight, generator)
    nll = -float(reference.gather(1, part[:, 1:].reshape(-1, 1)).mean())
    return ProbePass(alpha, beta, arrivals.tokens(beta, len(reference)), nll)


def _perturb(
    model: Any, part: torch.Tensor, reference: torch.Tensor, weight: torch.Tensor, generator: torch.Generator
) -> tuple[float, float]:
    """alpha and beta of one matrix; `weight`, a view into the model, is disturbed in place and put back."""
    original = weight.clone()
    sigma = per_weight(group_power(original.to(torch.float32)).sqrt(), original.shape[1])

    def rise(disturbed: torch.Tensor) -> float:
        weight.copy_(disturbed)
        return _kl(reference, _log_probabilities(model, part))

    def noise(level: float) -> torch.Tensor:
        drawn = torch.randn(original.shape, generator=generator)
        return _orthogonal(drawn, original.to(torch.float32)) * sigma * math.sqrt(level)

    try:
        noisy = [rise(original + noise(level)) for level in PERTURB_LEVELS]
        scaled = [rise(original * (1 + step)) for step in (SCALE_STEP, -SCALE_STEP)]
    finally:
        weight.copy_(original)
    slope = sum(t * r for t, r in zip(PERTURB_LEVELS, noisy, strict=True)) / sum(t * t for t in PERTURB_LEVELS)
    return slope, sum(scaled) / 2 / SCALE_STEP**2


def _log_probabilities(model: Any, part: torch.Tensor) -> torch.Tensor:
    logits = read(model, part)[:, :-1].flatten(0, 1)
    return torch.as_tensor(logits.to(torch.float32).log_softmax(-1))


def _kl(reference: torch.Tensor, other: torch.Tensor) -> float:
    return float((reference.exp() * (reference - other)).sum(-1).double().mean())


def matrix_view(parameter: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """A view `[out, in]` of the matrix inside its module parameter."""
    part = _stored(parameter, matrix)
    return part.T if matrix.transposed else part


def _stored(parameter: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """The same as the parameter holds it."""
    return parameter if matrix.expert is None else parameter[matrix.expert]


def _noise_cost(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """E (gradient . noise)^2 for noise as `_orthogonal` makes it, of each group's own power; summed over the groups."""
    power, slope = group_sums(weight.square()), group_sums(gradient * weight)
    across = power * group_sums(gradient.square()) - slope.square()
    return (across.clamp_min(0) / (group_sizes(weight.shape[1], weight.dtype) - 1).clamp_min(1)).double().sum()


def _orthogonal(noise: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Take from unit noise, group by group, its part along the weights, and give the rest the power of the whole."""
    along = group_sums(noise * weight) / group_sums(weight.square()).clamp_min(torch.finfo(weight.dtype).tiny)
    sizes = group_sizes(weight.shape[1], weight.dtype)
    rest = noise - per_weight(along, weight.shape[1]) * weight
    return rest * per_weight((sizes / (sizes - 1).clamp_min(1)).sqrt().expand_as(along), weight.shape[1])


def group_power(weight: torch.Tensor) -> torch.Tensor:
    """mean(w^2) of each group, `[rows, in]` -> `[rows, groups]`; the rotation leaves it unchanged."""
    return group_sums(weight.square()) / group_sizes(weight.shape[1], weight.dtype)
