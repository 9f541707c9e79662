"""The verb `compare`: ways to store a model, at equal bytes.

model + text + budgets + methods ──► Comparison
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, TypedDict, Unpack, cast

import torch

from waterfill.base.ambient import own_torch_modes
from waterfill.base.arguments import PATH, POSITIVE, SIZE, checked, each
from waterfill.base.errors import BudgetError, WaterfillError
from waterfill.base.progress import DESCRIBING, LOADING, OPENING, READING, Progress, stage
from waterfill.evaluation import default_context, token_ids, windows
from waterfill.files.architecture import Architecture, describe
from waterfill.files.checkpoint import Checkpoint, open_checkpoint
from waterfill.files.original import load_checkpoint, load_tokenizer
from waterfill.planning.borrowed import given_sensitivity
from waterfill.planning.budget import Budget, parse_size
from waterfill.planning.disturbance import Disturbance
from waterfill.planning.loss import Gain
from waterfill.planning.measuring import measure_checkpoint, measured_tokens
from waterfill.planning.menu import Purpose, codec_names
from waterfill.planning.options import CHECKS, ProbeOptions
from waterfill.planning.plan import Calibration
from waterfill.planning.planner import Request, make_plan
from waterfill.planning.sensitivity import Sensitivity
from waterfill.studies.comparison import (
    DEFAULT_BITS,
    FED_BACK,
    OURS,
    PLAIN,
    Comparison,
    Method,
    StudiedModel,
    compare_methods,
    known,
    select,
)
from waterfill.studies.own_text import OwnText

# Without the baseline that nobody ships, and without variants of what is there already.
USUAL_METHODS = (PLAIN, FED_BACK, "bnb-*", "hqq-[2348]", "quanto-*", "torchao-*", "gptq-*", "gguf-*[!x]")


PROBE_KEYS = ("probe", "sequences", "length", "seed")
CALIBRATION_SEQUENCES, CALIBRATION_LENGTH = 32, 512  # that calibrated peers see, where nobody says how many


class CompareOptions(TypedDict, total=False):
    """How our plans are made, and what calibrated peers see."""

    gain: Gain
    keep: Sequence[str]
    codecs: Sequence[str]
    purpose: Purpose  # storage or memory, as of `plan`
    probe: Literal["self", "random"]
    calibration: str | Path | None  # a text to measure sensitivities on, and to calibrate peers with, in their place
    sequences: int
    length: int
    seed: int
    sensitivity: str | Path | Sensitivity | None
    revision: str | None


@own_torch_modes()
@checked(CompareOptions, text=PATH, sizes=each(SIZE, "sizes"), bits=each(POSITIVE, "numbers above 0"), **CHECKS)
def compare(
    model: str | Path,
    text: str | Path,
    *,
    sizes: Sequence[str | float] = (),
    bits: Sequence[float] = (),
    methods: Sequence[str] = USUAL_METHODS,
    match: bool = True,
    context: int | None = None,
    max_windows: int | None = None,
    batch: int = 1,
    progress: Progress | None = None,
    **options: Unpack[CompareOptions],
) -> Comparison:
    """Store a model in many ways, at their true bytes, and measure what each loses on a text.

    Args:
        sizes, bits: budgets of our own plans, 2.5 to 8 bits per weight when neither is given.
        methods: names or patterns; a method that cannot run here has a row that says why.
        match: beside every peer, measure our plan within the peer's bytes.
        context: tokens per window; 2048 or the model's positions, if that is less, when None.
        max_windows: measure on the first windows only.

    Results are kept in the user's cache directory, and found again by model, method, text and context.

    Raises:
        WaterfillError: a bad checkpoint, text, budget or method.
    """
    ours, peers = _methods(methods)
    if not ours and not peers:
        raise WaterfillError("there is nothing to compare: no method is named; leave methods out for the usual ones")
    budgets = [Budget(parse_size(size)) for size in sizes] + [Budget(bits=rate) for rate in bits]
    with stage(progress, OPENING):
        checkpoint = open_checkpoint(model, revision=options.get("revision"))
    with stage(progress, DESCRIBING):
        architecture = describe(checkpoint, options.get("keep", ()))
    codec_names(architecture, options.get("codecs"))  # refuses what is none, before minutes of measuring
    with stage(progress, READING):
        tokenizer = load_tokenizer(checkpoint.path)
        ids = token_ids(tokenizer, text)
    request = Request(
        gain=options.get("gain", "auto"),
        keep=tuple(options.get("keep", ())),
        codecs=tuple(options.get("codecs", ())),
        purpose=options.get("purpose", "storage"),
    )
    budgets = budgets or [Budget(bits=rate) for rate in DEFAULT_BITS]

    def most_lost(measured: Sensitivity) -> Disturbance:
        """What is tried: the plan that loses most."""
        plans = []
        for budget in budgets:
            with suppress(BudgetError):  # it will have a row that says so
                plans.append(make_plan("", architecture, measured, budget, request))
        return Disturbance.of(max(plans, key=lambda plan: plan.predicted.kl).tensors if plans else ())

    calibrated = FED_BACK in ours or any(method.calibrated for method in peers)
    measured, calibration = _measured(checkpoint, architecture, progress, options, calibrated, most_lost)
    with stage(progress, LOADING):
        original = load_checkpoint(checkpoint)
    context = default_context(original) if context is None else context
    ids = windows(ids, context)[:max_windows].flatten()
    name = Path(model).resolve().name if Path(model).is_dir() else str(model)
    record = None if calibration is None else _record(calibration, options)
    subject = StudiedModel(name, checkpoint, architecture, original, measured, calibration, record)
    return compare_methods(
        subject,
        ids,
        text=Path(text).name,
        context=context,
        methods=peers,
        ours=ours,
        budgets=budgets,
        request=request,
        match=match,
        batch=batch,
        progress=progress,
    )


def _methods(patterns: Sequence[str]) -> tuple[tuple[str, ...], tuple[Method, ...]]:
    """Our own methods, and the peers, that the patterns name."""
    ours = tuple(name for name in OURS if any(fnmatchcase(name, pattern) for pattern in patterns))
    rest = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in OURS)]
    everything = [pattern for pattern in patterns if any(fnmatchcase(name, pattern) for name in known())]
    wanted = dict.fromkeys([*everything, *rest])
    return ours, select(tuple(wanted)) if wanted else ()


def _record(tokens: torch.Tensor, options: CompareOptions) -> Calibration:
    """What calibrated methods see."""
    sequences, length = tokens.shape
    text = options.get("calibration")
    kind = options.get("probe", "self") if text is None else "text"
    return Calibration(kind, sequences, length, options.get("seed", 0), None if text is None else Path(text).name)


def _measured(
    checkpoint: Checkpoint,
    architecture: Architecture,
    progress: Progress | None,
    options: CompareOptions,
    calibrated: bool,
    planned: Callable[[Sensitivity], Disturbance],
) -> tuple[Sensitivity, torch.Tensor | None]:
    """Sensitivities as `plan` measures them, and the tokens that calibrated peers see; what was made before is used."""
    wanted = options.get("sensitivity")
    probe = {key: options[key] for key in PROBE_KEYS if options.get(key) is not None}  # type: ignore[literal-required]
    probing = cast(ProbeOptions, probe | {"text": options.get("calibration")})
    with OwnText(checkpoint, architecture, progress) as own:
        if wanted is None:
            measured = measure_checkpoint(
                checkpoint, architecture, progress, probing, write=own.sample, planned=planned
            )
        else:
            measured = given_sensitivity(wanted, checkpoint, architecture.matrices)
        if not calibrated:
            return measured, None
        shape = {"sequences": CALIBRATION_SEQUENCES, "length": CALIBRATION_LENGTH}
        seen = cast(ProbeOptions, shape | probing)
        return measured, measured_tokens(checkpoint, architecture, progress, seen, write=own.sample)
