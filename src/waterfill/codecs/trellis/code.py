"""Trellis-coded quantisation (Marcellin and Fischer 1990) with Ungerboeck's codes, for entropy coding.

Levels are odd numbers p, x ~ step * p, in four subsets, p = 1, 3, 5, 7 modulo 8. The state of a convolutional code says
which two of them, a union, the next level may come from. Here a union is the numbers 4j + 1, or their negatives: j then
has one distribution whatever the state, and is coded without knowing it. (The classical unions, even and odd multiples,
need a table each, and lie no nearer to the bound.)

    state s = (s >> 1) ^ (z0 h0) ^ (z1 h1),   z0 = s & 1 chooses the union,   z1 = (j ^ z0) & 1 the subset within it

With one state levels are p = 4j: the uniform quantiser.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from waterfill.base import native

Floats = npt.NDArray[np.float32]
Levels = npt.NDArray[np.int16]


@dataclass(frozen=True)
class Code:
    """Parity-check polynomials without their last bits, which are 1 and 0."""

    states: int
    h0: int
    h1: int


# Ungerboeck, IEEE Communications Magazine 25 (2), 1987, table I (one-dimensional codes), in octal.
_POLYNOMIALS = {4: (0o5, 0o2), 8: (0o13, 0o4), 16: (0o23, 0o4), 32: (0o45, 0o10), 64: (0o103, 0o24)}
_POLYNOMIALS |= {128: (0o235, 0o126), 256: (0o515, 0o362)}
CODES = {1: Code(1, 0, 0)} | {n: Code(n, h0 >> 1, h1 >> 1) for n, (h0, h1) in _POLYNOMIALS.items()}


def offset(states: int) -> int:
    """Levels are 4j + offset."""
    return int(states > 1)


def search(x: Floats, states: int, lanes: int, least: int, most: int) -> Levels:
    """The path of levels nearest to x, in the sum of squares; their j lie between `least` and `most`.

    x is in units of a step; element i belongs to lane i mod `lanes`, and every lane starts in state 0.
    """
    isa = native.isa()
    if isa is None:
        return search_reference(x, states, lanes, least, most)
    library = native.library()
    assert library is not None
    x, out = np.ascontiguousarray(x, np.float32), np.empty(len(x), np.int16)
    library.trellis_search(library.isas[isa], x, out, states=states, lanes=lanes, least=least, most=most)
    return out


def search_reference(x: Floats, states: int, lanes: int, least: int, most: int) -> Levels:
    """`search` in numpy, the Viterbi algorithm over all lanes at once."""
    code = CODES[states]
    steps = x.reshape(-1, lanes).astype(np.float32)
    if states == 1:
        whole: Levels = 4 * np.clip(np.rint(steps * np.float32(0.25)), least, most).astype(np.int16)
        return whole.reshape(-1)
    state, z1 = np.divmod(np.arange(2 * states), 2)
    z0 = state & 1
    following = (state >> 1) ^ (z0 * code.h0) ^ (z1 * code.h1)
    ways = np.argsort(following, kind="stable").reshape(states, 2)  # the two transitions into each state
    source, subset = state[ways], (z0 + 2 * z1)[ways]
    metric = np.full((states, lanes), 1e30, np.float32)
    metric[0] = 0
    choices, candidates = [], []
    for t, target in enumerate(steps):
        j, cost = _candidates(target, least, most)
        sums = metric[source] + cost[subset]  # [states, 2, lanes]
        choices.append(sums[:, 1] < sums[:, 0])
        least_cost = sums.min(1)
        metric = least_cost - metric[0] if t % 64 == 0 and t > 64 else least_cost
        candidates.append(j)
    now, lane = metric.argmin(0), np.arange(lanes)
    out = np.empty_like(steps, np.int16)
    for t in range(len(steps) - 1, -1, -1):
        way = choices[t][now, lane].astype(np.int64)
        chosen = subset[now, way]
        out[t] = (1 - 2 * (chosen & 1)) * (4 * candidates[t][chosen, lane] + 1)
        now = source[now, way]
    return out.reshape(-1)


def _candidates(target: Floats, least: int, most: int) -> tuple[npt.NDArray[np.int64], Floats]:
    """(j, squared distance), `[4, lanes]`: the nearest member of each subset z0 + 2 z1."""
    nearest, cost = [], []
    for subset in range(4):
        z0 = subset & 1
        parity = (subset >> 1) ^ z0
        wanted = (-target if z0 else target) - np.float32(4 * parity + 1)
        i = np.clip(np.rint(wanted * np.float32(0.125)), -(-(least - parity) // 2), (most - parity) // 2)
        error = wanted - np.float32(8) * i.astype(np.float32)
        nearest.append(2 * i.astype(np.int64) + parity)
        cost.append(error * error)
    return np.stack(nearest), np.stack(cost)


def indices(levels: npt.NDArray[Any], states: int) -> npt.NDArray[np.int16]:
    """The j of each level: levels of the second union are 3 modulo 4."""
    p = levels.astype(np.int16)
    j: npt.NDArray[np.int16] = (np.where(p & 2, -p, p) if states > 1 else p) >> 2
    return j


def levels(j: npt.NDArray[Any], states: int, lanes: int) -> npt.NDArray[np.int64]:
    """The inverse of `indices`: walks the trellis."""
    code, path = CODES[states], np.ascontiguousarray(j).reshape(-1, lanes).astype(np.int64)
    if states == 1:
        return 4 * path.reshape(-1)
    out, state = np.empty_like(path), np.zeros(lanes, np.int64)
    for t, step in enumerate(path):
        z0 = state & 1
        out[t] = (1 - 2 * z0) * (4 * step + 1)
        state = (state >> 1) ^ (z0 * code.h0) ^ (((step ^ z0) & 1) * code.h1)
    return out.reshape(-1)
