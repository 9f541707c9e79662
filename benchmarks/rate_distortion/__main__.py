"""Entropy-coded trellis quantisation: how near the Shannon bound, what that saves on a model, and at what speed.

    gaussian    fresh Gaussian weights, encoded and decoded: distance to the bound by rate and states, beside HIGGS
    model       the example model: bytes on disk against measured KL, trellis against allotted fixed-rate grids
    speed       decoding to levels on one and two threads for every instruction set, beside zstd -1, Huff0 and
                constriction in the same rounds; encoding on one thread
    checkpoint  random weights in the shapes of Llama-3.2-1B: time and peak memory of pack and of load, coded to be
                stored and to be run from its codes (4 GB in a temporary folder)

Whoever is not installed (zstandard, zipnn, constriction) is left out. Speeds want an idle machine.
"""

from __future__ import annotations

from benchmarks.rate_distortion.checkpoint import measure_checkpoint
from benchmarks.rate_distortion.gaussian import measure_gaussian
from benchmarks.rate_distortion.model import measure_model
from benchmarks.rate_distortion.speed import measure_speed
from benchmarks.shared.report import BenchmarkReport, parse_arguments

SECTIONS = {
    "gaussian": measure_gaussian,
    "model": measure_model,
    "speed": measure_speed,
    "checkpoint": measure_checkpoint,
}


def main() -> None:
    names = list(SECTIONS)
    arguments = parse_arguments(
        __doc__,
        only={"choices": names, "nargs": "+", "metavar": "NAME", "help": f"of {', '.join(names)}"},
    )
    # Starting the checkpoint's processes takes a quick run's minute.
    chosen = arguments.only or [name for name in names if not (arguments.quick and name == "checkpoint")]
    report = BenchmarkReport("rate and distortion of entropy-coded weights")
    for name in names:
        if name in chosen:
            SECTIONS[name](report, arguments.quick)
    report.save(arguments.json)


if __name__ == "__main__":
    main()
