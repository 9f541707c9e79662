"""What changing a checkpoint before it is packed loses or gains.

    prune        a fifth of the decoder layers' weights left out of each of --models, by every importance: KL to the
                 original and perplexity on held-out text
    prune-bits   at equal bytes bits alone, pruning alone, and both

A minute or two for each importance, and each packed model, of a hundred million weights. With --quick, few sequences
and windows.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.shared.report import EXAMPLE_MODEL, BenchmarkReport, held_out_text, parse_arguments
from benchmarks.tuning.pruning import SEQUENCES, WINDOWS, compare_importances, compare_with_bits, opened

PARTS = ("prune", "prune-bits")


def main() -> None:
    arguments = parse_arguments(
        __doc__,
        part={"choices": PARTS, "nargs": "+", "default": list(PARTS), "help": f"of {', '.join(PARTS)}"},
        models={"type": Path, "nargs": "+", "default": [EXAMPLE_MODEL], "help": "checkpoints to change"},
        sequences={"type": int, "default": SEQUENCES, "help": "of own text, to score and fit on"},
        windows={"type": int, "default": WINDOWS, "help": "of the held-out text"},
    )
    report = BenchmarkReport("changed before packing")
    text = held_out_text(report)
    for model in arguments.models:
        subject = opened(report, model, text, arguments.sequences, arguments.windows, quick=arguments.quick)
        if "prune" in arguments.part:
            compare_importances(report, subject)
        if "prune-bits" in arguments.part:
            compare_with_bits(report, subject)
    report.save(arguments.json)


if __name__ == "__main__":
    main()
