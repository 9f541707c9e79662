"""Make the plan: menus from codecs and sensitivities, an allocation under the budget, the predicted loss.

    inventory + sensitivity ──► one menu per matrix ──► allocate ──► Plan

A byte budget counts whole files, headers included, and headers depend a little on what is chosen; so the budget for the
matrices is what the last choice's headers leave, until that settles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from types import MappingProxyType

from waterfill.base.errors import WaterfillError
from waterfill.codecs.feedback import Left
from waterfill.files.artifact import SHARD_BYTES, lay_out
from waterfill.planning.allocate import Allocation, certificate
from waterfill.planning.budget import Budget
from waterfill.planning.evidence import weigh
from waterfill.planning.inventory import Inventory
from waterfill.planning.loss import Coefficients, Gain
from waterfill.planning.menu import (
    CodedBytes,
    Menus,
    Purpose,
    coded_where_smaller,
    kept_plans,
    make_menus,
    planned_kl,
)
from waterfill.planning.plan import UNPROMISED, Calibration, Plan, Prediction, TensorPlan
from waterfill.planning.precision import sampling_error
from waterfill.planning.sensitivity import Sensitivity
from waterfill.planning.solver import Solver
from waterfill.planning.speed import Speed, Timing
from waterfill.planning.trials import error_of_trials, factor, tried, uncorrected

# Past this predicted loss the second-order model under-states the measured one (docs/results/prediction.md).
REGIME_KL = 0.1
# Systematic error of the prediction by probe (docs/results/prediction.md), as factors on the predicted loss.
MARGINS = {"self": (0.8, 1.2), "text": (0.9, 1.1), "random": (0.3, 1.2)}
EVERYTHING = ("*",)  # patterns of what a lossless plan keeps
MOST_NLL = 700.0  # whose perplexity is still a number


@dataclass(frozen=True)
class Request:
    """What the user asks of a plan, beside the model and the budget."""

    gain: Gain = "auto"
    keep: tuple[str, ...] = ()
    ties: tuple[str, ...] = ()  # each "PATTERN,PATTERN": matching matrices of one parent module share a codec
    uniform: bool = False  # one codec for all matrices
    codecs: tuple[str, ...] = ()  # the menu; what serves the purpose, and raw, when empty
    purpose: Purpose = "storage"
    shard_bytes: int = SHARD_BYTES

    def timed(self, budget: Budget) -> bool:
        """Whether choices are made by the time that they take."""
        return self.purpose == "stream" or budget.speed is not None


USUAL = Request()


def make_plan(
    model: str,
    tensors: Inventory,
    sensitivity: Sensitivity,
    budget: Budget,
    request: Request = USUAL,
    coded_bytes: CodedBytes | None = None,
    calibration: Calibration | None = None,
    left: Mapping[str, Left] = MappingProxyType({}),
    timing: Timing | None = None,
) -> Plan:
    """The plan of least predicted loss within the budget. With `coded_bytes`, what stays as it is is coded losslessly
    where that saves bytes; matrices that a generous budget leaves as they are, after the budget has been divided. With
    a `calibration`, errors of the matrices that are named in `left` are fed back; the plan has it if any are. With a
    `timing` the plan says how fast it is, and where a speed is asked for, or weights are streamed, is made by it.

    Raises:
        BudgetError: nothing fits; the message names the smallest and the largest feasible budget.
        WaterfillError: no matrix is left to pack, the sensitivities lack one, or a tie cannot be.
    """
    left = _with_look_ups(left, sensitivity)
    sensitivity = sensitivity.after_feedback({name: share.loss for name, share in left.items()})
    evidence = weigh(tensors.matrices, sensitivity.tensors, sensitivity.tokens)
    coefficients = {name: entry.coefficients for name, entry in evidence.items()}
    assert timing is not None or budget.speed is None
    by_speed = timing if request.timed(budget) else None  # else a plan is the same on every machine
    menus = make_menus(tensors, coefficients, request.gain, request.codecs, request.purpose, by_speed)
    ties = _ties(menus, request)
    if budget.max_kl is not None:
        budget = replace(budget, max_kl=uncorrected(sensitivity.trials, budget.max_kl))
    solver = Solver(menus, kept_plans(tensors, coded_bytes), ties, budget, request.shard_bytes, by_speed)
    allocation = solver.solve()
    planned = solver.refined(allocation)
    if coded_bytes is not None:
        planned = tuple(coded_where_smaller(tensor, coded_bytes) for tensor in planned)
    planned = tuple(replace(t, measured=evidence[t.name].measured, like=evidence[t.name].like) for t in planned)
    predicted = predict(planned, sensitivity)
    optimal = _how_good(allocation, planned, menus.tensors(allocation.choices), predicted.factor)
    planned = tuple(_fed_back(tensor, left.get(tensor.name)) for tensor in planned)
    planned = tuple(replace(tensor, kl=tensor.kl * predicted.factor) for tensor in planned)
    return Plan(
        model=model,
        fingerprint=sensitivity.fingerprint,
        budget={key: value for key, value in vars(budget).items() if value is not None},
        gain=request.gain,
        probe={"method": sensitivity.method, **sensitivity.probe},
        keep=request.keep,
        shard_bytes=request.shard_bytes,
        size_bytes=solver.bytes_of(planned),
        bits=8 * sum(tensor.size_bytes for tensor in planned) / menus.weights,
        predicted=predicted,
        tensors=planned,
        kept=solver.kept,
        optimal=optimal,
        calibration=calibration if any(tensor.feedback is not None for tensor in planned) else None,
        speed=None if timing is None else _speed(planned, timing, coefficients),
    )


def _speed(tensors: Sequence[TensorPlan], timing: Timing, coefficients: Mapping[str, Coefficients]) -> Speed | None:
    codecs, shapes = [tensor.codec for tensor in tensors], [tensor.shape for tensor in tensors]
    return timing.claim(codecs, shapes, timing.uses(tensors, coefficients))


def _with_look_ups(left: Mapping[str, Left], sensitivity: Sensitivity) -> dict[str, Left]:
    """Shares of all that matrices cost, looked up too; of those that gain by feedback."""
    if sensitivity.probe.get("kind") in UNPROMISED:  # its alphas are of another unit, and say nothing of look-ups
        return dict(left)
    whole = {name: one._replace(loss=one.share_of(sensitivity.tensors[name].alpha)) for name, one in left.items()}
    return {name: one for name, one in whole.items() if one.loss < 1}


def _fed_back(tensor: TensorPlan, left: Left | None) -> TensorPlan:
    if left is None or not tensor.packed:
        return tensor
    return replace(tensor, feedback=left.loss, t2=tensor.t2 * left.noise)


def make_lossless_plan(
    model: str, tensors: Inventory, fingerprint: str, coded_bytes: CodedBytes, shard_bytes: int = SHARD_BYTES
) -> Plan:
    """The plan that keeps every bit, of a model all of whose tensors are kept (`EVERYTHING`)."""
    kept = kept_plans(tensors, coded_bytes)
    return Plan(
        model=model,
        fingerprint=fingerprint,
        budget={"lossless": True},
        gain="auto",
        probe={"method": "none"},
        keep=EVERYTHING,
        shard_bytes=shard_bytes,
        size_bytes=lay_out([tensor.spec() for tensor in kept], shard_bytes=shard_bytes).size_bytes,
        bits=8 * sum(tensor.size_bytes for tensor in kept) / sum(math.prod(tensor.shape) for tensor in kept),
        predicted=Prediction(kl=0.0, kl_low=0.0, kl_high=0.0, ppl=None, ppl_reference=None, in_regime=True),
        tensors=(),
        kept=kept,
        optimal="lossless: nothing was to be decided",
    )


def predict(tensors: Sequence[TensorPlan], sensitivity: Sensitivity) -> Prediction:
    """Sum of the tensors' losses, corrected by what a plan like it lost when it was tried; the interval joins the
    probe's margin and its sampling error.

    Nothing is promised where nothing was measured on this model.
    Where tensors were hardly measured, it also spans what the measurement alone says and what was assumed.
    """
    total = math.fsum(tensor.kl for tensor in tensors)
    if sensitivity.probe.get("kind") in UNPROMISED:
        return Prediction(kl=total, kl_low=0.0, kl_high=None, ppl=None, ppl_reference=None, in_regime=False)
    alone = math.fsum(
        tensor.kl if tensor.measured == 1 else planned_kl(tensor, sensitivity.tensors[tensor.name], tensor.rho)
        for tensor in tensors
    )
    trials, by = sensitivity.trials, factor(sensitivity.trials, alone)  # which reach no more than what was measured
    error = by * (alone * error_of_trials(trials) if trials else sampling_error(tensors, sensitivity))
    within = tried(trials, alone)
    kl, alone = by * total, by * alone
    low, high = MARGINS.get(str(sensitivity.probe.get("kind")), MARGINS["random"])
    in_regime = within or kl <= REGIME_KL
    return Prediction(
        kl=kl,
        kl_low=max(0.0, min(kl, alone) * low - error),
        kl_high=max(kl, alone) * high + error if in_regime else None,
        ppl=math.exp(min(sensitivity.nll + kl, MOST_NLL)),
        ppl_reference=math.exp(min(sensitivity.nll, MOST_NLL)),
        in_regime=in_regime,
        assumed_kl=kl - alone,
        sampling_error=error,
        factor=by,
        tried=max((len(trial.kl) for trial in trials), default=0),
    )


def _how_good(
    allocation: Allocation, tensors: Sequence[TensorPlan], of_menu: Sequence[TensorPlan], corrected: float
) -> str:
    """The solver's certificate, unless rates were moved off the menu afterwards."""
    if [t.codec for t in tensors] == [t.codec for t in of_menu]:
        return certificate(replace(allocation, loss=corrected * allocation.loss, bound=corrected * allocation.bound))
    loss = corrected * math.fsum(tensor.kl for tensor in tensors)
    return f"one more byte would save the same in every entropy-coded matrix: {loss:.6g} nats per token"


def _ties(menus: Menus, request: Request) -> tuple[tuple[int, ...], ...]:
    """Groups of matrices that share one codec: all of them, or those that a tie pattern names within one module."""
    names = [matrix.name for matrix in menus.matrices]
    if request.uniform:
        return (tuple(range(len(names))),)
    groups: dict[tuple[str, str], list[int]] = {}
    tied: dict[int, str] = {}
    for tie in dict.fromkeys(request.ties):
        patterns = tie.split(",")
        for i, name in enumerate(names):
            if any(fnmatchcase(name, pattern.strip()) for pattern in patterns):
                if tied.setdefault(i, tie) != tie:
                    raise WaterfillError(f"--tie {tied[i]!r} and --tie {tie!r} both match {name}; join them into one")
                groups.setdefault((tie, name.rpartition(".")[0]), []).append(i)
        if not any(key[0] == tie and len(group) > 1 for key, group in groups.items()):
            raise WaterfillError(
                f"--tie {tie!r} matches no two matrices of one module; give patterns such as "
                "'*.q_proj,*.k_proj,*.v_proj'"
            )
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)
