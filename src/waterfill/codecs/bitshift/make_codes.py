"""Find hashes and levels: python -m waterfill.codecs.bitshift.make_codes  (a quarter of an hour; the native library).

For each rate many hashes are drawn, the newest symbols in their highest bits. Levels are found as Lloyd's algorithm
finds a quantiser's: the nearest paths of a Gaussian sample, the two tables whose sums come nearest to what these paths
stand for (least squares), and so on. The best hash is then changed here and there, as long as that helps.
"""

from __future__ import annotations

import json
from dataclasses import replace
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from waterfill.base.writing import write_file
from waterfill.codecs.bitshift.code import FILE, NIBBLES, REGISTERS, SIDE_BY_SIDE, STATES, Code, hash_of, search

SEED = 20261201
WIDTHS = (0.3, 0.45, 0.6)  # of the finer table at the beginning, in standard deviations
CANDIDATES, CHANGES = 24, 250
SAMPLES, FINAL_SAMPLES, TEST_SAMPLES = 1 << 15, 1 << 18, 1 << 19
STATED_SAMPLES = 1 << 22  # that a code's distortion is stated by: at high rates a few outliers are much of it
ROUNDS, FINAL_ROUNDS = 4, 8
STEPS = 1024  # of each sequence, of which a few at the beginning know less
LARGEST = 63  # level
KEEP = 1e-4  # of all samples: how many each entry of a table is taken to have seen already, where it is

Reals = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]


class Draft(NamedTuple):
    """A code in the making: levels are real numbers, in standard deviations."""

    hashes: Bytes
    parts: Reals  # [2, 16]
    t2: float = np.inf


def main() -> None:
    """Write the file."""
    lines = []
    for rate in REGISTERS:
        code = best(rate)
        gap = rate - 0.5 * np.log2(1 / code.t2)
        print(f"{rate:g} bits: t2 {code.t2:.6f}, {gap:.4f} bits above the bound", flush=True)
        numbers = {
            "hash": [table.tobytes().hex() for table in code.hashes],
            "levels": code.parts.tolist(),
            "step": float(f"{code.step:.6g}"),
            "t2": float(f"{code.t2:.5g}"),
        }
        lines.append(f'"{rate:g}": {json.dumps(numbers)}')
    write_file(FILE, "{\n" + ",\n".join(lines) + "\n}\n")


def best(rate: float) -> Code:
    """The code of a rate."""
    x = sample(SAMPLES, SEED)
    found = []
    for width in WIDTHS:
        draw = np.random.default_rng(SEED)
        drafts = [trained(rate, Draft(drawn(rate, draw), beginning(width)), x, ROUNDS) for _ in range(CANDIDATES)]
        draft = changed(rate, min(drafts, key=lambda draft: draft.t2), x, draw)
        draft = trained(rate, draft._replace(t2=np.inf), sample(FINAL_SAMPLES, SEED + 1), FINAL_ROUNDS)
        found.append(measured(rate, draft, TEST_SAMPLES))
    return stated(min(found, key=lambda code: code.t2))


def stated(code: Code) -> Code:
    """With a distortion that is known well, of groups that have a power of 1 each, as a matrix's have."""
    x = sample(STATED_SAMPLES, SEED + 3)
    return replace(code, t2=paths(code, x / np.sqrt(np.mean(np.square(x), axis=1, keepdims=True)))[1])


def drawn(rate: float, draw: np.random.Generator) -> Bytes:
    """Tables of a hash by chance, but for the newest symbols, which decide its highest bits."""
    hashes = draw.integers(0, 256, (NIBBLES, 16))
    nibble, free = 0, 8
    for register in REGISTERS[rate]:
        free -= register.bits
        newest, rest = np.arange(16) % (1 << register.bits), np.arange(16) >> register.bits
        spread = draw.permutation(1 << register.bits)[newest] << free
        hashes[nibble] = spread ^ draw.integers(0, 256, 16 >> register.bits)[rest]
        nibble += register.width // 4
    return hashes.astype(np.uint8)


def beginning(width: float) -> Reals:
    """Quantiles of two Gaussians, whose sum has a power of about 1."""
    evenly = np.array([NormalDist().inv_cdf((i + 0.5) / 16) for i in range(16)])
    return np.stack([evenly * np.sqrt(1 - width**2), evenly * width])


def trained(rate: float, draft: Draft, x: npt.NDArray[np.float32], rounds: int) -> Draft:
    """With the levels that were best in some rounds of Lloyd's algorithm."""
    best, parts = draft, draft.parts
    for _ in range(rounds):
        windows, t2 = paths(rounded(rate, draft.hashes, parts), x)
        if t2 < best.t2:
            best = Draft(draft.hashes, parts, t2)
        parts = fitted(draft.hashes, windows, x, parts)
    return best


def changed(rate: float, draft: Draft, x: npt.NDArray[np.float32], draw: np.random.Generator) -> Draft:
    """With entries of its hash exchanged, or a bit of them turned, where that is better."""
    for _ in range(CHANGES):
        hashes = draft.hashes.copy()
        for table in draw.integers(0, NIBBLES, draw.integers(1, 3)):
            one, other = draw.integers(0, 16, 2)
            if draw.random() < 0.5:
                hashes[table, [one, other]] = hashes[table, [other, one]]
            else:
                hashes[table, one] ^= 1 << draw.integers(8)
        draft = min(draft, trained(rate, Draft(hashes, draft.parts), x, 2), key=lambda draft: draft.t2)
    return draft


def fitted(hashes: Bytes, windows: npt.NDArray[np.uint16], x: npt.NDArray[np.float32], parts: Reals) -> Reals:
    """Tables of least squared error, entries that are rare not far from where they were."""
    count = np.bincount(windows.reshape(-1), minlength=STATES)
    total = np.bincount(windows.reshape(-1), x.reshape(-1), minlength=STATES)
    hashed = hash_of(hashes)
    entries = np.concatenate([np.eye(16)[hashed >> 4], np.eye(16)[hashed & 15]], axis=1)
    keep = KEEP * x.size
    inner = entries.T @ (count[:, None] * entries) + keep * np.eye(32)
    return np.linalg.solve(inner, entries.T @ total + keep * parts.reshape(-1)).reshape(2, 16)


def rounded(rate: float, hashes: Bytes, parts: Reals, t2: float = 1.0) -> Code:
    """Levels in whole numbers that reach as far as 7 bits do."""
    centred = parts - (parts.max(1, keepdims=True) + parts.min(1, keepdims=True)) / 2
    step = float(centred.max(1).sum()) / LARGEST
    return Code(rate, hashes, np.round(centred / step).astype(np.int8), step, t2)


def measured(rate: float, draft: Draft, samples: int) -> Code:
    """With the distortion that it has where it was not trained."""
    code = rounded(rate, draft.hashes, draft.parts)
    _, t2 = paths(code, sample(samples, SEED + 2))
    return rounded(rate, draft.hashes, draft.parts, t2)


def paths(code: Code, x: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.uint16], float]:
    """The nearest paths, and the share of the power that they leave where their levels have the best scale."""
    windows = search(x / np.float32(code.step), code, np.zeros(len(x), np.uint16))
    levels, targets = code.levels[windows].astype(np.float64).reshape(-1), x.astype(np.float64).reshape(-1)
    inner, power = float(targets @ levels), float(levels @ levels)
    return windows, 1 - inner**2 / (power * float(targets @ targets))


def sample(count: int, seed: int) -> npt.NDArray[np.float32]:
    """Of a Gaussian, `[sequences, STEPS]`, of a power of 1."""
    rows = max(SIDE_BY_SIDE, count // STEPS)
    x = np.random.default_rng(seed).standard_normal((rows, max(1, count // rows)))
    scaled: npt.NDArray[np.float32] = (x / np.sqrt(np.mean(np.square(x)))).astype(np.float32)
    return scaled


if __name__ == "__main__":
    main()
