"""Does the plan keep its promise? Predicted KL against the KL measured on held-out text.

Uniform and allotted plans from 1 to 6 bits, made and predicted from two probes: other text of the same kind, and text
that the model samples itself. `random` predicts the plans of `self`. Below 2 bits the table shows where the
second-order model ends, and whether `planner.REGIME_KL` is placed right. The last table disturbs one matrix at a time.

Bits are nominal, of the grid's indices; stored bits count scales and padding too. An allotted plan gets the nominal
bits and those of the scales.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.shared.models import (
    UNIFORM_CODECS,
    Measured,
    OpenedModel,
    allotted_plan,
    chunks,
    decoded_copy,
    divergences,
    measure_sensitivity,
    open_model,
    split_windows,
    spread,
    stored_bits,
    uniform_plan,
)
from benchmarks.shared.report import EXAMPLE_MODEL, BenchmarkReport, held_out_text, parse_arguments
from waterfill.files.architecture import Matrix
from waterfill.planning.menu import planned_kl
from waterfill.planning.plan import Plan, TensorPlan
from waterfill.planning.planner import REGIME_KL
from waterfill.planning.sensitivity import Sensitivity

CONTEXT = 512
RATES = (2.0, 3.0, 3.25, 4.0, 5.0, 6.0)
REGIME_RATES = (1.0, 1.25, 1.5, 1.75)
PROMISED = {"text": 0.10, "self": 0.20}  # largest relative deviation of the prediction, by the probe that made it
TENSOR_RATES = (2.0, 3.0, 4.0, 6.0)
COPIES = 12  # of the model in memory at a time


@dataclass(frozen=True)
class PredictionSetup:
    """How much is measured."""

    windows: int
    probe_sequences: int
    rates: tuple[float, ...]
    regime_rates: tuple[float, ...]
    tensor_rates: tuple[float, ...]
    tensor_windows: int


FULL = PredictionSetup(60, 64, RATES, REGIME_RATES, TENSOR_RATES, 30)
QUICK = PredictionSetup(6, 6, (2.0, 3.25), (1.0,), (2.0,), 4)


@dataclass(frozen=True)
class PlannedPoint:
    """One plan, what each probe predicts for it, and what it costs."""

    probe: str  # that made the plan
    shape: str  # uniform or allotted
    bits: float  # nominal
    plan: Plan
    predicted: Mapping[str, float]
    measured: Measured

    @property
    def ratio(self) -> float:
        """Predicted by its own probe, over measured."""
        return self.predicted[self.probe] / self.measured.kl

    @property
    def within(self) -> bool:
        return abs(self.ratio - 1) <= PROMISED[self.probe]


def main() -> None:
    arguments = parse_arguments(__doc__, full={"action": "store_true", "help": "every matrix in the last table"})
    setup = QUICK if arguments.quick else FULL
    torch.manual_seed(0)
    report = BenchmarkReport("prediction against measurement")
    subject = open_model(EXAMPLE_MODEL)
    held_out, probe = split_windows(subject.tokenizer, held_out_text(report), CONTEXT)
    held_out = spread(held_out[: FULL.windows], setup.windows)
    sensitivities = {
        kind: measure_sensitivity(subject, kind, setup.probe_sequences, CONTEXT, probe)
        for kind in ("text", "self", "random")
    }
    report.note(f"{len(held_out)} held-out windows of {CONTEXT} tokens; probes of {setup.probe_sequences} windows")
    points = measure_points(subject, sensitivities, held_out, setup)
    report_points(report, points)
    report_criteria(report, points)
    report_tensors(
        report, subject, sensitivities["text"], spread(held_out, setup.tensor_windows), setup, arguments.full
    )
    report.save(arguments.json)


def measure_points(
    subject: OpenedModel, sensitivities: Mapping[str, Sensitivity], held_out: Tensor, setup: PredictionSetup
) -> list[PlannedPoint]:
    """Every rate, uniform and allotted, planned from `text` and from `self`."""
    plans = []
    for bits in (*setup.regime_rates, *setup.rates):
        for probe in PROMISED:
            uniform = uniform_plan(subject, sensitivities[probe], UNIFORM_CODECS[bits])
            allotted = allotted_plan(subject, sensitivities[probe], stored_bits(subject, bits))
            plans += [(probe, "uniform", bits, uniform), (probe, "allotted", bits, allotted)]
    points = []
    for some in chunks(plans, COPIES):
        copies = [decoded_copy(subject, plan.tensors) for *_, plan in some]
        for (probe, shape, bits, plan), measured in zip(
            some, divergences(subject.model, copies, held_out), strict=True
        ):
            predicted = {kind: predict(plan.tensors, measured_on) for kind, measured_on in sensitivities.items()}
            points.append(PlannedPoint(probe, shape, bits, plan, predicted, measured))
    return points


def predict(tensors: Sequence[TensorPlan], sensitivity: Sensitivity) -> float:
    """KL of a plan by the coefficients of a probe, which need not be the one that made the plan."""
    return sum(planned_kl(tensor, sensitivity.tensors[tensor.name], tensor.rho) for tensor in tensors)


def report_points(report: BenchmarkReport, points: Sequence[PlannedPoint]) -> None:
    columns = ["bits", "plan", "probe", "stored bits", "predicted", "measured", "stderr", "ratio", "ratio of random"]
    rows = [
        [
            point.bits,
            point.shape,
            point.probe,
            point.plan.bits,
            point.predicted[point.probe],
            point.measured.kl,
            point.measured.stderr,
            point.ratio,
            point.predicted["random"] / point.measured.kl,
        ]
        for point in sorted(points, key=lambda point: (point.probe, point.shape, point.bits))
    ]
    report.table("KL in nats per token; ratio = predicted / measured", columns, rows, key="points")


def report_criteria(report: BenchmarkReport, points: Sequence[PlannedPoint]) -> None:
    promised = [point for point in points if point.bits in RATES]
    for probe, goal in PROMISED.items():
        worst = max((abs(point.ratio - 1) for point in promised if point.probe == probe), default=None)
        report.criterion(f"worst_deviation_{probe}", worst, f"<= {goal}", worst is not None and worst <= goal)
    of_random = [point.predicted["random"] / point.measured.kl for point in promised if point.probe == "self"]
    report.results["random_over_measured"] = {"least": min(of_random), "most": max(of_random)}
    for probe in PROMISED:
        own = [point for point in points if point.probe == probe]
        outside = [point.predicted[probe] for point in own if not point.within]
        # The regime must end before the first plan whose measured loss leaves the interval that was promised.
        report.criterion(
            f"first_predicted_kl_outside_{probe}",
            min(outside, default=None),
            f"> {REGIME_KL} (planner.REGIME_KL), or none",
            all(kl > REGIME_KL for kl in outside),
        )
    for probe in PROMISED:
        kl = {point.shape: point.measured.kl for point in promised if (point.probe, point.bits) == (probe, 3.25)}
        ratio = kl["allotted"] / kl["uniform"]
        report.criterion(f"allotted_over_uniform_3.25_bits_{probe}", ratio, "<= 0.6", ratio <= 0.6)


def report_tensors(
    report: BenchmarkReport,
    subject: OpenedModel,
    sensitivity: Sensitivity,
    held_out: Tensor,
    setup: PredictionSetup,
    every: bool,
) -> None:
    """KL/t² of one matrix at a time, with the chosen gain, beside the two-term prediction."""
    matrices = subject.architecture.matrices if every else a_few(subject.architecture.matrices)
    names = {matrix.name for matrix in matrices}
    cases = [
        (bits, tensor)
        for bits in setup.tensor_rates
        for tensor in uniform_plan(subject, sensitivity, UNIFORM_CODECS[bits]).tensors
        if tensor.name in names
    ]
    slopes: dict[str, dict[float, tuple[float, float]]] = {}
    for some in chunks(cases, COPIES):
        copies = [decoded_copy(subject, [tensor]) for _, tensor in some]
        for (bits, tensor), measured in zip(some, divergences(subject.model, copies, held_out), strict=True):
            slopes.setdefault(tensor.name, {})[bits] = tensor.kl / tensor.t2, measured.kl / tensor.t2
    columns = ["tensor", *(f"{what} {bits:g}" for bits in setup.tensor_rates for what in ("predicted", "measured"))]
    rows = [[name, *(value for bits in setup.tensor_rates for value in slope[bits])] for name, slope in slopes.items()]
    report.table(f"KL/t² by bits, one matrix at a time, {len(held_out)} windows", columns, rows, key="tensors")
    ratios = torch.tensor([predicted / measured for slope in slopes.values() for predicted, measured in slope.values()])
    median = float(ratios.median())
    report.note(f"predicted / measured per matrix: {float(ratios.min()):.3f} to {float(ratios.max()):.3f}")
    report.criterion("median_ratio_per_tensor", median, "0.9 to 1.1", 0.9 <= median <= 1.1)


def a_few(matrices: Sequence[Matrix]) -> list[Matrix]:
    """One matrix of every kind (q_proj, up_proj, …), from layers spread over the depth."""
    kinds: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        kinds.setdefault(matrix.name.rpartition(".")[2], []).append(matrix)
    last = max(1, len(kinds) - 1)
    return [group[(len(group) - 1) * at // last] for at, group in enumerate(kinds.values())]


if __name__ == "__main__":
    main()
