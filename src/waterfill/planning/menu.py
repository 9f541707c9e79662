"""What each matrix may be given: one menu entry per codec, with exact bytes, distortion and predicted loss.

All menus list the same codecs in the same order, so that matrices can be tied to one entry; entries that another one
dominates are left to the allocator.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from waterfill.base.errors import WaterfillError
from waterfill.codecs import LOSSLESS, Higgs, MenuPoint, get_codec
from waterfill.codecs.integers import register_table
from waterfill.codecs.trellis.codec import LEAST_RATE, MOST_RATE, RATE_DIGITS
from waterfill.files.artifact import RAW
from waterfill.files.artifact.header import reserved_bytes
from waterfill.files.checkpoint import KEPT_DTYPES, WEIGHT_DTYPES
from waterfill.planning.allocate import Choice
from waterfill.planning.inventory import Inventory, KeptTensor, PlannedMatrix
from waterfill.planning.loss import Coefficients, Gain, gain_rho, predicted_kl, relative_error
from waterfill.planning.plan import KeptPlan, TensorPlan, kept_spec

# Every power-of-two grid: rates from 0.75 to 8 bits in steps of a quarter or a third; the larger p, the lower t2.
CODECS = (
    *(f"higgs-p1-n{2**k}" for k in range(1, 9)),
    *(f"higgs-p2-n{2**k}" for k in range(2, 11)),
    *(f"higgs-p3-n{2**k}" for k in range(3, 13)),
    *(f"higgs-p4-n{2**k}" for k in range(3, 13)),
)
FAST = "fast"  # stands for the grids that the native kernels look up in vector registers
TRELLIS = "trellis"  # stands for the entropy-coded trellis code at every rate; trellis-s8 for the one with 8 states
STATES = 64
FINE, COARSE = 32, 8  # rates per bit of a menu, up to FINE_RATE and beyond it
FINE_RATE = 6.0
MANY_MATRICES = 4000  # menus are coarse throughout; rates are refined anyhow
Purpose = Literal["storage", "memory"]
PURPOSES: Mapping[Purpose, tuple[str, ...]] = {"storage": (TRELLIS,), "memory": CODECS}


@dataclass(frozen=True)
class Menus:
    """One menu per matrix, in execution order."""

    matrices: tuple[PlannedMatrix, ...]
    coefficients: tuple[Coefficients, ...]
    points: tuple[tuple[MenuPoint, ...], ...]
    choices: tuple[tuple[Choice, ...], ...]
    gain: Gain
    any_rate: frozenset[int]  # states of the trellis codes that may take rates between those of the menu

    @property
    def weights(self) -> int:
        """Number of weights in all matrices."""
        return sum(math.prod(matrix.shape) for matrix in self.matrices)

    def tensors(self, chosen: Sequence[int]) -> tuple[TensorPlan, ...]:
        """The plan of every matrix, given the index of its choice."""
        return self.plans([self.points[i][choice] for i, choice in enumerate(chosen)])

    def plans(self, points: Sequence[MenuPoint]) -> tuple[TensorPlan, ...]:
        """The plan of every matrix, given its point, of the menu or not."""
        return tuple(self._tensor(i, point) for i, point in enumerate(points))

    def _tensor(self, i: int, point: MenuPoint) -> TensorPlan:
        matrix, c = self.matrices[i], self.coefficients[i]
        rho = gain_rho(self.gain, c)
        return TensorPlan(
            name=matrix.name,
            shape=matrix.shape,
            codec=point.codec,
            rate_bits=point.rate_bits,
            size_bytes=point.size_bytes,
            alpha=c.alpha,
            beta=c.beta,
            rho=rho,
            t2=relative_error(point.t2, rho),
            kl=predicted_kl(c, point.t2, rho, point.along),
            role=matrix.role,
            dtype=matrix.dtype,
            parameter=matrix.parameter,
            stored_shape=matrix.stored_shape,
        )


def make_menus(
    tensors: Inventory,
    coefficients: Mapping[str, Coefficients],
    gain: Gain,
    codecs: Sequence[str] | None = None,
    purpose: Purpose = "storage",
) -> Menus:
    """Menus of all matrices, of the codecs that `codec_names` finds."""
    matrices = tuple(tensors.matrices)
    names = codec_names(tensors, codecs, purpose)
    if not matrices:
        raise WaterfillError("no matrix of the model is left to be packed; keep fewer tensors")
    missing = [matrix.name for matrix in matrices if matrix.name not in coefficients]
    if missing:
        raise WaterfillError(
            f"the sensitivities lack {len(missing)} matrices of the model, such as {missing[0]}; "
            "measure them for this model with the same --keep"
        )
    known: dict[tuple[tuple[int, int], str], tuple[MenuPoint, ...]] = {}
    points, choices = [], []
    for matrix in matrices:
        key = (matrix.shape, matrix.dtype)
        if key not in known:
            known[key] = tuple(_point(name, matrix) for name in names)
        c = coefficients[matrix.name]
        rho = gain_rho(gain, c)
        points.append(known[key])
        choices.append(tuple(Choice(p.size_bytes, predicted_kl(c, p.t2, rho, p.along)) for p in known[key]))
    return Menus(
        matrices=matrices,
        coefficients=tuple(coefficients[matrix.name] for matrix in matrices),
        points=tuple(points),
        choices=tuple(choices),
        gain=gain,
        any_rate=frozenset(filter(None, map(_states, codecs or PURPOSES[purpose]))),
    )


def codec_names(
    tensors: Inventory, codecs: Sequence[str] | None = None, purpose: Purpose = "storage"
) -> tuple[str, ...]:
    """What a matrix may be given: `codecs` (names, patterns, "fast", "trellis"), or what serves the purpose and `raw`,
    the matrix as it is. WaterfillError for a codec that is unknown or cannot be.

    `raw` is not offered to mixtures of experts, whose fused parameters cannot be half packed.
    """
    fused = any(matrix.role == "expert" for matrix in tensors.matrices)
    raw = () if fused else (RAW,)
    wanted = tuple(codecs or (*PURPOSES[purpose], *raw))
    names = _selected(wanted, (*CODECS, *raw), len(tensors.matrices))
    if fused and RAW in names:
        raise WaterfillError("a fused parameter cannot be packed in part, so experts cannot be raw; keep them instead")
    for name in set(names) - {RAW}:
        get_codec(name)
    return names


def _states(name: str) -> int:
    """States of "trellis" or "trellis-s8", which stand for every rate; else 0."""
    match = re.fullmatch(r"trellis(?:-s([0-9]+))?", name)
    return int(match[1] or STATES) if match else 0


def _selected(wanted: Sequence[str], menu: Sequence[str], matrices: int) -> tuple[str, ...]:
    """Codec names, each once: those of the menu that match a pattern or are "fast", others as they are given."""
    names: dict[str, None] = {}
    for name in wanted:
        if name == FAST:
            matching = [codec for codec in menu if _is_fast(codec)]
        elif states := _states(name):
            matching = trellis_codecs(states, matrices)
        elif any(c in name for c in "*?["):
            matching = [codec for codec in menu if fnmatchcase(codec, name)]
            if not matching:
                raise WaterfillError(f"no codec matches {name!r}; the menu is {', '.join(menu)}")
        else:
            matching = [name]
        names |= dict.fromkeys(matching)
    return tuple(names)


def trellis_codecs(states: int, matrices: int = 1) -> list[str]:
    """Names of the rates on a menu."""
    fine = COARSE if matrices > MANY_MATRICES else FINE
    low, middle, high = LEAST_RATE, FINE_RATE, MOST_RATE
    rates = [k / fine for k in range(math.ceil(low * fine), int(middle * fine))]
    rates += [k / COARSE for k in range(int(middle * COARSE), int(high * COARSE) + 1)]
    return [f"trellis-s{states}-r{rate:.{RATE_DIGITS}f}" for rate in rates]


def _is_fast(name: str) -> bool:
    codec = None if name == RAW else get_codec(name)
    return isinstance(codec, Higgs) and register_table(codec)


def _point(codec: str, matrix: PlannedMatrix) -> MenuPoint:
    if codec != RAW:
        return get_codec(codec).menu_point(matrix.shape)
    item_bytes = WEIGHT_DTYPES[matrix.dtype].itemsize
    return MenuPoint(RAW, item_bytes * math.prod(matrix.shape), 8.0 * item_bytes, 0.0)


CodedBytes = Callable[[str], int | None]
"""How many bytes the tensor of a name takes when it is coded losslessly; None if it cannot be."""


def planned_kl(tensor: TensorPlan, coefficients: Coefficients, rho: float) -> float:
    """Predicted loss of a planned matrix by these coefficients and this gain, nats per token."""
    if tensor.codec in (RAW, LOSSLESS):
        return 0.0
    codec = get_codec(tensor.codec)
    return predicted_kl(coefficients, codec.distortion(tensor.shape), rho, codec.along(tensor.shape))


def kept_plans(tensors: Inventory, coded_bytes: CodedBytes | None = None) -> tuple[KeptPlan, ...]:
    """The tensors that stay as they are: coded losslessly where that saves bytes, raw without `coded_bytes`."""
    return tuple(_kept_plan(kept, coded_bytes(kept.name) if coded_bytes else None) for kept in tensors.kept)


def _kept_plan(kept: KeptTensor, coded: int | None) -> KeptPlan:
    raw = KeptPlan(kept.name, kept.shape, kept.dtype, KEPT_DTYPES[kept.dtype].itemsize * math.prod(kept.shape))
    return replace(raw, codec=LOSSLESS, size_bytes=coded) if coded is not None and _saves(raw, coded) else raw


def coded_where_smaller(plan: TensorPlan, coded_bytes: CodedBytes) -> TensorPlan:
    """A matrix that is to stay as it is, coded losslessly where that saves bytes; any other as it was planned."""
    if plan.codec != RAW:
        return plan
    raw = KeptPlan(plan.parameter, plan.stored_shape, plan.dtype, plan.size_bytes)
    coded = coded_bytes(plan.name)
    if coded is None or not _saves(raw, coded):
        return plan
    return replace(plan, codec=LOSSLESS, size_bytes=coded, rate_bits=8 * coded / plan.weights)


def _saves(raw: KeptPlan, coded: int) -> bool:
    """Whether it takes fewer bytes coded, its part of the header counted."""
    if coded >= raw.size_bytes:  # often, and quick
        return False
    sizes = [
        spec.size_bytes + reserved_bytes([spec], guard=False)
        for spec in (raw.spec(), kept_spec(raw.name, LOSSLESS, raw.shape, raw.dtype, coded))
    ]
    return sizes[1] < sizes[0]
