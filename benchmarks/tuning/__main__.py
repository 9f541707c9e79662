"""What changing a checkpoint before it is packed loses or gains.

    prune    a fifth of the decoder layers' weights left out of each of --models, by every importance: KL to the
             original and perplexity on held-out text; and at equal bytes bits alone, pruning alone, and both

Minutes for each model of a hundred million weights and each importance. With --quick, few sequences and windows.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.shared.report import EXAMPLE_MODEL, BenchmarkReport, held_out_text, parse_arguments
from benchmarks.tuning.pruning import measure_pruning

PARTS = ("prune",)


def main() -> None:
    arguments = parse_arguments(
        __doc__,
        part={"choices": PARTS, "nargs": "+", "default": list(PARTS), "help": f"of {', '.join(PARTS)}"},
        models={"type": Path, "nargs": "+", "default": [EXAMPLE_MODEL], "help": "checkpoints to change"},
    )
    report = BenchmarkReport("changed before packing")
    text = held_out_text(report)
    if "prune" in arguments.part:
        for model in arguments.models:
            measure_pruning(report, model, text, arguments.quick)
    report.save(arguments.json)


if __name__ == "__main__":
    main()
