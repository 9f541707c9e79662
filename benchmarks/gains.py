"""Three gains, two families: MSE scales, block-exact unbiased ones, and those chosen from α and β.

Uniform plans from 2 to 6 bits, and plans allotted within the same bits, with each gain for the same codecs; predicted
and measured on held-out text. The chosen gain must never cost more than 3 % over the better of the other two: on the
example Llama, and on a small GPT-2 that this script trains (minutes, once; it is kept in the cache folder). The last
column is what the MSE scale costs with the allotment that its own prediction leads to.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.shared.models import (
    UNIFORM_CODECS,
    Measured,
    allotted_plan,
    decoded_copy,
    divergences,
    measure_sensitivity,
    open_model,
    split_windows,
    stored_bits,
    uniform_plan,
)
from benchmarks.shared.report import EXAMPLE_MODEL, BenchmarkReport, held_out_text, parse_arguments
from benchmarks.shared.small_gpt2 import QUICK, Training, small_gpt2
from waterfill.planning.loss import GAINS, Gain, gain_rho
from waterfill.planning.menu import planned_kl
from waterfill.planning.plan import Plan
from waterfill.planning.sensitivity import Sensitivity

RATES = (2.0, 3.0, 3.25, 4.0, 5.0, 6.0)
QUICK_RATES = (2.0, 4.0)
MARGIN = 0.03


def main() -> None:
    arguments = parse_arguments(__doc__)
    torch.manual_seed(0)
    report = BenchmarkReport("the three gains")
    text = held_out_text(report)
    measure_family(report, "llama", EXAMPLE_MODEL, text, context=512, quick=arguments.quick)
    trained = small_gpt2(QUICK if arguments.quick else Training())
    measure_family(report, "gpt2", trained, text, context=256, quick=arguments.quick)
    report.save(arguments.json)


def measure_family(report: BenchmarkReport, family: str, path: Path, text: Path, *, context: int, quick: bool) -> None:
    """KL of every gain at every rate; the criterion of this family."""
    subject = open_model(path)
    held_out, _ = split_windows(subject.tokenizer, text, context)
    held_out = held_out[: 2048 // context if quick else 60 * 512 // context]
    sequences = 4 if quick else 32
    sensitivity = measure_sensitivity(subject, "self", sequences, context)
    rows, excesses = [], []
    for bits in QUICK_RATES if quick else RATES:
        uniform = {gain: uniform_plan(subject, sensitivity, UNIFORM_CODECS[bits], gain) for gain in GAINS}
        stored = stored_bits(subject, bits)
        allotment = allotted_plan(subject, sensitivity, stored)
        allotted = {gain: regained(allotment, sensitivity, gain) for gain in GAINS}
        own = {"uniform": uniform["mse"], "allotted": allotted_plan(subject, sensitivity, stored, "mse")}
        for shape, plans in (("uniform", uniform), ("allotted", allotted)):
            copies = [decoded_copy(subject, plan.tensors) for plan in (*plans.values(), own[shape])]
            *same, mse_own = divergences(subject.model, copies, held_out)
            measured = dict(zip(plans, same, strict=True))
            better = min(measured[gain].kl for gain in ("mse", "unbiased"))
            excesses.append(measured["auto"].kl / better - 1)
            rows.append([bits, shape, plans["auto"].bits, *figures(plans, measured), excesses[-1], mse_own.kl])
    ratios = [f"{gain} ratio" for gain in GAINS]
    columns = ["bits", "plan", "stored bits", *GAINS, *ratios, "auto over better", "mse, own plan"]
    title = f"{family}: measured KL, and predicted / measured (probe self), {len(held_out)} windows of {context}"
    report.table(title, columns, rows, key=family)
    worst = max(excesses)
    report.criterion(f"chosen_over_better_{family}", worst, f"<= {MARGIN}", worst <= MARGIN)


def regained(plan: Plan, sensitivity: Sensitivity, gain: Gain) -> Plan:
    """The same codecs with another gain."""
    tensors = []
    for tensor in plan.tensors:
        if tensor.packed:
            c = sensitivity.tensors[tensor.name]
            rho = gain_rho(gain, c)
            tensor = replace(tensor, rho=rho, kl=planned_kl(tensor, c, rho))
        tensors.append(tensor)
    predicted = replace(plan.predicted, kl=math.fsum(tensor.kl for tensor in tensors))
    return replace(plan, gain=gain, tensors=tuple(tensors), predicted=predicted)


def figures(plans: dict[str, Plan], measured: dict[str, Measured]) -> list[float]:
    """Measured KL of every gain, then predicted over measured of every gain."""
    return [measured[gain].kl for gain in GAINS] + [plans[gain].predicted.kl / measured[gain].kl for gain in GAINS]


if __name__ == "__main__":
    main()
