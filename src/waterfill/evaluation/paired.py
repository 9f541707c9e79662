"""Two models against one reference, on the same windows: by how much one loses more.

What makes a window hard for one makes it hard for the other. So the differences between the two, window by window,
scatter less than either does, and tell models apart whose own intervals overlap.
"""

from __future__ import annotations

from dataclasses import dataclass

from waterfill.base.records import Record
from waterfill.evaluation.divergences import Scored
from waterfill.evaluation.scoring import ENOUGH_WINDOWS, standard_error
from waterfill.planning.spread import t_quantile


@dataclass(frozen=True)
class Paired(Record):
    """A model beside another one. Differences are the first less the second, nats per token; intervals are of 95 %."""

    size_bytes: int  # of the other's weight files
    kl: float  # of the other
    ppl: float  # of the other
    kl_difference: float
    kl_difference_stderr: float  # as of `Divergence`: windows are independent from 8 on, below that tokens
    kl_difference_low: float
    kl_difference_high: float
    nll_difference: float  # ln(ppl / ppl of the other)
    nll_difference_stderr: float
    nll_difference_low: float
    nll_difference_high: float


def paired(one: Scored, other: Scored, size_bytes: int) -> Paired:
    """By what was measured of both, on the same windows."""
    pairs = list(zip(one.windows, other.windows, strict=True))
    freedom = len(pairs) - 1 if len(pairs) >= ENOUGH_WINDOWS else sum(len(mine.kl) for mine, _ in pairs) - 1
    reach = t_quantile(max(freedom, 1))
    beside = other.divergence
    figures: dict[str, float] = {}
    for name in ("kl", "nll"):
        differences = [getattr(mine, name) - getattr(its, name) for mine, its in pairs]
        total = sum(float(each.sum()) for each in differences)
        mean, stderr = total / sum(map(len, differences)), standard_error(differences)
        figures |= {
            f"{name}_difference": mean,
            f"{name}_difference_stderr": stderr,
            f"{name}_difference_low": mean - reach * stderr,
            f"{name}_difference_high": mean + reach * stderr,
        }
    return Paired(size_bytes=size_bytes, kl=beside.kl, ppl=beside.ppl, **figures)
