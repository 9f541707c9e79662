"""What other sizes would cost: plans over a range of bits, predicted, nothing packed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

from waterfill.base.errors import BudgetError
from waterfill.base.progress import Progress, stage
from waterfill.base.records import Record
from waterfill.planning.budget import Budget
from waterfill.planning.inventory import Inventory
from waterfill.planning.planner import Request, make_plan
from waterfill.planning.sensitivity import Sensitivity

CURVE_BITS = (
    1.5,
    1.75,
    2.0,
    2.25,
    2.5,
    2.75,
    3.0,
    3.25,
    3.5,
    3.75,
    4.0,
    4.25,
    4.5,
    5.0,
    5.5,
    6.0,
    6.5,
    7.0,
    7.5,
    8.0,
    8.25,
    8.5,
)


@dataclass(frozen=True)
class CurvePoint(Record):
    """One plan: its exact size, and the loss that it promises."""

    size_bytes: int  # all weight files of the artifact
    bits: float  # stored bits per weight of the matrices
    kl: float  # predicted, nats per token
    kl_low: float
    kl_high: float | None  # None beyond the range where predictions hold


def predicted_curve(
    tensors: Inventory,
    sensitivity: Sensitivity,
    request: Request,
    bits: Iterable[float] = CURVE_BITS,
    *,
    progress: Progress | None = None,
) -> tuple[CurvePoint, ...]:
    """Plans at these bits per weight, by size; those that no plan can meet are left out, and so are repetitions."""
    points: dict[int, CurvePoint] = {}
    wanted = sorted(bits)
    with stage(progress, "planning other sizes", len(wanted)) as advance:
        for rate in wanted:
            with suppress(BudgetError):
                plan = make_plan("", tensors, sensitivity, Budget(bits=rate), request)
                predicted = plan.predicted
                if predicted.kl > 0:  # a plan that keeps everything has no place on a logarithmic axis
                    points[plan.size_bytes] = CurvePoint(
                        plan.size_bytes, plan.bits, predicted.kl, predicted.kl_low, predicted.kl_high
                    )
            advance()
    return tuple(points[size] for size in sorted(points))


def between(curve: tuple[CurvePoint, ...], size_bytes: float) -> float | None:
    """The curve's predicted KL at a size, log-linear between its points; None outside of them."""
    for left, right in pairwise(curve):
        if left.size_bytes <= size_bytes <= right.size_bytes:
            share = (size_bytes - left.size_bytes) / (right.size_bytes - left.size_bytes)
            return math.exp((1 - share) * math.log(left.kl) + share * math.log(right.kl))
    return None
