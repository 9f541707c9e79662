"""Can quantised weights be compressed, and is that the way to small files? Entropy, real coders, KL at stored bytes.

Every matrix of the example model is quantised by each method, without and with a Hadamard rotation where that changes
anything. Its codes are then coded by Huff0, rANS, zstd and lz4, its scales too, and the KL of the model is measured:
lossless coding moves a method to the left in the plot, never down. Beside them the joint design: the entropy-coded
trellis, all matrices at one rate, and with rates allotted by sensitivities.

    --page FILE     write the page (docs/compressibility.md) from what was measured
    --figure FILE   draw KL over stored bytes, where matplotlib is installed
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.compressibility.coders import entropy_bits, installed
from benchmarks.compressibility.page import draw, write_page
from benchmarks.compressibility.quantisers import Quantised, Quantiser, quantisers
from benchmarks.shared.models import (
    Measured,
    OpenedModel,
    chunks,
    divergences,
    measure_sensitivity,
    open_model,
    split_windows,
    spread,
)
from benchmarks.shared.report import EXAMPLE_MODEL, REPOSITORY, BenchmarkReport, held_out_text, machine, parse_arguments
from waterfill.codecs import get_codec, scale_exponent
from waterfill.planning.budget import Budget
from waterfill.planning.costs import matrix_view
from waterfill.planning.loss import gain_rho
from waterfill.planning.plan import TensorPlan
from waterfill.planning.planner import Request, make_plan
from waterfill.planning.sensitivity import Sensitivity

CONTEXT = 512
WINDOWS, QUICK_WINDOWS = 24, 2
PROBE, QUICK_PROBE = 64, 4
TABLE_BITS, CURVE_BITS = (8, 4), (6, 5, 3)  # of INT: in tables and plot; in the plot only
SHOWN = ("INT8", "INT4", "NF4", "Q4_0", "HIGGS")  # in tables
QUICK_METHODS = ("INT4 row", "NF4 g64", "HIGGS p2-n64")
RATES, QUICK_RATES = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0), (2.0, 4.0)
COPIES = 8  # of the model in memory at a time
UNIFORM, ALLOTTED = "trellis, one rate", "trellis, allotted"
FIGURE = REPOSITORY / "docs" / "images" / "compressibility.png"


@dataclass
class Sizes:
    """Bytes of all matrices together."""

    weights: int = 0
    codes: int = 0  # packed
    scales: int = 0
    entropy: float = 0.0  # of the codes, matrix by matrix
    scale_coded: int = 0  # by the coder of the three that does best, or as they are
    by_coder: dict[str, int] | None = None  # codes and scales, each as they are where that is shorter

    @property
    def stored(self) -> int:
        return self.codes + self.scales


@dataclass(frozen=True)
class RatePoint:
    """One method at one setting."""

    name: str
    size_bytes: int  # as stored
    best_bytes: int  # after the best lossless coder
    best_coder: str
    measured: Measured


def main() -> None:
    arguments = parse_arguments(
        __doc__,
        page={"type": Path, "metavar": "FILE"},
        figure={"type": Path, "metavar": "FILE", "nargs": "?", "const": FIGURE},
    )
    quick = arguments.quick
    report = BenchmarkReport("compressibility of quantised weights")
    subject = open_model(EXAMPLE_MODEL)
    held_out, probe = split_windows(subject.tokenizer, held_out_text(report), CONTEXT)
    held_out = spread(held_out[:60], QUICK_WINDOWS if quick else WINDOWS)
    sensitivity = measure_sensitivity(subject, "text", QUICK_PROBE if quick else PROBE, CONTEXT, probe)
    report.results["text"] = f"on {len(held_out)} windows of {CONTEXT} tokens"
    report.results["weights"] = sum(math.prod(matrix.shape) for matrix in subject.architecture.matrices)
    report.note(f"KL {report.results['text']}; bytes are those of the matrices")
    methods = quantisers(TABLE_BITS, CURVE_BITS)
    if quick:
        methods = {name: methods[name] for name in QUICK_METHODS}
    points = measure_methods(report, subject, sensitivity, held_out, methods)
    joint = measure_joint(report, subject, sensitivity, held_out, QUICK_RATES if quick else RATES)
    compare(report, points, joint)
    if arguments.figure and find_spec("matplotlib"):
        draw(points, joint, arguments.figure)
        report.note(f"figure: {arguments.figure.name}")
    if arguments.page:
        write_page(report.results, machine(), arguments.page)
        report.note(f"page: {arguments.page.name}")
    report.save(arguments.json)


# Methods of fixed rate


def measure_methods(
    report: BenchmarkReport,
    subject: OpenedModel,
    sensitivity: Sensitivity,
    held_out: Tensor,
    methods: Mapping[str, Quantiser],
) -> list[RatePoint]:
    """Sizes and loss of every method; the table of sizes."""
    points, rows = [], []
    for some in chunks(list(methods.items()), COPIES):
        copies, sizes = [], []
        for _, quantiser in some:
            model, size = quantised_copy(subject, sensitivity, quantiser)
            copies.append(model)
            sizes.append(size)
        losses = divergences(subject.model, copies, held_out)
        for (name, _), size, loss in zip(some, sizes, losses, strict=True):
            assert size.by_coder is not None
            coder = min(size.by_coder, key=lambda coder: size.by_coder[coder])
            best = min(size.by_coder[coder], size.stored)
            points.append(RatePoint(name, size.stored, best, coder if best < size.stored else "none", loss))
            rows.append(size_row(name, size, best))
    columns = ["method", "stored", "codes", "entropy", "scales", "scales coded", *installed(), "saved by the best"]
    shown = [row for row in rows if row[0].startswith(SHOWN)]
    report.table("bits per weight: as stored, and coded with the scales", columns, shown, key="sizes")
    return points


def size_row(name: str, size: Sizes, best: int) -> list[Any]:
    def bits(size_bytes: float) -> float:
        return round(8 * size_bytes / size.weights, 4)

    assert size.by_coder is not None
    row = [name, *map(bits, (size.stored, size.codes, size.entropy / 8, size.scales, size.scale_coded))]
    return [*row, *map(bits, size.by_coder.values()), f"{1 - best / size.stored:.1%}"]


@torch.no_grad()
def quantised_copy(subject: OpenedModel, sensitivity: Sensitivity, quantiser: Quantiser) -> tuple[Any, Sizes]:
    """A copy of the model with every matrix as the method gives it back, and what it stores."""
    total = Sizes(by_coder=dict.fromkeys(installed(), 0))

    def put(name: str, weight: Tensor) -> Tensor:
        found = quantiser(weight, gain_rho("auto", sensitivity.tensors[name]))
        add_sizes(total, found)
        return found.weight

    return changed_copy(subject, put), total


def changed_copy(subject: OpenedModel, put: Callable[[str, Tensor], Tensor]) -> Any:
    """A copy of the model whose matrices are what `put(name, matrix)` returns."""
    result = copy.deepcopy(subject.model)
    parameters = dict(result.named_parameters())
    for matrix in subject.architecture.matrices:
        weight = matrix_view(parameters[matrix.parameter], matrix)
        weight.copy_(put(matrix.name, weight.contiguous()))
    return result


def add_sizes(total: Sizes, found: Quantised) -> None:
    """Codes and scales are coded apart, or whole where a format mixes them; each as it is where that is shorter."""
    assert total.by_coder is not None
    total.weights += found.weight.numel()
    total.codes += len(found.packed)
    total.scales += len(found.scales)
    total.entropy += entropy_bits(found.codes)
    planes = found.scales[0::2], found.scales[1::2]  # mantissas; signs and exponents
    least_scales = len(found.scales)
    for name, coder in installed().items():
        parts = [found.scales] if coder.packed else planes
        scales = min(sum(coder.size(np.ascontiguousarray(part)) for part in parts), len(found.scales))
        codes = min(coder.size(found.packed if coder.packed else found.codes), len(found.packed))
        if coder.packed and found.mixed is not None:
            total.by_coder[name] += min(coder.size(found.mixed), len(found.mixed))
        else:
            total.by_coder[name] += codes + scales
        least_scales = min(least_scales, scales)
    total.scale_coded += least_scales


# The joint design


def measure_joint(
    report: BenchmarkReport, subject: OpenedModel, sensitivity: Sensitivity, held_out: Tensor, rates: Sequence[float]
) -> dict[str, list[RatePoint]]:
    """The trellis at several rates: {how rates are given: points}."""
    joint: dict[str, list[RatePoint]] = {}
    for what, uniform in ((UNIFORM, True), (ALLOTTED, False)):
        points = []
        for some in chunks(rates, COPIES):
            plans = [trellis_plan(subject, sensitivity, rate, uniform) for rate in some]
            copies = [trellis_copy(subject, plan) for plan in plans]
            for plan, loss in zip(plans, divergences(subject.model, copies, held_out), strict=True):
                size_bytes = sum(tensor.size_bytes for tensor in plan)
                points.append(RatePoint(what, size_bytes, size_bytes, "rANS", loss))
        weights = sum(tensor.weights for tensor in plan)
        rows = [
            [8 * point.size_bytes / weights, point.size_bytes, point.measured.kl, point.measured.stderr]
            for point in points
        ]
        columns = ["bits", "bytes", "KL", "stderr"]
        report.table(f"the joint design: {what}", columns, rows, key=what.replace(", ", "_").replace(" ", "_"))
        joint[what] = points
    return joint


def trellis_plan(subject: OpenedModel, sensitivity: Sensitivity, rate: float, uniform: bool) -> tuple[TensorPlan, ...]:
    budget, request = Budget(bits=rate), Request(uniform=uniform, codecs=("trellis",))
    return make_plan(subject.name, subject.architecture, sensitivity, budget, request).tensors


@torch.no_grad()
def trellis_copy(subject: OpenedModel, plan: Sequence[TensorPlan]) -> Any:
    tensors = {tensor.name: tensor for tensor in plan}

    def put(name: str, weight: Tensor) -> Tensor:
        tensor = tensors[name]
        codec = get_codec(tensor.codec)
        exponent = scale_exponent(float(weight.abs().max()))
        return codec.decode(codec.encode(weight, exponent=exponent, rho=tensor.rho))

    return changed_copy(subject, put)


# At equal KL


def compare(report: BenchmarkReport, points: Sequence[RatePoint], joint: Mapping[str, Sequence[RatePoint]]) -> None:
    """Bytes of each method, stored and coded, beside those of the joint design with the same KL."""
    rows, ratios = [], {}
    for point in points:
        if not point.name.startswith(SHOWN):
            continue
        equal = [bytes_at(joint[what], point.measured.kl) for what in (UNIFORM, ALLOTTED)]
        shares = [None if size is None else size / point.best_bytes for size in equal]
        ratios[point.name] = shares[1]
        row = [
            point.name,
            point.measured.kl,
            point.measured.stderr,
            point.size_bytes,
            point.best_bytes,
            point.best_coder,
        ]
        rows.append([*row, *(None if size is None else round(size) for size in equal), *shares])
    columns = ["method", "KL", "stderr", "stored bytes", "best coded", "by", f"{UNIFORM}, at that KL"]
    columns += [f"{ALLOTTED}, at that KL", "one rate / coded", "allotted / coded"]
    report.table("at equal KL", columns, rows, key="equal_kl")
    known = {name: ratio for name, ratio in ratios.items() if ratio is not None}
    worst = max(known, key=lambda name: known[name])
    report.results["largest_ratio"] = {"method": worst, "ratio": known[worst]}
    report.criterion("joint_design_over_best_coded_bytes_at_equal_kl", known[worst], "< 1", known[worst] < 1)


def bytes_at(curve: Sequence[RatePoint], kl: float) -> float | None:
    """Bytes at which the curve has that KL, log KL being taken as linear in bytes; None outside it."""
    kls, sizes = np.array(sorted((point.measured.kl, point.size_bytes) for point in curve)).T
    return float(np.interp(np.log(kl), np.log(kls), sizes)) if kls[0] <= kl <= kls[-1] else None


if __name__ == "__main__":
    main()
