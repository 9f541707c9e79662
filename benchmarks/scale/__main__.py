"""What planning costs: on real checkpoints from scratch, and at hundreds of billions of weights and a trillion.

    plan        `waterfill plan` of each of --models in an empty cache: seconds, peak memory, sequences, again with what
                was kept, and with --quick; what plans lose by measuring fewer sequences, with and without pooling;
                predicted beside measured KL on the model's own
                text, on the held-out one, and on --texts

    writers     own text from codes beside own text from the original: seconds, and what is predicted on it

    large       random bfloat16 weights of Llama-3.1-8B's shapes, 16 GB on disk: time and memory; killed, and resumed

    positions   what a token loses by how many come before it, and what sequences of other lengths would see

    simulated   time and memory of plans for shapes without weights: Llama-3.1-405B, and a mixture of experts of a
                trillion weights in 70,000 matrices; with --quick, three layers of each

Every plan is made in a process of its own. Times want an idle machine: where processes share it, CPU seconds say what
was worked. Linux only.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.scale.large import measure_large
from benchmarks.scale.measured import measure_checkpoints
from benchmarks.scale.positions import measure_positions
from benchmarks.scale.simulated import measure_simulated
from benchmarks.scale.writers import measure_writers
from benchmarks.shared.report import EXAMPLE_MODEL, BenchmarkReport, held_out_text, parse_arguments

PARTS = ("plan", "writers", "large", "positions", "simulated")


def main() -> None:
    arguments = parse_arguments(
        __doc__,
        part={"choices": PARTS, "nargs": "+", "default": list(PARTS), "help": f"of {', '.join(PARTS)}"},
        models={"type": Path, "nargs": "+", "default": [EXAMPLE_MODEL], "help": "checkpoints to plan"},
        texts={"type": Path, "nargs": "*", "default": [], "help": "more files to measure predictions on"},
        larger={"type": Path, "nargs": "*", "default": [], "help": "checkpoints that plans alone are made of"},
    )
    report = BenchmarkReport("planning at scale")
    if "plan" in arguments.part:
        texts = [held_out_text(report), *arguments.texts]
        measure_checkpoints(report, arguments.models, arguments.larger, texts, arguments.quick)
    if "writers" in arguments.part:
        measure_writers(report, arguments.models, arguments.quick)
    if "large" in arguments.part:
        measure_large(report, arguments.quick)
    if "positions" in arguments.part:
        measure_positions(report, arguments.models, arguments.quick)
    if "simulated" in arguments.part:
        measure_simulated(report, arguments.quick)
    report.save(arguments.json)


if __name__ == "__main__":
    main()
