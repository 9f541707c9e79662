"""What a disturbance of each tensor costs the model: alpha and beta, in nats per token (see `waterfill.planning.loss`).

Both estimators measure the same thing, KL(model || disturbed model) per unit of relative noise power, for noise as
rotated quantisation makes it: in each group (one row, one Hadamard group) proportional to the group's power, orthogonal
to its weights (what lies along them is the gain's, beta's), and isotropic otherwise.

`fisher` (default). KL(w || w + d) ~ 1/2 d'Fd. With labels sampled from the model's own predictions the score has mean
zero and is independent across positions, so the squared gradient of a summed log-probability estimates the summed
diagonal of F without bias, and <g, w>^2 the summed w'Fw. Every backward pass gives all tensors at once:

    alpha = 1/2 sum_groups (|w|^2 |g|^2 - <w, g>^2) / (d - 1) / tokens       beta = 1/2 <g, w>^2 / tokens

with w, g the weights and gradients of a group of d, but of the whole tensor in beta.

`perturb`. The HIGGS paper's (arXiv 2411.17525, §5): disturb one tensor at a time at several noise levels and fit a line
through the origin. Hundreds of times the work; it exists to check the fast one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import torch
from torch import nn

from waterfill.base import typed
from waterfill.base.errors import WaterfillError
from waterfill.base.progress import Step
from waterfill.base.typed import Count, Range
from waterfill.files.architecture import Matrix, parameters_of
from waterfill.planning.estimators import ProbePass, fisher_pass, perturb_pass
from waterfill.planning.loss import Coefficients, Cost
from waterfill.planning.spread import capped
from waterfill.planning.trials import Trial, usable

Method = Literal["fisher", "perturb"]

VERSION = 1
LEAST_TOKENS = 64  # of a pass, all of which come by the matrix
PASSES: Mapping[Method, Callable[..., ProbePass]] = MappingProxyType({"fisher": fisher_pass, "perturb": perturb_pass})
SENSITIVITY_FILE = "waterfill-sensitivity.json"


@dataclass(frozen=True)
class Samples:
    """What every pass said of one tensor."""

    alpha: tuple[Cost, ...]
    beta: tuple[Cost, ...]


@dataclass(frozen=True)
class Sensitivity:
    """Coefficients per tensor, and all that is needed to know where they came from."""

    fingerprint: str  # of the checkpoint
    method: Method
    probe: Mapping[str, str | int | float | None]  # kind, sequences, length, seed, text
    nll: Annotated[float, Range(-1, 1e12)]  # of the undisturbed model on the probe's tokens, nats per token
    tokens: Count  # predicted positions
    tensors: Mapping[str, Coefficients]
    samples: Mapping[str, Samples] | None = None  # by tensor; None where they were not kept
    trials: tuple[Trial, ...] = ()  # what was lost with noise in all matrices at once

    def to_json(self) -> str:
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1) + "\n"

    def after_feedback(self, left: Mapping[str, float]) -> Sensitivity:
        """To noise whose errors are fed back: of alpha, so much is left in each of these tensors."""
        tensors, samples = dict(self.tensors), None if self.samples is None else dict(self.samples)
        for name, share in left.items():
            c = tensors[name]
            tensors[name] = replace(c, alpha=c.alpha * share, alpha_stderr=c.alpha_stderr * share)
            if samples is not None:
                of_passes = samples[name]
                samples[name] = Samples(tuple(alpha * share for alpha in of_passes.alpha), of_passes.beta)
        return replace(self, tensors=tensors, samples=samples)

    @staticmethod
    def load(path: Path) -> Sensitivity:
        """Read a file that `to_json` wrote.

        Raises:
            WaterfillError: it is not one.
        """
        return typed.load(path, "sensitivity file", VERSION, _from_json)


def _from_json(data: dict[str, Any]) -> Sensitivity:
    stored: Sensitivity = typed.read(Sensitivity, data)
    if usable(stored.trials) != stored.trials:
        raise ValueError("a trial has less than two sequences, or no loss; leave it out")
    old = {name for name, fields in data["tensors"].items() if "tokens" not in fields}  # of before they were counted
    unreached = Coefficients(0.0, 0.0)
    tensors = {n: replace(c, tokens=0) if n in old and c == unreached else c for n, c in stored.tensors.items()}
    return replace(stored, tensors=tensors)


def measure(
    model: nn.Module,
    matrices: Sequence[Matrix],
    tokens: torch.Tensor,
    *,
    method: Method = "fisher",
    seed: int = 0,
    batch: int = 1,
    fingerprint: str = "",
    lead: int = 0,
    probe: Mapping[str, Any] | None = None,
    progress: Step | None = None,
) -> Sensitivity:
    """Estimate alpha and beta of every matrix.

    Args:
        model: a causal LM from transformers, in the names of `matrices`.
        tokens: int64 `[sequences, length]`, the probe.
        batch: sequences per pass; standard errors come from the spread between passes.
        lead: tokens at the beginning of each sequence that only give context.
        fingerprint, probe: recorded in the result.
        progress: called with (passes done, passes in all), at first with none done.

    Raises:
        WaterfillError: no matrix, too few sequences for a standard error, an unknown method, or a model whose logits
            or gradients are not finite.
    """
    if method not in PASSES:
        raise WaterfillError(f"the sensitivity method {method!r} is unknown; use {' or '.join(PASSES)}")
    if not matrices:
        raise WaterfillError("no matrix of the model is left to be measured; keep fewer tensors")
    passes = list(tokens.split(batch))
    if len(passes) < 2:
        raise WaterfillError(f"{len(tokens)} sequences in batches of {batch} make one pass; a standard error needs two")
    samples = []
    if progress:
        progress(0, len(passes))
    with trainable(model, matrices, method):
        for number, part in enumerate(passes):
            samples.append(one_pass(model, matrices, part, method=method, seed=seed, number=number, lead=lead))
            if progress:
                progress(number + 1, len(passes))
    return summary(
        samples,
        [part.shape[0] for part in passes],
        tokens.shape[0] * (tokens.shape[1] - 1 - lead),
        method=method,
        fingerprint=fingerprint,
        probe=probe,
    )


def one_pass(
    model: nn.Module,
    matrices: Sequence[Matrix],
    part: torch.Tensor,
    *,
    method: Method,
    seed: int,
    number: int,
    lead: int = 0,
) -> ProbePass:
    """What a part of a probe says, int64 `[sequences, length]`; its labels depend on the seed and its number alone.

    Raises:
        WaterfillError: logits or gradients are not finite.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**64)
    sample = PASSES[method](model, matrices, part, generator, lead=lead)
    _check_finite(sample)
    return sample


def summary(
    samples: Sequence[ProbePass],
    sequences: Sequence[int],
    positions: int,
    *,
    method: Method,
    fingerprint: str = "",
    probe: Mapping[str, Any] | None = None,
) -> Sensitivity:
    """Means and standard errors of passes, each of so many `sequences`, which predicted so many `positions` in all."""
    weights = torch.tensor(sequences, dtype=torch.float64)
    nll, _ = _mean_and_stderr([sample.nll for sample in samples], weights)
    tensors, single = {}, {}
    for name in samples[0].alpha:
        alphas, betas = (tuple(getattr(sample, what)[name] for sample in samples) for what in ("alpha", "beta"))
        reached = sum(sample.tokens[name] for sample in samples)
        # What few tokens come by is rightly next to nothing in one pass, and far above the others in the next.
        usual = reached >= max(positions, LEAST_TOKENS * len(samples))
        single[name] = Samples(capped(alphas) if usual else alphas, betas)
        alpha, alpha_stderr = _mean_and_stderr(single[name].alpha, weights)
        beta, beta_stderr = _mean_and_stderr(single[name].beta, weights)
        tensors[name] = Coefficients(alpha, beta, alpha_stderr, beta_stderr, reached)
    return Sensitivity(fingerprint, method, dict(probe or {}), nll, positions, tensors, single)


def _check_finite(sample: ProbePass) -> None:
    figures = {"the model's loss on the probe": sample.nll}
    for key, values in (("alpha", sample.alpha), ("beta", sample.beta)):
        figures |= {f"{key} of {name}": value for name, value in values.items()}
    for what, value in figures.items():
        if not math.isfinite(value):
            raise WaterfillError(
                f"{what} comes out as {value}, not as a finite number; "
                "check the model's weights, and measure it in float32 or bfloat16 rather than float16"
            )


def _mean_and_stderr(values: Sequence[float], weights: torch.Tensor) -> tuple[float, float]:
    x = torch.tensor(values, dtype=torch.float64)
    mean = (x * weights).sum() / weights.sum()
    variance = (weights * (x - mean).square()).sum() / weights.sum() / (len(values) - 1)
    return float(mean), float(variance.sqrt())


@contextmanager
def trainable(model: nn.Module, matrices: Sequence[Matrix], method: Method) -> Iterator[None]:
    """Gradients for parameters that a method asks for, and no others; evaluation mode. Flags are put back afterwards,
    gradients are dropped."""
    if getattr(model, "blockwise", None) is not None:  # it has its parameters for as long as they are used
        yield
        return
    names = {matrix.parameter for matrix in matrices} if method == "fisher" else set()
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    training = {module: module.training for module in model.modules()}
    model.eval()
    model.zero_grad()
    model.requires_grad_(False)
    for name, parameter in parameters_of(model).items():
        if name in names:
            parameter.requires_grad_()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
        for parameter, flag in required.items():
            parameter.requires_grad_(flag)
        model.zero_grad()
