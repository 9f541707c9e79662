"""Three gains, two families: MSE scales, block-exact unbiased ones, and those chosen from α and β.

Uniform plans from 2 to 6 bits, and plans allotted within the same bits, with each gain; predicted and measured
on held-out text. The chosen gain must never cost more than 3 % over the better of the other two: on the example Llama,
and on a small GPT-2 that this script trains (minutes, once; it is kept in the cache folder).
"""

from __future__ import annotations

from pathlib import Path

import torch

from common import EXAMPLE_MODEL, Report, held_out_text, parse_arguments
from models import (
    UNIFORM_CODECS,
    Measured,
    allotted_plan,
    decoded_copy,
    divergences,
    measure_sensitivity,
    open_subject,
    split_windows,
    stored_bits,
    uniform_plan,
)
from small_gpt2 import QUICK, Training, small_gpt2
from waterfill.loss import GAINS
from waterfill.plan import Plan

RATES = (2.0, 3.0, 3.25, 4.0, 5.0, 6.0)
QUICK_RATES = (2.0, 4.0)
MARGIN = 0.03


def main() -> None:
    arguments = parse_arguments(__doc__)
    torch.manual_seed(0)
    report = Report("the three gains")
    text = held_out_text(report)
    measure_family(report, "llama", EXAMPLE_MODEL, text, context=512, quick=arguments.quick)
    trained = small_gpt2(QUICK if arguments.quick else Training())
    measure_family(report, "gpt2", trained, text, context=256, quick=arguments.quick)
    report.save(arguments.json)


def measure_family(report: Report, family: str, path: Path, text: Path, *, context: int, quick: bool) -> None:
    """KL of every gain at every rate; the criterion of this family."""
    subject = open_subject(path)
    held_out, _ = split_windows(subject.tokenizer, text, context)
    held_out = held_out[: 2048 // context if quick else 60 * 512 // context]
    sequences = 4 if quick else 32
    sensitivity = measure_sensitivity(subject, "self", sequences, context)
    rows, excesses = [], []
    for bits in QUICK_RATES if quick else RATES:
        uniform = {gain: uniform_plan(subject, sensitivity, UNIFORM_CODECS[bits], gain) for gain in GAINS}
        stored = stored_bits(subject, bits)
        allotted = {gain: allotted_plan(subject, sensitivity, stored, gain) for gain in GAINS}
        for shape, plans in (("uniform", uniform), ("allotted", allotted)):
            copies = [decoded_copy(subject, plan.tensors) for plan in plans.values()]
            measured = dict(zip(plans, divergences(subject.model, copies, held_out), strict=True))
            better = min(measured[gain].kl for gain in ("mse", "unbiased"))
            excesses.append(measured["auto"].kl / better - 1)
            rows.append([bits, shape, plans["auto"].bits, *figures(plans, measured), excesses[-1]])
    columns = ["bits", "plan", "stored bits", *GAINS, *(f"{gain} ratio" for gain in GAINS), "auto over better"]
    title = f"{family}: measured KL, and predicted / measured (probe self), {len(held_out)} windows of {context}"
    report.table(title, columns, rows, key=family)
    worst = max(excesses)
    report.criterion(f"chosen_over_better_{family}", worst, f"<= {MARGIN}", worst <= MARGIN)


def figures(plans: dict[str, Plan], measured: dict[str, Measured]) -> list[float]:
    """Measured KL of every gain, then predicted over measured of every gain."""
    return [measured[gain].kl for gain in GAINS] + [plans[gain].predicted.kl / measured[gain].kl for gain in GAINS]


if __name__ == "__main__":
    main()
