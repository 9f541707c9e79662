"""Models of hundreds of billions of weights, and of a trillion: whether planning keeps up.

    simulated   time and memory of plans for shapes without weights: Llama-3.1-405B, and a mixture of experts of a
                trillion weights in 70,000 matrices; with --quick, three layers of each

Every plan is made in a process of its own. Times want an idle machine: where processes share it, CPU seconds say what
was worked. Linux only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from benchmarks.scale.simulated import measure_simulated
from benchmarks.shared.report import Report, parse_arguments

PARTS: Mapping[str, Callable[[Report, bool], None]] = {"simulated": measure_simulated}


def main() -> None:
    arguments = parse_arguments(
        __doc__,
        part={"choices": list(PARTS), "nargs": "+", "default": list(PARTS), "help": f"of {', '.join(PARTS)}"},
    )
    report = Report("planning at scale")
    for part in arguments.part:
        PARTS[part](report, arguments.quick)
    report.save(arguments.json)


if __name__ == "__main__":
    main()
