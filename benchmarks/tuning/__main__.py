"""What leaving parts of a model out loses, and what training gives back of what packing took.

    prune        a fifth of the decoder layers' weights left out of each of --models, by every importance: KL to the
                 original and perplexity on held-out text
    prune-bits   at equal bytes bits alone, pruning alone, and both
    recovery     scales, and adapters from several starts, of packed models (`recovery.py`)
    memory       peak of a step of an adapter beside packed weights and beside float32 ones

A minute or two for each importance, packed model and training, of a hundred million weights. With --quick, few
sequences, windows and steps.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.shared.report import EXAMPLE_MODEL, BenchmarkReport, held_out_text, parse_arguments
from benchmarks.tuning import recovery
from benchmarks.tuning.pruning import SEQUENCES, WINDOWS, compare_importances, compare_with_bits, opened

PRUNING = ("prune", "prune-bits")
PARTS = (*PRUNING, *recovery.PARTS)


def main() -> None:
    arguments = parse_arguments(
        __doc__,
        part={"choices": PARTS, "nargs": "+", "default": list(PARTS), "help": f"of {', '.join(PARTS)}"},
        models={"type": Path, "nargs": "+", "default": [EXAMPLE_MODEL], "help": "checkpoints to change"},
        sequences={"type": int, "default": SEQUENCES, "help": "of own text, to score and fit on"},
        windows={"type": int, "default": WINDOWS, "help": "of the held-out text"},
        rates={
            "type": float,
            "nargs": "+",
            "default": list(recovery.RATES),
            "help": "bits per weight of packed models",
        },
        steps={"type": int, "default": recovery.STEPS, "help": "of training"},
        folder={"type": Path, "help": "where packed models are kept; nowhere where none is named"},
    )
    report = BenchmarkReport("tuning and pruning")
    text = held_out_text(report)
    for model in arguments.models if set(arguments.part) & set(PRUNING) else ():
        subject = opened(report, model, text, arguments.sequences, arguments.windows, quick=arguments.quick)
        if "prune" in arguments.part:
            compare_importances(report, subject)
        if "prune-bits" in arguments.part:
            compare_with_bits(report, subject)
    if set(arguments.part) & set(recovery.PARTS):
        recovery.recover(report, text, arguments)
    report.save(arguments.json)


if __name__ == "__main__":
    main()
