"""Compute the shipped grids: `python -m waterfill.codecs.grids.make_grids`, with scipy (`waterfill[grids]`).

    scalar_grid(n)       p = 1: Newton's method on the Lloyd-Max conditions; exact
    vector_grid(p, n)    p > 1: anneal (Lloyd on small, growing, fresh samples) ──► polish (Lloyd on one large sample)
    measure(points)      t2 on an independent sample
    main                 every size ──► grids.safetensors, rewritten after each grid; prints its SHA-256

A Lloyd step moves every point to the centroid of its Voronoi cell. From a random start it freezes into a polycrystal,
up to 1 % above the best grid. Centroids estimated from few samples are noisy, and that noise is a temperature: going
from `ANNEAL_FROM` samples per cell to `ANNEAL_TO` cools the crystal slowly, at no cost but the samples.

Samples are drawn from N(0, (p+2)/p I) and weighted back to N(0, I). This is the density of the optimal points (Zador;
Graf & Luschgy, Foundations of Quantization, section 7): every cell gets equally many samples and, as an optimal grid
spreads its error evenly over its cells, the measured error has little variance.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save
from scipy.linalg import solve_banded
from scipy.spatial import cKDTree
from scipy.special import ndtr, ndtri

from waterfill.base.writing import write_file
from waterfill.codecs.grids import DATA_FILE, grid

Array = npt.NDArray[np.float64]

NEWTON_STEPS = 10  # six reach the limit of rounding, 1e-10
ANNEAL_FROM, ANNEAL_TO = 12, 200  # samples per cell in the first and the last annealing step
ANNEAL_SAMPLES = 1 << 23  # over all steps, times the order of the symmetry,
ANNEAL_STEPS = (120, 3000)  # of which there are at least and at most so many
POLISH_SAMPLES_PER_CELL = 2048
POLISH_SAMPLES = (1 << 18, 1 << 22)  # least and most
SEEDS = {(4, 256): (2,)}  # where starts differ most, 0.3 %, the best of a few
OVER_RELAXATION = 1.7  # a Lloyd step falls short of the fixed point; 1.7 times it is still stable
MEASURE_CHUNKS, MEASURE_CHUNK = 8, 1 << 20


def sizes() -> list[tuple[int, int]]:
    """Every shipped (p, n): p=1 all n, p=2 half octaves and the papers' sizes, p=3 and 4 octaves."""
    pairs = sorted({*range(4, 17), *(round(2 ** (k / 2)) for k in range(8, 21))} - {362} | {88, 361})
    octaves = [2**k for k in range(3, 13)]
    return [(p, n) for p, ns in ((1, range(2, 257)), (4, octaves[::-1]), (2, pairs), (3, octaves)) for n in ns]


def generate(p: int, n: int) -> tuple[npt.NDArray[np.float32], float]:
    """Points float32 [n, p] in lexicographic order, and their t2. Deterministic."""
    grid = scalar_grid(n) if p == 1 else vector_grid(p, n)
    points = grid[np.lexsort(grid.T[::-1])].astype(np.float32)
    rounded = points.astype(np.float64)
    return points, scalar_t2(rounded[:, 0]) if p == 1 else measure(rounded, np.random.default_rng((p, n, 1)))


# ---- p = 1: exact ----


def scalar_grid(n: int) -> Array:
    """The unique optimal n-point grid [n, 1] of N(0, 1): Newton's method on x = centroids(x).

    As the normal density is log-concave, a centroid follows its borders by less than they move. So the Jacobian
    of x - centroids(x) is an M-matrix at every x, and Newton cannot fail.
    """
    x: Array = np.sqrt(3) * ndtri((np.arange(n) + 0.5) / n)  # the asymptotically optimal density
    for _ in range(NEWTON_STEPS):
        mass, moment, density = _scalar_cells(x)
        centroid = moment / mass
        border = (x[1:] + x[:-1]) / 2
        by_upper = density * (border - centroid[:-1]) / mass[:-1] / 2  # d centroid_i / d x_{i+1}
        by_lower = density * (centroid[1:] - border) / mass[1:] / 2  # d centroid_{i+1} / d x_i
        above, below = -np.insert(by_upper, 0, 0), -np.append(by_lower, 0)
        diagonal = 1 - np.append(by_upper, 0) - np.insert(by_lower, 0, 0)
        x = x - solve_banded((1, 1), np.stack([above, diagonal, below]), x - centroid)
        x = (x - x[::-1]) / 2  # rounding errors would otherwise break the symmetry
    return x[:, None]


def scalar_t2(x: Array) -> float:
    """Exact mean squared error of the ascending, symmetric points x [n] on N(0, 1)."""
    mass, moment, _ = _scalar_cells(x)
    return float(1 - 2 * (x @ moment) + (x * x) @ mass)


def _scalar_cells(x: Array) -> tuple[Array, Array, Array]:
    """Mass [n] and first moment [n] of the cells of x, and the normal density at their n-1 inner borders."""
    borders = (x[1:] + x[:-1]) / 2
    density = np.exp(-borders * borders / 2) / np.sqrt(2 * np.pi)
    below = np.concatenate([[0.0], ndtr(borders), [1.0]])
    mass = np.diff(below)
    mass = np.minimum(mass, mass[::-1])  # symmetric; the lower tail is the accurate one
    return mass, -np.diff(density, prepend=0.0, append=0.0), density


# ---- p > 1: annealed Lloyd ----


@dataclass(frozen=True)
class Sample:
    """points [count, p] and weights [count] (of mean 1) that together stand for N(0, I_p)."""

    points: Array
    weights: Array


def draw(p: int, count: int, rng: np.random.Generator) -> Sample:
    """An importance sample of N(0, I_p), antithetic: its mean is exactly zero."""
    variance = (p + 2) / p
    half = rng.standard_normal((count // 2, p)) * np.sqrt(variance)
    points = np.concatenate([half, -half])
    weights: Array = variance ** (p / 2) * np.exp(-np.square(points).sum(axis=1) / (p + 2))
    return Sample(points, weights)


def symmetry(p: int, n: int) -> Array:
    """The rotations [order, p, p] that are to leave the grid of n points unchanged; they fix no point but the origin.

    D4, the densest lattice in four dimensions, has this three-fold symmetry, which turns two planes at once. Asking for
    it spares annealing two thirds of the samples and finds better grids: at n = 256, t2 is 0.4 % less. It needs n = 3k
    or, with a point at the origin, 3k + 1. In the plane, annealing finds the best grids without help.
    """
    if p != 4 or n < 64 or n % 3 == 2:
        return np.eye(p)[None]
    turn = np.array([[-1.0, -np.sqrt(3)], [np.sqrt(3), -1.0]]) / 2
    rotation = np.kron(np.eye(2), turn)
    return np.stack([np.eye(4), rotation, rotation @ rotation])


def orbits(representatives: Array, group: Array, n: int) -> Array:
    """All n points [n, p]: the images of the representatives [k, p], then the origin if one point is left."""
    images = np.einsum("gij,kj->gki", group, representatives).reshape(-1, group.shape[1])
    return np.pad(images, ((0, n - len(images)), (0, 0)))


def lloyd_step(points: Array, sample: Sample, group: Array, relaxation: float = 1.0) -> Array:
    """Points [n, p] moved to (or by over-relaxation, past) the centroids of their cells; empty cells stay."""
    n, p = points.shape
    order, k = len(group), n // len(group)
    _, cell = cKDTree(points).query(sample.points)
    mass = np.bincount(cell, sample.weights, n)[: order * k].reshape(order, k).sum(axis=0)[:, None]
    moment = np.stack([np.bincount(cell, sample.weights * sample.points[:, i], n) for i in range(p)], axis=1)
    moment = np.einsum("gij,gki->kj", group, moment[: order * k].reshape(order, k, p))  # turned back, then added
    old = points[:k]
    centroid = np.divide(moment, mass, out=old.copy(), where=mass > 0)
    return orbits(old + relaxation * (centroid - old), group, n)


def squared_error(points: Array, sample: Sample) -> float:
    """Weighted mean squared distance per coordinate to the nearest point."""
    distance, _ = cKDTree(points).query(sample.points)
    return float(np.mean(sample.weights * np.square(distance)) / points.shape[1])


def vector_grid(p: int, n: int) -> Array:
    """A grid [n, p] that no Lloyd step improves."""
    rng = np.random.default_rng((p, n, *SEEDS.get((p, n), ())))
    group = symmetry(p, n)
    return polish(anneal(p, n, group, rng), group, rng)


def anneal(p: int, n: int, group: Array, rng: np.random.Generator) -> Array:
    """Lloyd from a random start with a fresh sample in each step, growing geometrically."""
    free = n // len(group)
    samples_per_step = free * (ANNEAL_TO - ANNEAL_FROM) / np.log(ANNEAL_TO / ANNEAL_FROM)
    steps = int(np.clip(len(group) * ANNEAL_SAMPLES / samples_per_step, *ANNEAL_STEPS))
    points = orbits(rng.standard_normal((free, p)) * np.sqrt((p + 2) / p), group, n)
    for per_cell in np.geomspace(ANNEAL_FROM, ANNEAL_TO, steps):
        points = lloyd_step(points, draw(p, int(free * per_cell), rng), group)
    return points


def polish(points: Array, group: Array, rng: np.random.Generator) -> Array:
    """Lloyd until the points are the centroids of their cells: on a sample, then briefly on a far larger one."""
    n, p = points.shape
    count = int(np.clip(POLISH_SAMPLES_PER_CELL * n // len(group), *POLISH_SAMPLES))
    for size, steps in ((count // 8, 20), (count, 4)):
        sample = draw(p, size, rng)
        for _ in range(steps):
            points = lloyd_step(points, sample, group, OVER_RELAXATION)
    return lloyd_step(points, sample, group)


def measure(points: Array, rng: np.random.Generator) -> float:
    """t2 of points [n, p]: standard error about 0.02 %."""
    samples = (draw(points.shape[1], MEASURE_CHUNK, rng) for _ in range(MEASURE_CHUNKS))
    return float(np.mean([squared_error(points, sample) for sample in samples]))


# ---- the data file ----


def write_grids(path: Path, grids: dict[tuple[int, int], tuple[npt.NDArray[np.float32], float]]) -> str:
    """Write the grid file atomically; returns its SHA-256. Equal grids give equal bytes."""
    names = {(p, n): f"p{p}.n{n:04}" for p, n in sorted(grids)}
    tensors = {name: torch.from_numpy(grids[key][0]) for key, name in names.items()}
    # One metadata entry only: safetensors does not fix the order of several.
    content = save(tensors, metadata={"t2": json.dumps({name: grids[key][1] for key, name in names.items()})})
    write_file(path, content)
    return hashlib.sha256(content).hexdigest()


def compare(p: int, n: int) -> str:
    """Regenerate one grid and set it beside the shipped one."""
    points, t2 = generate(p, n)
    shipped = grid(p, n)
    same = "identical" if np.array_equal(points, shipped.points.numpy()) else "different"
    return f"p={p} n={n}: t2 {t2:.7f}, shipped {shipped.t2:.7f} ({t2 / shipped.t2 - 1:+.3%}), points {same}"


def _generate_all(jobs: int) -> Iterator[tuple[tuple[int, int], tuple[npt.NDArray[np.float32], float]]]:
    todo = sizes()
    with ProcessPoolExecutor(jobs) as pool:
        yield from zip(todo, pool.map(generate, *zip(*todo, strict=True)), strict=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m waterfill.codecs.grids.make_grids", description="Compute the shipped grids."
    )
    parser.add_argument(
        "--only", nargs=2, type=int, metavar=("P", "N"), help="make one grid, compare it, write nothing"
    )
    parser.add_argument("--out", type=Path, default=DATA_FILE, help="grid file to write (default: the shipped one)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    options = parser.parse_args()
    if options.only:
        print(compare(*options.only))
        return
    start = time.perf_counter()
    grids: dict[tuple[int, int], tuple[npt.NDArray[np.float32], float]] = {}
    sha256 = ""
    for (p, n), (points, t2) in _generate_all(options.jobs):
        grids[p, n] = points, t2
        sha256 = write_grids(options.out, grids)
        print(f"{time.perf_counter() - start:7.0f} s  p={p} n={n:<4} t2={t2:.7f}", flush=True)
    print(f"{options.out}: {options.out.stat().st_size} bytes, set DATA_SHA256 to\n{sha256}")


if __name__ == "__main__":
    main()
