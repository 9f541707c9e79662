"""Measure `curves.json`: python -m waterfill.codecs.trellis.measure_curves  (some minutes, needs the native library).

A point is a distortion t2 and the step with which the code, aimed at targets shortened by 1 - t2, has exactly that
distortion: the two conditions of the optimum (docs/design.md §4). The rate is that of real 12-bit tables.
"""

from __future__ import annotations

import json

import numpy as np
import numpy.typing as npt

from waterfill.base.writing import write_file
from waterfill.codecs.entropy import MOST_LANES, code_length_bits, from_counts
from waterfill.codecs.trellis.bitstream import MOST_LEVEL_SYMBOLS, centroids
from waterfill.codecs.trellis.code import indices, search
from waterfill.codecs.trellis.curves import FILE, STATES

SAMPLES = 1 << 20
LEAST, MOST = -512, 511
Floats = npt.NDArray[np.float32]


def main() -> None:
    """Write the file."""
    rng = np.random.default_rng(20261122)
    x = rng.standard_normal(SAMPLES).astype(np.float32)
    x /= np.sqrt(np.mean(x.astype(np.float64) ** 2)).astype(np.float32)
    curves: dict[str, list[list[float]]] = {}
    for states in STATES:
        sample = x if states < 128 else x[: SAMPLES // 4]
        t2s = 2.0 ** (-2.0 * np.concatenate([np.arange(0.1, 1, 0.075), np.arange(1, 4.8, 0.2)]))
        curves[str(states)] = [point(sample, states, float(t2)) for t2 in t2s]
        print(states, curves[str(states)][-1])
    write_file(FILE, json.dumps(curves, indent=0).replace(",\n", ", ").replace("], [", "],\n[") + "\n")


def point(x: Floats, states: int, t2: float) -> list[float]:
    """[rate, step, t2]: the step is found by bisection, since distortion grows with it."""
    low, high = 0.5 * np.log2(t2) - (2.5 if t2 > 0.25 else 0.6), 0.5 * np.log2(t2) + 1.2  # at high rates step^2 = t2
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (low, middle) if measure(x, states, t2, 2**middle)[1] > t2 else (middle, high)
    rate, reached = measure(x, states, t2, 2**low)
    return [round(rate, 5), round(2**low, 6), float(f"{reached:.6g}")]


def measure(x: Floats, states: int, t2: float, step: float) -> tuple[float, float]:
    """(bits per sample, distortion)."""
    nearest = search(x * np.float32((1 - t2) / step), states, MOST_LANES, LEAST, MOST)
    j = indices(nearest, states)
    counts = np.bincount(j - j.min()).astype(np.int64)
    if len(counts) > 256:
        raise ValueError(f"step {step} needs {len(counts)} symbols")
    rate = code_length_bits(counts, from_counts(counts)) / len(x)
    levels = nearest.astype(np.float64)
    if len(counts) <= MOST_LEVEL_SYMBOLS:
        mean, sign = centroids(x, nearest, j - j.min(), len(counts), states)
        levels = sign * mean[j - j.min()]
    inner, power = float(x @ levels), float(levels @ levels)
    return rate, 1 - inner**2 / (power * float(x.astype(np.float64) @ x)) if power else 1.0


if __name__ == "__main__":
    main()
