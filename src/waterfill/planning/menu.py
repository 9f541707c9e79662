"""What each matrix may be given: one menu entry per codec, with exact bytes, distortion and predicted loss.

All menus list the same codecs in the same order, so that matrices can be tied to one entry; entries that another one
dominates are left to the allocator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal, get_args

from waterfill.base.dtypes import ITEM_BYTES
from waterfill.base.errors import WaterfillError
from waterfill.codecs import GRIDS, LOSSLESS, MENUS, MenuPoint, Rates, get_codec, rates_of
from waterfill.codecs.integers import register_table
from waterfill.files.artifact import RAW
from waterfill.files.artifact.format import is_packed
from waterfill.files.artifact.header import reserved_bytes
from waterfill.planning.allocate import Choice
from waterfill.planning.inventory import Inventory, KeptTensor, PlannedMatrix
from waterfill.planning.loss import Coefficients, Gain, gain_rho, predicted_kl, relative_error
from waterfill.planning.plan import KeptPlan, TensorPlan, kept_spec

CODECS = GRIDS  # what names with wildcards are looked up in
FAST = "fast"  # stands for the grids that the native kernels look up in vector registers
FINE, COARSE = 32, 8  # rates per bit of a menu, up to FINE_RATE and beyond it
FINE_RATE = 6.0
MANY_MATRICES = 4000  # menus are coarse throughout; rates are refined anyhow
Purpose = Literal["storage", "memory"]
PURPOSES: Mapping[Purpose, tuple[str, ...]] = {purpose: MENUS[purpose] for purpose in get_args(Purpose)}


@dataclass(frozen=True)
class Menus:
    """One menu per matrix, in execution order."""

    matrices: tuple[PlannedMatrix, ...]
    coefficients: tuple[Coefficients, ...]
    points: tuple[tuple[MenuPoint, ...], ...]
    choices: tuple[tuple[Choice, ...], ...]
    gain: Gain
    any_rate: frozenset[Rates]  # of codes that may take rates between those of the menu

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
        any_rate=frozenset(filter(None, map(rates_of, codecs or PURPOSES[purpose]))),
    )


def codec_names(
    tensors: Inventory, codecs: Sequence[str] | None = None, purpose: Purpose = "storage"
) -> tuple[str, ...]:
    """What a matrix may be given: `codecs` (names, patterns, "fast", "trellis"), or what serves the purpose and `raw`,
    the matrix as it is.

    `raw` is not offered to mixtures of experts, whose fused parameters cannot be half packed.

    Raises:
        WaterfillError: a codec is unknown or cannot be.
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


def _selected(wanted: Sequence[str], menu: Sequence[str], matrices: int) -> tuple[str, ...]:
    """Codec names, each once: those of the menu that match a pattern or are "fast", others as they are given."""
    names: dict[str, None] = {}
    for name in wanted:
        if name == FAST:
            matching = [codec for codec in menu if _is_fast(codec)]
        elif rates := rates_of(name):
            matching = _names(rates, matrices)
        elif any(c in name for c in "*?["):
            matching = [codec for codec in menu if fnmatchcase(codec, name)]
            if not matching:
                raise WaterfillError(f"no codec matches {name!r}; the menu is {', '.join(menu)}")
        else:
            matching = [name]
        names |= dict.fromkeys(matching)
    return tuple(names)


def _names(rates: Rates, matrices: int) -> list[str]:
    """Of the rates on a menu: all where they are few."""
    fine = COARSE if matrices > MANY_MATRICES else FINE
    if rates.step > 1 / FINE:
        some = [k * rates.step for k in range(math.ceil(rates.least / rates.step), round(rates.most / rates.step) + 1)]
    else:
        middle = min(FINE_RATE, rates.most)
        some = [k / fine for k in range(math.ceil(rates.least * fine), int(middle * fine))]
        some += [k / COARSE for k in range(int(middle * COARSE), int(rates.most * COARSE) + 1)]
    return [rates.pattern.format(rate) for rate in some]


def _is_fast(name: str) -> bool:
    if not is_packed(name):
        return False
    codec = get_codec(name)
    return codec.memory is codec and register_table(codec.memory)


def _point(codec: str, matrix: PlannedMatrix) -> MenuPoint:
    if codec != RAW:
        return get_codec(codec).menu_point(matrix.shape)
    item_bytes = ITEM_BYTES[matrix.dtype]
    return MenuPoint(RAW, item_bytes * math.prod(matrix.shape), 8.0 * item_bytes, 0.0)


CodedBytes = Callable[[str], int | None]
"""How many bytes the tensor of a name takes when it is coded losslessly; None if it cannot be."""


def planned_kl(tensor: TensorPlan, coefficients: Coefficients, rho: float) -> float:
    """Predicted loss of a planned matrix by these coefficients and this gain, nats per token."""
    if not tensor.packed:
        return 0.0
    codec = get_codec(tensor.codec)
    return predicted_kl(coefficients, codec.distortion(tensor.shape), rho, codec.along(tensor.shape))


def kept_plans(tensors: Inventory, coded_bytes: CodedBytes | None = None) -> tuple[KeptPlan, ...]:
    """The tensors that stay as they are: coded losslessly where that saves bytes, raw without `coded_bytes`."""
    return tuple(_kept_plan(kept, coded_bytes(kept.name) if coded_bytes else None) for kept in tensors.kept)


def _kept_plan(kept: KeptTensor, coded: int | None) -> KeptPlan:
    raw = KeptPlan(kept.name, kept.shape, kept.dtype, ITEM_BYTES[kept.dtype] * math.prod(kept.shape))
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
