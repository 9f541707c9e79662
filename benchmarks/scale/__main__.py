"""What planning costs: on real checkpoints from scratch, and at hundreds of billions of weights and a trillion.

    plan        `waterfill plan` of each of --models in an empty cache: seconds, peak memory, sequences, and again with
                what was kept; excess loss of plans over the number of sequences, with and without pooling

    simulated   time and memory of plans for shapes without weights: Llama-3.1-405B, and a mixture of experts of a
                trillion weights in 70,000 matrices; with --quick, three layers of each

Every plan is made in a process of its own. Times want an idle machine: where processes share it, CPU seconds say what
was worked. Linux only.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.scale.measured import measure_checkpoints
from benchmarks.scale.simulated import measure_simulated
from benchmarks.shared.report import EXAMPLE_MODEL, BenchmarkReport, parse_arguments

PARTS = ("plan", "simulated")


def main() -> None:
    arguments = parse_arguments(
        __doc__,
        part={"choices": PARTS, "nargs": "+", "default": list(PARTS), "help": f"of {', '.join(PARTS)}"},
        models={"type": Path, "nargs": "+", "default": [EXAMPLE_MODEL], "help": "checkpoints to plan"},
    )
    report = BenchmarkReport("planning at scale")
    if "plan" in arguments.part:
        measure_checkpoints(report, arguments.models, arguments.quick)
    if "simulated" in arguments.part:
        measure_simulated(report, arguments.quick)
    report.save(arguments.json)


if __name__ == "__main__":
    main()
