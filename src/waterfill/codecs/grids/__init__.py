"""MSE-optimal Gaussian quantisation grids: the points that rotated weights are rounded to.

After a Hadamard rotation the weights of a block look like N(0, 1) draws. HIGGS (arXiv 2411.17525, section 3) cuts the
block into p-vectors and rounds each to the nearest of n points in R^p, chosen to make E|x - q(x)|^2 least for
x ~ N(0, I_p). These points do not depend on the model, so they are computed once (`generate.py`) and shipped:

    grids.safetensors ──► read_grids (checks every byte, once) ──► grid(p, n)
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from waterfill.base.errors import WaterfillError
from waterfill.base.lazy import torch

DATA_FILE = Path(__file__).with_name("grids.safetensors")
DATA_SHA256 = "691cf3e8adc6e411490f4bbcd09b6b75525b13dfe4f0b9dd0477889c4b0209a0"  # printed by generate.py


class GridError(WaterfillError, ValueError):
    """A grid that is not shipped was asked for, or the grid file is not the one that was shipped."""


@dataclass(frozen=True, eq=False)
class Grid:
    """n reconstruction points in R^p, each the centroid of its Voronoi cell under N(0, I_p).

    array: float32 [n, p], points in lexicographic order (ascending when p = 1); shared by all, so never write to it.
    t2: mean squared error per coordinate on N(0, I_p); the relative noise power of a rotated matrix on the grid.
    digest: 16 hex digits that identify the points to the bit; an artifact stores it.
    """

    p: int
    n: int
    array: npt.NDArray[np.float32]
    t2: float
    digest: str

    @cached_property
    def points(self) -> torch.Tensor:
        """`array` as a tensor, in the same memory."""
        with torch.inference_mode(mode=False):  # as in `hadamard.signs`
            return torch.from_numpy(self.array)


def grid(p: int, n: int) -> Grid:
    """The shipped grid of n points in p dimensions, the same object on every call.

    Raises:
        GridError: there is none.
    """
    shipped = _shipped()
    if (p, n) not in shipped:
        sizes = [str(m) for q, m in shipped if q == p]
        dimensions = sorted({q for q, _ in shipped})
        exists = f"for p={p} choose n from {', '.join(sizes)}" if sizes else f"choose p from {dimensions}"
        raise GridError(f"there is no grid of n={n} points in p={p} dimensions: {exists}")
    return shipped[p, n]


def available() -> tuple[tuple[int, int], ...]:
    """Every shipped (p, n), ascending."""
    return tuple(_shipped())


def read_grids(path: Path, sha256: str) -> dict[tuple[int, int], Grid]:
    """All grids of a grid file, keyed and sorted by (p, n).

    Raises:
        GridError: the file has another SHA-256.
    """
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != sha256:
        raise GridError(f"{path} has SHA-256 {digest}, expected {sha256}: the file is damaged, reinstall waterfill")
    with safe_open(path, framework="np") as file:
        t2: Mapping[str, float] = json.loads(file.metadata()["t2"])
        grids = [_grid(file.get_tensor(name), t2[name]) for name in t2]
    return {(g.p, g.n): g for g in sorted(grids, key=lambda g: (g.p, g.n))}


def _grid(points: npt.NDArray[np.float32], t2: float) -> Grid:
    n, p = points.shape
    return Grid(p, n, points, t2, _digest(points))


def _digest(points: npt.NDArray[np.float32]) -> str:
    n, p = points.shape
    content = f"{p} {n} ".encode() + points.astype("<f4").tobytes()
    return hashlib.blake2b(content, digest_size=8).hexdigest()


@functools.lru_cache(maxsize=1)
def _shipped() -> dict[tuple[int, int], Grid]:
    return read_grids(DATA_FILE, DATA_SHA256)
