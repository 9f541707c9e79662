"""What each matrix may be given: one menu entry per codec, with exact bytes, distortion and predicted loss.

All menus list the same codecs in the same order, so that matrices can be tied to one entry; entries that another one
dominates are left to the allocator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from typing import Literal, TypeAlias, get_args

import numpy as np

from waterfill.base.dtypes import ITEM_BYTES
from waterfill.base.errors import WaterfillError
from waterfill.codecs import GRIDS, LOSSLESS, MENUS, MenuPoint, Rates, get_codec, rates_of
from waterfill.files.artifact import RAW
from waterfill.files.artifact.format import is_packed
from waterfill.files.artifact.header import reserved_bytes
from waterfill.planning.allocate import ChoiceTable
from waterfill.planning.inventory import Inventory, KeptTensor, PlannedMatrix
from waterfill.planning.loss import Coefficients, Floats, Gain, gain_rho, predicted_kl, predicted_kls, relative_error
from waterfill.planning.plan import KeptPlan, TensorPlan, kept_spec
from waterfill.planning.speed import Timing

CODECS = GRIDS  # what names with wildcards are looked up in
FAST = "fast"  # stands for the grids whose tables fit the vector registers of every instruction set
FINE, COARSE = 32, 8  # rates per bit of a menu, up to FINE_RATE and beyond it
FINE_RATE = 6.0
MANY_MATRICES = 4000  # menus are coarse throughout; rates are refined anyhow
Menu: TypeAlias = tuple[MenuPoint, ...]
Purpose = Literal["storage", "memory", "stream"]
PURPOSES: Mapping[Purpose, tuple[str, ...]] = {purpose: MENUS[purpose] for purpose in get_args(Purpose)}


@dataclass(frozen=True, eq=False)
class Menus:
    """One menu per matrix, in execution order; all of one length, and one for all matrices of a shape and dtype."""

    matrices: tuple[PlannedMatrix, ...]
    coefficients: tuple[Coefficients, ...]
    rho: tuple[float, ...]  # gains
    points: tuple[Menu, ...]
    any_rate: frozenset[Rates]  # of codes that may take rates between those of the menu
    timing: Timing | None = None  # None: time does not matter
    uses: Floats | None = None  # [matrices], products per token, as of the timing

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

    @cached_property
    def choices(self) -> ChoiceTable:
        """Bytes and losses of every menu, and times where they matter."""
        size, loss, time = np.empty((3, len(self.matrices), len(self.points[0])))
        for points, some in _alike(self.points).values():
            size[some], loss[some] = [point.size_bytes for point in points], self.losses(some, points)
            if self.timing is not None and self.uses is not None:
                units = self.timing.units([point.codec for point in points], self.matrices[some[0]].shape)
                time[some] = np.rint(self.uses[some, None] * units)
        return ChoiceTable(size, loss, None if self.timing is None else time)

    def losses(self, some: Sequence[int], points: Sequence[MenuPoint]) -> Floats:
        """Predicted losses of matrices, given by their indices, at all of these points: float64 `[matrices, points]`,
        nats per token."""
        t2, along = _noise(points)
        alpha, beta, rho = self._costs[:, some, None]
        return predicted_kls(alpha, beta, t2, rho, along)

    def loss(self, points: Sequence[MenuPoint]) -> float:
        """Predicted loss of the model with these points, one for each matrix, nats per token."""
        t2, along = _noise(points)
        alpha, beta, rho = self._costs
        return math.fsum(predicted_kls(alpha, beta, t2, rho, along).tolist())

    @cached_property
    def _costs(self) -> Floats:
        """alpha, beta and rho, float64 `[3, matrices]`."""
        return np.array([(c.alpha, c.beta, rho) for c, rho in zip(self.coefficients, self.rho, strict=True)]).T

    def _tensor(self, i: int, point: MenuPoint) -> TensorPlan:
        matrix, c, rho = self.matrices[i], self.coefficients[i], self.rho[i]
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
    timing: Timing | None = None,
) -> Menus:
    """Menus of all matrices, of the codecs that `codec_names` finds; with times where there is a `timing`."""
    matrices = tuple(tensors.matrices)
    names = codec_names(tensors, codecs, purpose, timed=timing is not None)
    if not matrices:
        raise WaterfillError("no matrix of the model is left to be packed; keep fewer tensors")
    missing = [matrix.name for matrix in matrices if matrix.name not in coefficients]
    if missing:
        raise WaterfillError(
            f"the sensitivities lack {len(missing)} matrices of the model, such as {missing[0]}; "
            "measure them for this model with the same --keep"
        )
    menu_of = lru_cache(maxsize=None)(lambda shape, dtype: tuple(_point(name, shape, dtype) for name in names))
    of_matrices = tuple(coefficients[matrix.name] for matrix in matrices)
    return Menus(
        matrices=matrices,
        coefficients=of_matrices,
        rho=tuple(gain_rho(gain, c) for c in of_matrices),
        points=tuple(menu_of(matrix.shape, matrix.dtype) for matrix in matrices),
        any_rate=frozenset(filter(None, map(rates_of, codecs or PURPOSES[purpose]))),
        timing=timing,
        uses=None if timing is None else timing.uses(matrices, coefficients),
    )


def _alike(points: Sequence[Menu]) -> dict[int, tuple[Menu, list[int]]]:
    """Every menu once, with the indices of the matrices that have it."""
    by_menu: dict[int, tuple[Menu, list[int]]] = {}
    for i, menu in enumerate(points):
        by_menu.setdefault(id(menu), (menu, []))[1].append(i)
    return by_menu


def _noise(points: Sequence[MenuPoint]) -> Floats:
    """t2 and along, float64 `[2, points]`."""
    return np.array([(point.t2, point.along) for point in points]).T


def codec_names(
    tensors: Inventory, codecs: Sequence[str] | None = None, purpose: Purpose = "storage", *, timed: bool = False
) -> tuple[str, ...]:
    """What a matrix may be given: `codecs` (names, patterns, "fast", "bitshift", "trellis"), or what serves the purpose
    and `raw`, the matrix as it is.

    `raw` is not offered to mixtures of experts, whose fused parameters cannot be half packed, nor where choices are
    `timed`: what is not packed cannot be streamed, and its products are not timed.

    Raises:
        WaterfillError: a codec is unknown or cannot be.
    """
    fused = any(matrix.role == "expert" for matrix in tensors.matrices)
    raw = () if fused or timed else (RAW,)
    wanted = tuple(codecs or (*PURPOSES[purpose], *raw))
    names = _selected(wanted, (*CODECS, *raw), len(tensors.matrices))
    if fused and RAW in names:
        raise WaterfillError("a fused parameter cannot be packed in part, so experts cannot be raw; keep them instead")
    if timed and RAW in names:
        raise WaterfillError("a matrix that is kept raw has no speed to plan by; leave raw out, or --keep the matrix")
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
    return codec.memory is codec and codec.memory.in_registers()


def _point(codec: str, shape: tuple[int, int], dtype: str) -> MenuPoint:
    if codec != RAW:
        return get_codec(codec).menu_point(shape)
    item_bytes = ITEM_BYTES[dtype]
    return MenuPoint(RAW, item_bytes * math.prod(shape), 8.0 * item_bytes, 0.0)


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
