"""One artifact that is read at several rates, beside one for each rate.

    gaussian   a Gaussian matrix: bits over the bound at every rate of a ladder, in stages and alone, by states
    models     KL of --models on held-out text at --rates, one artifact for all beside one for each, with error feedback
               and without; bytes of all files; what was predicted

Files are compared at the bytes that are read at each rate. `more bytes for the same KL` is by how much the one for all
would have to be larger where it loses more: a bit less doubles noise's amplitude, so that KL goes with 4^-bits.

Takes minutes per artifact and 100 million weights, eight of them for every model. With --quick, the example model
without error feedback.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import torch

import waterfill
from benchmarks.shared.report import EXAMPLE_MODEL, BenchmarkReport, held_out_text, parse_arguments
from waterfill.codecs import Encoded, Nested, get_codec
from waterfill.codecs.nested.codec import nested_name

PARTS = ("gaussian", "models")
LADDER = (2.0, 3.0, 4.0, 6.0)
STATES, QUICK_STATES = (1, 8, 64, 256), (8,)
SIDE, QUICK_SIDE = 2048, 512
RATES = "2.2,3,4.5"
CONTEXT, WINDOWS, QUICK_WINDOWS = 512, 12, 4
KL_GOAL, BYTES_GOAL = 1.10, 1.05


def main() -> None:
    arguments = parse_arguments(
        __doc__,
        part={"choices": PARTS, "nargs": "+", "default": list(PARTS), "help": f"of {', '.join(PARTS)}"},
        models={"type": Path, "nargs": "+", "default": [EXAMPLE_MODEL], "help": "checkpoints"},
        rates={"default": RATES, "help": f"bits per weight ({RATES})"},
    )
    report = BenchmarkReport("several rates in one artifact")
    if "gaussian" in arguments.part:
        measure_gaussian(report, quick=arguments.quick)
    if "models" in arguments.part:
        text = held_out_text(report)
        for model in arguments.models:
            measure_model(report, model, text, arguments.rates, quick=arguments.quick)
    report.save(arguments.json)


def measure_gaussian(report: BenchmarkReport, *, quick: bool) -> None:
    side = QUICK_SIDE if quick else SIDE
    weight, rows = torch.randn(side, side, generator=torch.Generator().manual_seed(0)), []
    for states in QUICK_STATES if quick else STATES:
        codec = get_codec(nested_name(LADDER, states))
        assert isinstance(codec, Nested)
        whole = codec.encode(weight)
        for level, rate in enumerate(LADDER, 1):
            lower = codec.at(level)
            keys = lower.layout(whole.shape)
            some = Encoded(whole.shape, {key: whole.buffers[key] for key in keys}, whole.exponent, 0.0, 0.0)
            bits = lower.menu_point(whole.shape).rate_bits
            over = gap(lower.decode(some), weight, bits)
            trellis = get_codec(f"trellis-s{states}-r{rate:.4f}")
            alone = gap(trellis.decode(trellis.encode(weight)), weight, trellis.menu_point(whole.shape).rate_bits)
            rows.append([states, rate, bits, over, alone, over - alone, 4 ** (over - alone)])
    columns = ["states", "rate", "bits", "bits over the bound", "alone", "more", "t² over alone"]
    report.table(f"a Gaussian matrix of {side} x {side}, in stages", columns, rows, key="gaussian")


def gap(decoded: torch.Tensor, weight: torch.Tensor, bits: float) -> float:
    """Bits that a reconstruction takes beyond the least for its distortion, everything stored counted."""
    t2 = float((decoded.double() - weight).square().sum() / weight.double().square().sum())
    return bits + math.log2(t2) / 2


def measure_model(report: BenchmarkReport, model: Path, text: Path, rates: str, *, quick: bool) -> None:
    each, windows, rows = [float(rate) for rate in rates.split(",")], QUICK_WINDOWS if quick else WINDOWS, []
    with tempfile.TemporaryDirectory() as folder:
        for feedback in ("none",) if quick else ("none", "auto"):
            whole = Path(folder) / f"nested-{feedback}"
            plan = waterfill.pack(model, whole, rates=rates, feedback=feedback)  # type: ignore[arg-type]
            worst = 1.0
            for level, rate in zip(plan.levels, each, strict=True):
                alone = Path(folder) / f"alone-{feedback}-{rate:g}"
                single = waterfill.pack(model, alone, size=level.size_bytes, feedback=feedback)  # type: ignore[arg-type]
                of_all, own = (kl_of(path, model, text, windows, at) for path, at in ((whole, rate), (alone, None)))
                more = of_all / own
                worst = max(worst, more)
                rows.append(
                    [
                        *("no" if feedback == "none" else "yes", rate, level.size_bytes, of_all, own, more),
                        *(bytes_for_the_same(more, level.bits), level.predicted.kl, single.predicted.kl),
                    ]
                )
            key = f"{model.name}_{'without' if feedback == 'none' else 'with'}_feedback"
            report.criterion(f"kl_over_alone_{key}", round(worst, 3), f"<= {KL_GOAL}", worst <= KL_GOAL)
            top = 1 + rows[-1][6]
            report.criterion(f"bytes_over_alone_{key}", round(top, 3), f"<= {BYTES_GOAL}", top <= BYTES_GOAL)
    columns = ["feedback", "rate", "bytes read", "KL", "KL alone", "ratio", "more bytes for the same KL", "predicted"]
    columns.append("predicted alone")
    report.table(f"{model.name}, {windows} windows of {CONTEXT}", columns, rows, key=f"models_{model.name}")


def kl_of(path: Path, model: Path, text: Path, windows: int, rate: float | None) -> float:
    measured = waterfill.evaluate(path, model, text, context=CONTEXT, max_windows=windows, rate=rate)
    assert measured.kl is not None
    return measured.kl


def bytes_for_the_same(ratio: float, bits: float) -> float:
    """As a share of the matrices' bytes."""
    return math.log2(ratio) / 2 / bits


if __name__ == "__main__":
    main()
