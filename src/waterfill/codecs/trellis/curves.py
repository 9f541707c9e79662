"""How the trellis code does on a Gaussian source: step and distortion by rate, for each number of states.

`curves.json` holds measured points, made by `python -m waterfill.codecs.trellis.measure_curves`. Above the last of them
a bit halves the step and quarters the distortion.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

FILE = Path(__file__).with_name("curves.json")
STATES = (1, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, eq=False)
class Curve:
    """Rates in bits per weight, without side information; steps in standard deviations per unit of level."""

    rates: npt.NDArray[np.float64]
    log2_steps: npt.NDArray[np.float64]
    log2_t2: npt.NDArray[np.float64]

    def step(self, rate: float) -> float:
        """Distance of neighbouring levels 4j + 1 and 4j + 2, in standard deviations."""
        return float(2.0 ** self._at(rate, self.log2_steps, -1.0))

    def t2(self, rate: float) -> float:
        """||W' - W||^2 / ||W||^2 with the MSE scale."""
        return min(float(2.0 ** self._at(rate, self.log2_t2, -2.0)), 1.0)

    def _at(self, rate: float, values: npt.NDArray[np.float64], slope: float) -> float:
        beyond = max(0.0, rate - float(self.rates[-1]))
        return float(np.interp(rate, self.rates, values)) + slope * beyond


@cache
def curve(states: int) -> Curve:
    """The curve of the code with so many states."""
    points = json.loads(FILE.read_text())[str(states)]
    rates, steps, t2 = np.array([[0.0, points[0][1], 1.0], *points]).T  # no bits, no information
    return Curve(rates, np.log2(steps), np.log2(t2))
