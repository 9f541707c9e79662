"""Sensitivities that were not measured on this model: of a smaller sibling, from a published table, or none at all.

    sibling    a file of `plan --save`, of other weights: alpha and beta by kind of matrix and relative depth
    table      {"tensors": {NAME: {"alpha": NUMBER}}}, in any unit: which matrices matter more, not what it costs
    uniform    every weight counts the same, so that a plan has the least squared error

They divide a budget; what they say of the loss is no promise, and plans say so.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from waterfill.base.errors import BudgetError, WaterfillError
from waterfill.base.reading import read_text
from waterfill.files.checkpoint import Checkpoint
from waterfill.planning.budget import Budget
from waterfill.planning.inventory import PlannedMatrix
from waterfill.planning.loss import Coefficients
from waterfill.planning.measuring import as_text
from waterfill.planning.plan import SIBLING, TABLE, UNIFORM
from waterfill.planning.sensitivity import Sensitivity

_log = logging.getLogger(__name__)

UNITLESS = (UNIFORM, TABLE)  # whose losses are not nats per token


def uniform_sensitivity(fingerprint: str, matrices: Sequence[PlannedMatrix]) -> Sensitivity:
    """Every weight counts the same: the predicted loss is the mean relative squared error."""
    weights = sum(math.prod(matrix.shape) for matrix in matrices)
    shares = {matrix.name: math.prod(matrix.shape) / weights for matrix in matrices}
    return _made_up(fingerprint, {"kind": UNIFORM}, {name: Coefficients(s, s) for name, s in shares.items()})


def given_sensitivity(
    given: str | Path | Sensitivity, checkpoint: Checkpoint, matrices: Sequence[PlannedMatrix]
) -> Sensitivity:
    """Sensitivities that were measured before, of this model or of one like it, or a table of them.

    Raises:
        WaterfillError: they are none, or of a model that has nothing in common with this one.
    """
    if not isinstance(given, Sensitivity):
        path = Path(given)
        if (table := _table(path)) is not None:
            spread = _spread(table, matrices, str(path))
            return _made_up(checkpoint.fingerprint, {"kind": TABLE, "source": as_text(path.name)}, spread)
        given = Sensitivity.load(path)
    if given.fingerprint == checkpoint.fingerprint:
        return given
    _log.warning(
        "the sensitivities are of other weights (fingerprint %s) than %s holds (%s): they divide the budget, and what "
        "they predict is a guess",
        *(given.fingerprint, checkpoint.path, checkpoint.fingerprint),
    )
    spread = _spread(given.tensors, matrices, f"the model of fingerprint {given.fingerprint}")
    return _made_up(checkpoint.fingerprint, {"kind": SIBLING, "source": given.fingerprint}, spread)


def check_units(measured: Sensitivity, budget: Budget) -> None:
    """Refuse a loss as the budget of sensitivities that know no nats.

    Raises:
        BudgetError: it is one.
    """
    if budget.max_kl is not None and measured.probe.get("kind") in UNITLESS:
        raise BudgetError("--max-kl takes sensitivities that were measured; give --size or --bits, or measure them")


def _made_up(
    fingerprint: str, probe: Mapping[str, str | int | float | None], tensors: Mapping[str, Coefficients]
) -> Sensitivity:
    return Sensitivity(fingerprint, "fisher", probe, nll=0.0, tokens=1, tensors=tensors)


def _table(path: Path) -> dict[str, Coefficients] | None:
    """Of a file that is a table rather than what `plan --save` writes."""
    try:
        data = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):
        return None  # whoever reads sensitivities says what is wrong
    if not isinstance(data, dict) or "version" in data or not isinstance(data.get("tensors"), dict):
        return None
    return {name: _of_table(path, name, entry) for name, entry in data["tensors"].items()}


def _of_table(path: Path, name: str, entry: Any) -> Coefficients:
    alpha = entry.get("alpha") if isinstance(entry, dict) else None
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise WaterfillError(f"{path}: alpha of {name!r} is {alpha!r}, expected a number; correct the table")
    alpha = max(float(alpha), 0.0)  # published ones are measured too: a little noise about nothing
    return Coefficients(alpha, alpha)


@dataclass(frozen=True)
class _Place:
    """Where a matrix is in its model: names that differ in numbers are of a kind, the first of them is the layer."""

    kind: str
    layer: int


def _place(name: str) -> _Place:
    numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", name)
    return _Place(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), int(numbers[0]) if numbers else 0)


def _spread(
    tensors: Mapping[str, Coefficients], matrices: Sequence[PlannedMatrix], source: str
) -> dict[str, Coefficients]:
    """Coefficients for every matrix: those of its kind at its relative depth, such that a kind's sum stays; the mean
    per weight of all where there is none of its kind."""
    curves, places = _Curves(tensors), {matrix.name: _place(matrix.name) for matrix in matrices}
    layers: dict[str, set[int]] = {}
    for place in places.values():
        layers.setdefault(place.kind, set()).add(place.layer)
    together = Counter(places.values())  # experts of one layer are of one place
    known: dict[str, tuple[float, float]] = {}
    for name, place in places.items():
        if (sums := curves.at(place, sorted(layers[place.kind]))) is not None:
            known[name] = sums[0] / together[place], sums[1] / together[place]
    if not known:
        raise WaterfillError(
            f"{source} has no matrix like {matrices[0].name} or any other of this model; give sensitivities of a model "
            "of the same kind, or none to measure them"
        )
    sizes = {matrix.name: math.prod(matrix.shape) for matrix in matrices}
    size = sum(sizes[name] for name in known)
    usual = [sum(sums[i] for sums in known.values()) / size for i in range(2)]
    found = {name: known.get(name, (usual[0] * sizes[name], usual[1] * sizes[name])) for name in places}
    return {name: Coefficients(*sums) for name, sums in found.items()}


class _Curves:
    """Sums of alpha and beta by kind and layer."""

    def __init__(self, tensors: Mapping[str, Coefficients]) -> None:
        self._sums: dict[str, dict[int, list[float]]] = {}
        for name, c in tensors.items():
            place = _place(name)
            total = self._sums.setdefault(place.kind, {}).setdefault(place.layer, [0.0, 0.0])
            total[0] += max(c.alpha, 0.0)
            total[1] += max(c.beta, 0.0)

    def at(self, place: _Place, layers: Sequence[int]) -> tuple[float, float] | None:
        """Interpolated over depth, for a model whose matrices of that kind are in these layers."""
        sums = self._sums.get(place.kind)
        if sums is None:
            return None
        here = [sums[layer] for layer in sorted(sums)]
        depth = (layers.index(place.layer) + 0.5) / len(layers)
        depths = (np.arange(len(here)) + 0.5) / len(here)
        scale = len(here) / len(layers)
        alpha, beta = (scale * float(np.interp(depth, depths, [v[i] for v in here])) for i in range(2))
        return alpha, beta
