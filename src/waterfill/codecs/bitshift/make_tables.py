"""Find multipliers and tables: python -m waterfill.codecs.bitshift.make_tables  (some minutes, needs the native library).

For each rate many multipliers are tried, and those that do best once more, with more samples. Tables are found as
Lloyd's algorithm finds a quantiser's levels: the nearest paths of a Gaussian sample, the tables whose sums come nearest
to what these paths stand for (least squares), and so on. A step is chosen so that levels fit 8 bits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from waterfill.base.writing import write_file
from waterfill.codecs.bitshift.code import FIELDS, FILE, LANES, REGISTERS, Code, search

SEED = 20261201
CANDIDATES, REFINED = 256, 8  # multipliers
SAMPLES, REFINED_SAMPLES, TEST_SAMPLES = 1 << 14, 1 << 16, 1 << 19
ROUNDS, REFINED_ROUNDS = 4, 12
STEPS = 2048  # of each sequence, of which a few at the beginning know less
ENTRIES = 16  # of a table
WEIGHTS = (1.0, 0.45, 0.2)  # standard deviations of the tables that it begins with
THREE_TABLES_FROM = 3.5  # bits
MOST_LEVEL = 127

Reals = npt.NDArray[np.float64]


def main() -> None:
    """Write the file."""
    codes = {}
    for rate in REGISTERS:
        code = best(rate)
        gap = rate - 0.5 * np.log2(1 / code.t2)
        print(f"{rate:g} bits: multiplier {code.multiplier:#06x}, t2 {code.t2:.6f}, {gap:.4f} bits above the bound")
        codes[f"{rate:g}"] = {
            "multiplier": f"{code.multiplier:#06x}",
            "step": float(f"{code.step:.6g}"),
            "t2": float(f"{code.t2:.5g}"),
            "tables": code.tables.tolist(),
        }
    lines = (f'"{rate}": {json.dumps(code)}' for rate, code in codes.items())
    write_file(FILE, "{\n" + ",\n".join(lines).replace("]], [", "]],\n[") + "\n}\n")


def best(rate: float) -> Code:
    """The code of a rate."""
    draw = np.random.default_rng(SEED)
    multipliers = [int(number) | 1 for number in draw.integers(1 << 12, 1 << 16, CANDIDATES)]
    tried = [trained(rate, number, SAMPLES, ROUNDS) for number in multipliers]
    tried.sort(key=lambda code: code.t2)
    refined = [trained(rate, code.multiplier, REFINED_SAMPLES, REFINED_ROUNDS) for code in tried[:REFINED]]
    return min((measured(code, TEST_SAMPLES, SEED + 1) for code in refined), key=lambda code: code.t2)


def trained(rate: float, multiplier: int, samples: int, rounds: int) -> Code:
    """Tables for a multiplier, and how well they do on the last sample but one."""
    count = 3 if rate >= THREE_TABLES_FROM else 2
    code = rounded(rate, multiplier, np.concatenate(list(_begin(count))))
    for each in range(rounds):
        x = sample(samples, SEED + 2 + each)
        windows = search(x / np.float32(code.step), code, np.zeros(len(x), np.uint16)).astype(np.int64)
        hashed = windows.reshape(-1) * multiplier
        columns = np.stack([ENTRIES * i + (hashed >> field & 15) for i, field in enumerate(FIELDS[:count])])
        products = np.zeros((ENTRIES * count, ENTRIES * count))
        for one in columns:
            for other in columns:
                np.add.at(products, (one, other), 1)
        sums = np.bincount(columns.reshape(-1), np.tile(x.reshape(-1), count), ENTRIES * count)
        ridge = 1e-6 * x.size  # adding to one table what another loses changes nothing
        code = rounded(rate, multiplier, np.linalg.solve(products + ridge * np.eye(len(sums)), sums))
    return measured(code, samples, SEED + 1)


def _begin(count: int) -> Iterator[Reals]:
    """Tables of Gaussian levels, each in an order of its own."""
    levels = np.array([NormalDist().inv_cdf((i + 0.5) / ENTRIES) for i in range(ENTRIES)])
    draw = np.random.default_rng(SEED)
    for weight in WEIGHTS[:count]:
        yield weight * draw.permutation(levels)


def rounded(rate: float, multiplier: int, entries: Reals) -> Code:
    """Tables in whole numbers, none of whose sums is more than `MOST_LEVEL`."""
    tables = entries.reshape(-1, ENTRIES)
    step = float(np.abs(tables).max(1).sum()) / (MOST_LEVEL - len(tables))
    return Code(rate, multiplier, np.rint(tables / step).astype(np.int8), step, 1.0)


def measured(code: Code, samples: int, seed: int) -> Code:
    """With the distortion that it has, and the step that it is least with."""
    x = sample(samples, seed)
    windows = search(x / np.float32(code.step), code, np.zeros(len(x), np.uint16))
    levels, targets = code.levels[windows].astype(np.float64).reshape(-1), x.astype(np.float64).reshape(-1)
    inner, power = float(targets @ levels), float(levels @ levels)
    t2 = 1 - inner**2 / (power * float(targets @ targets))
    return Code(code.rate, code.multiplier, code.tables, code.step, t2)


def sample(count: int, seed: int) -> npt.NDArray[np.float32]:
    """Of a Gaussian, `[sequences, STEPS]`, of a power of 1."""
    rows = max(LANES, count // STEPS)
    x = np.random.default_rng(seed).standard_normal((rows, max(1, count // rows)))
    return (x / np.sqrt(np.mean(np.square(x)))).astype(np.float32)


if __name__ == "__main__":
    main()
