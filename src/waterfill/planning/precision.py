"""How well a predicted loss is known from what each sequence of a probe says alone.

Sequences are independent, so that the spread of what each predicts for the whole model gives the error of their mean,
whatever matrices have to do with each other (`spread`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

import numpy as np

from waterfill.base.errors import WaterfillError
from waterfill.planning.inventory import PlannedMatrix
from waterfill.planning.loss import Coefficients
from waterfill.planning.menu import planned_kl
from waterfill.planning.plan import TensorPlan
from waterfill.planning.sensitivity import Sensitivity
from waterfill.planning.spread import half_width

PRECISION = 0.1  # of a predicted loss, as a share of it: where sequences are enough
LEAST = 0.001


def parse_precision(value: str | float) -> float:
    """A share of the predicted loss, from .05 or "5%".

    Raises:
        WaterfillError: it is none that can be reached.
    """
    try:
        share = float(value[:-1]) / 100 if isinstance(value, str) and value.endswith("%") else float(value)
    except ValueError:
        share = math.nan
    if not LEAST <= share < 1:
        raise WaterfillError(f"the precision {value!r} is no share of the loss from {LEAST:.1%} on; give 10% or 0.1")
    return share


def sampling_error(tensors: Sequence[TensorPlan], measured: Sensitivity) -> float:
    """Half of the 95 % interval of a plan's predicted loss, nats per token, as far as the probe's sampling goes.

    Where single sequences are not known, errors of tensors are added up, as if they were fully correlated.
    """
    if measured.samples is None:
        return 2 * math.fsum(
            _loss(t, measured.tensors[t.name].alpha_stderr, measured.tensors[t.name].beta_stderr) for t in tensors
        )
    samples = [measured.samples[tensor.name] for tensor in tensors]
    slopes = [(_loss(tensor, 1, 0), _loss(tensor, 0, 1)) for tensor in tensors]  # for a given gain it is linear in both
    alpha, beta = (np.array([getattr(s, what) for s in samples]) for what in ("alpha", "beta"))
    return half_width((np.array(slopes)[:, :1] * alpha + np.array(slopes)[:, 1:] * beta).sum(0).tolist())


def _loss(tensor: TensorPlan, alpha: float, beta: float) -> float:
    return planned_kl(tensor, Coefficients(alpha, beta), tensor.rho)


def relative_error(measured: Sensitivity, matrices: Sequence[PlannedMatrix]) -> float:
    """Half width of what an optimal allocation is predicted to lose, as a share of it.

    Such an allocation gives every weight the same loss (docs/design.md §5), so that the relative error of each alpha
    counts by its matrix's weights, whatever the budget. 0 where nothing is known of single sequences.
    """
    if not measured.samples:
        return 0.0
    sizes = {matrix.name: math.prod(matrix.shape) for matrix in matrices}
    shares = [
        [size * value / measured.tensors[name].alpha for value in measured.samples[name].alpha]
        for name, size in sizes.items()
        if measured.tensors[name].alpha > 0
    ]
    losses = [math.fsum(of_pass) for of_pass in zip(*shares, strict=True)]
    return half_width(losses) / fmean(losses) if losses else 0.0
