"""Find multipliers and polynomials: python -m waterfill.codecs.bitshift.make_codes  (minutes; the native library).

For each rate many multipliers are tried, and those that do best once more, with more samples. Polynomials are found as
Lloyd's algorithm finds a quantiser's levels: the nearest paths of a Gaussian sample, the polynomial that comes nearest
to what these paths stand for (least squares), and so on.
"""

from __future__ import annotations

import json

import numpy as np
import numpy.typing as npt

from waterfill.base.writing import write_file
from waterfill.codecs.bitshift.code import FILE, POWERS, REGISTERS, SIDE_BY_SIDE, Code, place, search

SEED = 20261201
CANDIDATES, REFINED = 160, 6  # multipliers
SAMPLES, REFINED_SAMPLES, TEST_SAMPLES = 1 << 14, 1 << 16, 1 << 19
ROUNDS, REFINED_ROUNDS = 4, 12
STEPS = 2048  # of each sequence, of which a few at the beginning know less
BEGIN = (1.45, 0.9, 0.5)  # coefficients, in standard deviations
LARGEST = 32500  # sum of a code's coefficients, which levels of 8 bits are had with


Reals = npt.NDArray[np.float64]


def main() -> None:
    """Write the file."""
    lines = []
    for rate in REGISTERS:
        code = best(rate)
        gap = rate - 0.5 * np.log2(1 / code.t2)
        print(f"{rate:g} bits: multiplier {code.multiplier:#06x}, t2 {code.t2:.6f}, {gap:.4f} bits above the bound")
        numbers = {
            "multiplier": f"{code.multiplier:#06x}",
            "coefficients": list(code.coefficients),
            "step": float(f"{code.step:.6g}"),
            "t2": float(f"{code.t2:.5g}"),
        }
        lines.append(f'"{rate:g}": {json.dumps(numbers)}')
    write_file(FILE, "{\n" + ",\n".join(lines) + "\n}\n")


def best(rate: float) -> Code:
    """The code of a rate."""
    draw = np.random.default_rng(SEED)
    multipliers = [int(number) | 1 for number in draw.integers(1 << 12, 1 << 16, CANDIDATES)]
    tried = [trained(rate, number, SAMPLES, ROUNDS) for number in multipliers]
    tried.sort(key=lambda code: code.t2)
    refined = [trained(rate, code.multiplier, REFINED_SAMPLES, REFINED_ROUNDS) for code in tried[:REFINED]]
    return min((measured(code, TEST_SAMPLES, SEED + 1) for code in refined), key=lambda code: code.t2)


def trained(rate: float, multiplier: int, samples: int, rounds: int) -> Code:
    """The polynomial for a multiplier, and how well it does."""
    code = rounded(rate, multiplier, np.array(BEGIN))
    for each in range(rounds):
        x = sample(samples, SEED + 2 + each)
        windows = search(x / np.float32(code.step), code, np.zeros(len(x), np.uint16)).reshape(-1)
        powers = np.stack([(place(windows, multiplier) / 32768) ** power for power in POWERS], axis=1)
        code = rounded(rate, multiplier, _fitted(powers, x.reshape(-1)))
    return measured(code, samples, SEED + 1)


def _fitted(powers: Reals, x: npt.NDArray[np.float32]) -> Reals:
    """Coefficients of least squared error."""
    fitted: Reals = np.linalg.lstsq(powers, x.astype(np.float64), rcond=None)[0].astype(np.float64)
    return fitted


def rounded(rate: float, multiplier: int, coefficients: Reals) -> Code:
    """Coefficients in whole numbers, with which levels reach as far as 8 bits do."""
    unit = float(coefficients.sum()) / LARGEST
    a, b, c = (round(float(one) / unit) for one in coefficients)
    return Code(rate, multiplier, (a, b, c), 256 * unit, 1.0)


def measured(code: Code, samples: int, seed: int) -> Code:
    """With the distortion that it has, and the step that it is least with."""
    x = sample(samples, seed)
    windows = search(x / np.float32(code.step), code, np.zeros(len(x), np.uint16))
    levels, targets = code.levels[windows].astype(np.float64).reshape(-1), x.astype(np.float64).reshape(-1)
    inner, power = float(targets @ levels), float(levels @ levels)
    t2 = 1 - inner**2 / (power * float(targets @ targets))
    return Code(code.rate, code.multiplier, code.coefficients, code.step, t2)


def sample(count: int, seed: int) -> npt.NDArray[np.float32]:
    """Of a Gaussian, `[sequences, STEPS]`, of a power of 1."""
    rows = max(SIDE_BY_SIDE, count // STEPS)
    x = np.random.default_rng(seed).standard_normal((rows, max(1, count // rows)))
    scaled: npt.NDArray[np.float32] = (x / np.sqrt(np.mean(np.square(x)))).astype(np.float32)
    return scaled


if __name__ == "__main__":
    main()
