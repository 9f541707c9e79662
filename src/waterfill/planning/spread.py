"""How well a mean is known by the spread of what it is of: values of sequences, which are independent.

    half width = t(.975, n - 1) · standard deviation / √n

Single ones are out of all proportion. Where a disturbance makes another token the one that attention falls back on, a
text loses ten times as much as others, or a hundred, and the slope of its loss may be thousands of times theirs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, median, stdev

MOST, LEAST = 4.0, 4  # times the median that one value counts as, of so many or more
_Z = NormalDist().inv_cdf(0.975)


def half_width(values: Sequence[float]) -> float:
    """Of the 95 % interval of their mean; infinite for less than two."""
    if len(values) < 2:
        return math.inf
    return t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))


def t_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t: exact for 1 and 2 degrees of freedom, else the expansion about the normal one
    (Abramowitz & Stegun 26.7.5), which is within a sixth of a percent."""
    if freedom == 1:
        return math.tan(math.pi * 0.475)
    if freedom == 2:
        return 0.95 * math.sqrt(2 / (4 * 0.975 * 0.025))
    z, v = _Z, freedom
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    )


def capped(values: Sequence[float]) -> tuple[float, ...]:
    """What is out of all proportion counts as `MOST` times the median."""
    limit = MOST * median(values) if len(values) >= LEAST else math.inf
    return tuple(min(value, limit) for value in values)
