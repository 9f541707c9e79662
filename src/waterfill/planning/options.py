"""What can be asked for: the options of `sensitivity`, `plan`, `pack` and `compare`, and what their values may be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypedDict, get_args

from waterfill.base.arguments import FLAG, PATH, Check, choice, is_real, optional, whole
from waterfill.base.errors import WaterfillError
from waterfill.planning.loss import Gain
from waterfill.planning.menu import PURPOSES, Purpose
from waterfill.planning.plan import Plan
from waterfill.planning.precision import parse_precision
from waterfill.planning.probe import KINDS
from waterfill.planning.sensitivity import PASSES, Method, Sensitivity


class ProbeOptions(TypedDict, total=False):
    """How sensitivities are measured."""

    probe: Literal["self", "random", "text"]
    text: str | Path | None  # with probe="text", which it implies
    sequences: int  # as many as `precision` takes, where that is not said
    precision: str | float  # of the predicted loss, as a share of it: .05 or "5%"
    quick: bool  # four short sequences
    cache: bool  # whether probes and what they said are kept on disk, and used again
    length: int
    seed: int
    method: Method
    revision: str | None


QUICK = ProbeOptions(sequences=4, length=96)


class PlanOptions(ProbeOptions, total=False):
    """What a plan is asked for: exactly one of size, bits, rates, max_kl, lossless and speed; the rest has defaults."""

    size: str | float | None  # bytes of all weight files, or "2.5GB"
    bits: float | None  # stored bits per weight of the matrices
    rates: str | Sequence[float] | None  # bits per weight that the one artifact can be read at: "2.2,3,4.5"
    speed: float | None  # tokens per second at least, of products alone; alone, or with size or bits
    max_kl: float | None  # predicted loss, nats per token
    lossless: bool  # every bit is kept, and nothing but the revision is left to choose
    gain: Gain
    keep: Sequence[str]
    tie: Sequence[str]
    uniform: bool
    codecs: Sequence[str]
    purpose: Purpose  # storage: entropy-coded, the fewest bytes; memory: runs from its codes; stream: either, by speed
    disk: str  # what is streamed from: "0.5GB/s", or "measured", the model's own files
    alpha: Literal["measured", "uniform"]  # uniform: every weight counts the same
    sensitivity: str | Path | Sensitivity | None  # of this model, or of one like it, or a table
    feedback: Literal["auto", "none"]  # auto: errors are fed back wherever the model is measured on its own text
    calibrate: str | Path | None  # by moments of inputs on the model's own text ("self", as auto does) or on a text
    calibration_tokens: int


def _is_precision(value: object) -> bool:
    try:
        return isinstance(value, str | float) and parse_precision(value) > 0
    except WaterfillError:
        return False


def _is_rates(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, Sequence) and all(map(is_real, value)))


CHECKS = {
    "gain": choice(*get_args(Gain)),
    "purpose": choice(*PURPOSES),
    "probe": choice(*KINDS),
    "rates": optional(Check("several bits per weight, as in '2.2,3,4.5'", _is_rates)),
    "speed": optional(Check("a finite number", is_real)),
    "disk": Check("a text such as '0.5GB/s', or 'measured'", lambda value: isinstance(value, str)),
    "precision": optional(Check("a share such as 0.05 or '5%'", _is_precision)),
    "quick": FLAG,
    "method": choice(*PASSES),
    "alpha": choice("measured", "uniform"),
    "feedback": choice("auto", "none"),
    "calibrate": optional(Check("'self', or a text file", PATH.holds)),
    "calibration_tokens": whole(1),
    "plan": optional(Check("a file, or a plan", lambda value: isinstance(value, Plan) or PATH.holds(value))),
    "sensitivity": optional(
        Check("a file, or sensitivities", lambda value: isinstance(value, Sensitivity) or PATH.holds(value))
    ),
}
