"""The verbs: what the command line calls, and what `import waterfill` offers.

plan ──► pack ──► load ──► generate          prune: a smaller checkpoint, to be planned
                      └──► evaluate          inspect: what is in an artifact
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Unpack, cast

from waterfill.base.ambient import own_torch_modes
from waterfill.base.arguments import checked
from waterfill.base.errors import BudgetError, CheckpointError, WaterfillError
from waterfill.base.progress import DESCRIBING, OPENING, PLANNING, Progress, stage
from waterfill.base.writing import prepare_file, write_file
from waterfill.codecs.feedback import Left
from waterfill.evaluation.evaluate import Evaluation, evaluate
from waterfill.files.architecture import Architecture, describe
from waterfill.files.artifact import check_target, open_artifact
from waterfill.files.checkpoint import Checkpoint, open_checkpoint
from waterfill.files.original import load_tokenizer
from waterfill.packing.kept import coded_bytes
from waterfill.packing.pack import pack_plan
from waterfill.packing.seal import seal
from waterfill.planning.borrowed import check_units, given_sensitivity, uniform_sensitivity
from waterfill.planning.budget import Budget, format_size, parse_size
from waterfill.planning.calibration import TOKENS as CALIBRATION_TOKENS
from waterfill.planning.calibration import Calibrated, calibrate, calibrated_again, calibrated_on
from waterfill.planning.disturbance import Disturbance
from waterfill.planning.ladder import MENU as NESTED_MENU
from waterfill.planning.ladder import nested_codecs, nested_plan, parse_rates
from waterfill.planning.measuring import as_text, measure_checkpoint
from waterfill.planning.menu import CodedBytes, codec_names
from waterfill.planning.options import CHECKS, QUICK, PlanOptions, ProbeOptions
from waterfill.planning.plan import Plan, Unused, read_plan
from waterfill.planning.planner import EVERYTHING, Request, make_lossless_plan, make_plan
from waterfill.planning.sensitivity import SENSITIVITY_FILE, Sensitivity
from waterfill.running.loading import load
from waterfill.running.timing import check_speed, timing_of
from waterfill.studies.own_text import OwnText
from waterfill.tuning.pruning.prune import PRUNE_CHECKS, Pruned, PruneOptions, prune_checkpoint
from waterfill.tuning.pruning.prune import check as check_pruning

_log = logging.getLogger(__name__)

__all__ = [
    "Evaluation",
    "Inspection",
    "evaluate",
    "inspect",
    "load",
    "load_tokenizer",
    "pack",
    "plan",
    "prune",
    "read_plan",
    "seal",
    "sensitivity",
]


@own_torch_modes()
@checked(ProbeOptions, **CHECKS)
def sensitivity(
    model: str | Path, *, keep: Sequence[str] = (), progress: Progress | None = None, **options: Unpack[ProbeOptions]
) -> Sensitivity:
    """Measure what a disturbance of each matrix costs the model; reuse it for any number of plans."""
    checkpoint = _open(model, options.get("revision"), progress)
    architecture = _describe(checkpoint, keep, progress)
    with OwnText(checkpoint, architecture, progress) as text:
        return _measure(checkpoint, architecture, progress, options, text)


@own_torch_modes()
@checked(PlanOptions, **CHECKS)
def plan(
    model: str | Path,
    *,
    save: str | Path | None = None,
    progress: Progress | None = None,
    **options: Unpack[PlanOptions],
) -> Plan:
    """What each tensor would get under a budget, and what that is predicted to cost. Writes nothing unless `save` is
    given: the plan goes to that file and the sensitivities, if any were needed, beside it.

    Raises:
        WaterfillError: a bad checkpoint, an impossible budget, options that do not go together.
    """
    if save is not None:
        save = Path(save)
        prepare_file(save)  # fails before minutes of measuring, if it does
    checkpoint = _open(model, options.get("revision"), progress)
    made, measured = _plan(str(model), checkpoint, progress, options)[:2]
    if save is not None:
        write_file(save, made.to_json())
        if measured is not None:
            write_file(save.with_suffix(".sensitivity.json"), measured.to_json())
    return made


@own_torch_modes()
@checked(PlanOptions, **CHECKS)
def pack(
    model: str | Path,
    out: str | Path,
    *,
    plan: str | Path | Plan | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Unpack[PlanOptions],
) -> Plan:
    """Pack `model` into the directory `out`, by a plan made before or by one made now from the options.

    An interrupted run is continued by calling again. Returns the plan that was carried out.

    Raises:
        WaterfillError: as for `plan`; `out` is not empty, or with `overwrite` no artifact; a weight is NaN or infinite.
    """
    check_target(Path(out), overwrite)  # before minutes of downloading and measuring
    beside = ("revision", "calibrate", "cache")
    if plan is not None and any(value is not None for name, value in options.items() if name not in beside):
        raise WaterfillError("a plan has its budget and its choices in it; give either a plan or the options for one")
    checkpoint = _open(model, options.get("revision"), progress)
    measured: Sensitivity | None = None
    if plan is None:
        made, measured, architecture, calibrated = _plan(str(model), checkpoint, progress, options)
    else:
        made = plan if isinstance(plan, Plan) else Plan.load(Path(plan))
        architecture = _describe(checkpoint, made.keep, progress)
        with OwnText(checkpoint, architecture, progress) as text:
            on = options.get("calibrate")
            calibrated = calibrated_again(checkpoint, architecture, made, on, progress, options, write=text.sample)
    extra = {SENSITIVITY_FILE: measured.to_json().encode()} if measured else {}
    pack_plan(
        made,
        checkpoint,
        architecture,
        Path(out),
        overwrite=overwrite,
        extra=extra,
        feedback=None if calibrated is None else calibrated.feedback,
        progress=None if progress is None else lambda name, done, total: progress("packing", done, total),
    )
    return made


@own_torch_modes()
@checked(PruneOptions, **PRUNE_CHECKS)
def prune(
    model: str | Path, out: str | Path, *, progress: Progress | None = None, **options: Unpack[PruneOptions]
) -> Pruned:
    """Leave heads, channels or layers out of `model`, and write what stays into the directory `out`: a checkpoint of
    the same class, that everything takes as it takes the original.

    Raises:
        WaterfillError: an unknown family, an impossible target, an `out` that exists already.
    """
    check_pruning(Path(out), options)  # before minutes of downloading and measuring
    checkpoint = _open(model, options.get("revision"), progress)
    architecture = _describe(checkpoint, (), progress)
    with OwnText(checkpoint, architecture, progress) as text:
        return prune_checkpoint(checkpoint, architecture, Path(out), progress, options, write_text=text.sample)


@dataclass(frozen=True)
class Inspection:
    """What is in an artifact: the plan it was packed by, and what was measured while packing."""

    path: Path
    size_bytes: int
    plan: Plan
    measured_t2: Mapping[str, float]  # of every packed matrix


@checked()
def inspect(artifact: str | Path, *, verify: bool = True) -> Inspection:
    """Open an artifact and say what is in it; `verify` reads every byte."""
    path = Path(artifact)
    stored = open_artifact(path, verify=verify)
    measured = {name: tensor.t2 for name, tensor in stored.tensors.items() if tensor.packed}
    return Inspection(path, stored.size_bytes, read_plan(path), measured)


def _plan(
    model: str, checkpoint: Checkpoint, progress: Progress | None, options: PlanOptions
) -> tuple[Plan, Sensitivity | None, Architecture, Calibrated | None]:
    # A local path is nobody's business; nor can a plan hold a name that is not text.
    name = as_text(Path(model).resolve().name if Path(model).is_dir() else model)
    if options.get("lossless"):
        _check_alone(options)
        architecture = _describe(checkpoint, EVERYTHING, progress)
        sizes = _coded_bytes(checkpoint, architecture, progress)
        with stage(progress, PLANNING):
            lossless = make_lossless_plan(name, architecture, checkpoint.fingerprint, sizes)
        return replace(lossless, unused=_unused(checkpoint, architecture)), None, architecture, None
    size, rates = options.get("size"), _rates(options)
    limits = (None if size is None else parse_size(size), options.get("bits"), options.get("max_kl"))
    budget = Budget(None, rates[-1]) if rates else Budget(*limits, options.get("speed"))
    request = Request(
        gain=options.get("gain", "auto"),
        keep=tuple(options.get("keep", ())),
        ties=tuple(options.get("tie", ())),
        uniform=options.get("uniform", False),
        codecs=NESTED_MENU if rates else tuple(options.get("codecs", ())),
        purpose=options.get("purpose", "storage"),
    )
    if options.get("alpha", "measured") == "uniform" and options.get("sensitivity") is not None:
        raise WaterfillError("--alpha uniform and --sensitivity do not go together; give one of them")
    check_speed(options)
    architecture = _describe(checkpoint, request.keep, progress)
    timed = request.timed(budget)
    menu = nested_codecs(rates) if rates else request.codecs
    names = codec_names(architecture, menu, request.purpose, timed=timed)  # before minutes of work
    timing = timing_of(checkpoint, architecture, names, progress, options)
    sizes = _coded_bytes(checkpoint, architecture, progress)
    if (given := _given(checkpoint, architecture, options)) is not None:
        check_units(given, budget)
    on = calibrated_on(options, given, architecture.matrices, names)
    with OwnText(checkpoint, architecture, progress) as text:
        calibrated, left = None, dict[str, Left]()
        if on is not None:
            calibrated, left = _calibrated(checkpoint, architecture, progress, options, names, on, text)

        def planned(measured: Sensitivity) -> Plan:
            record = None if calibrated is None else calibrated.record

            def within(budget: Budget) -> Plan:
                return make_plan(name, architecture, measured, budget, request, sizes, record, left, timing)

            with stage(progress, PLANNING):
                if rates:
                    return nested_plan(lambda rate: within(Budget(None, rate)), rates, left)
                return within(budget)

        measured = given or _measure(checkpoint, architecture, progress, cast(ProbeOptions, options), text, planned)
    made = planned(measured)
    if made.calibration is None:
        calibrated = None  # nothing that was chosen gains by it
    return replace(made, unused=_unused(checkpoint, architecture)), measured, architecture, calibrated


def _rates(options: PlanOptions) -> tuple[float, ...]:
    """That the model is to be packed at, if it is to be at several.

    Raises:
        BudgetError: something else is asked for that does not go with that.
    """
    rates = options.get("rates")
    if rates is None:
        return ()
    others = ("size", "bits", "max_kl", "speed", "codecs", "disk")
    asked = [name for name in others if options.get(name) not in (None, (), [])]
    if options.get("purpose", "storage") != "storage":
        asked.append("for")
    if asked:
        raise BudgetError(
            f"rates are what a model that is read at several is planned by; leave out {', '.join(asked)}, or rates"
        )
    return parse_rates(rates)


def _given(checkpoint: Checkpoint, architecture: Architecture, options: PlanOptions) -> Sensitivity | None:
    """Sensitivities that are not measured now."""
    if options.get("alpha", "measured") == "uniform":
        return uniform_sensitivity(checkpoint.fingerprint, architecture.matrices)
    if (given := options.get("sensitivity")) is not None:
        return given_sensitivity(given, checkpoint, architecture.matrices)
    return None


def _calibrated(
    checkpoint: Checkpoint,
    architecture: Architecture,
    progress: Progress | None,
    options: PlanOptions,
    codecs: Sequence[str],
    on: str | Path,
    text: OwnText,
) -> tuple[Calibrated | None, dict[str, Left]]:
    """What errors are fed back by, and what that leaves; nothing where there can be none, and nobody asked for it."""
    tokens = options.get("calibration_tokens", CALIBRATION_TOKENS)
    probing = cast(ProbeOptions, options)
    try:
        made = calibrate(checkpoint, architecture, on, progress, probing, tokens=tokens, write=text.sample)
        return made, made.left(architecture.matrices, codecs)
    except CheckpointError:
        raise
    except WaterfillError as error:
        if options.get("calibrate") is not None:
            raise
        _log.warning("rounding errors are not fed back: %s", error)
        return None, {}


def _measure(
    checkpoint: Checkpoint,
    architecture: Architecture,
    progress: Progress | None,
    options: ProbeOptions,
    text: OwnText,
    planned: Callable[[Sensitivity], Plan] | None = None,
) -> Sensitivity:
    """As many sequences as it takes to know what is lost by what is `planned` with them."""
    if options.get("quick"):
        options = {**QUICK, **options}

    def noise(measured: Sensitivity) -> Disturbance:
        assert planned is not None
        return Disturbance.of(planned(measured).tensors)

    return measure_checkpoint(
        checkpoint, architecture, progress, options, write=text.sample, planned=noise if planned else None
    )


def _open(model: str | Path, revision: str | None, progress: Progress | None) -> Checkpoint:
    with stage(progress, OPENING):
        return open_checkpoint(model, revision=revision)


def _describe(checkpoint: Checkpoint, keep: Sequence[str], progress: Progress | None) -> Architecture:
    """The architecture; a warning says what does not fit together between config.json and the weights."""
    with stage(progress, DESCRIBING):
        architecture = describe(checkpoint, keep)
    unused = [tensor for tensor in _unused(checkpoint, architecture) if not tensor.expected]
    if unused:
        _log.warning(
            "%d tensors of %s, %s, are left out, such as %s: the model of its config.json has no place for them",
            len(unused),
            checkpoint.path,
            format_size(sum(tensor.size_bytes for tensor in unused)),
            unused[0].name,
        )
    if architecture.absent:
        _log.warning(
            "%s lacks %d buffers of the model, such as %s: they are what the model sets them to",
            checkpoint.path,
            len(architecture.absent),
            architecture.absent[0],
        )
    return architecture


def _unused(checkpoint: Checkpoint, architecture: Architecture) -> tuple[Unused, ...]:
    return tuple(
        Unused(name, checkpoint.tensors[name].size_bytes, name in architecture.superfluous)
        for name in architecture.ignored
    )


def _check_alone(options: PlanOptions) -> None:
    """Refuse options that a lossless plan has no use for."""
    others = {"lossless", "revision", "feedback"}
    refused = [name for name, value in options.items() if name not in others and value not in (None, False, (), [])]
    if refused:
        raise BudgetError(
            f"a lossless plan keeps every bit, whatever else is asked for; leave out "
            f"{', '.join(sorted(refused))}, or lossless"
        )


def _coded_bytes(checkpoint: Checkpoint, architecture: Architecture, progress: Progress | None) -> CodedBytes:
    """Sizes of losslessly coded tensors, found by coding them; with progress over those that are surely asked for."""
    kept = {tensor.name: tensor for tensor in architecture.kept}
    matrices = {matrix.name: matrix for matrix in architecture.matrices}
    total, done = sum(math.prod(tensor.shape) for tensor in kept.values()), 0

    def step(count: int) -> None:
        nonlocal done
        done = min(done + count, total)
        if progress:
            progress("coding what is kept", done, total)

    @cache  # a plan is made twice where it is tried
    def size(name: str) -> int | None:
        if name not in kept:
            return coded_bytes(checkpoint, matrices[name])
        step(0)  # what comes first may be the largest
        return coded_bytes(checkpoint, kept[name], step)

    return size
