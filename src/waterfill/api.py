"""The verbs: what the command line calls, and what `import waterfill` offers.

plan ──► pack ──► load ──► generate
                      └──► evaluate          inspect: what is in an artifact
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from traceback import walk_tb
from typing import Literal, TypedDict, Unpack, cast, get_args

from waterfill.ambient import own_torch_modes
from waterfill.architecture import Architecture, Kept, Matrix, describe
from waterfill.arguments import PATH, Check, checked, choice, optional
from waterfill.artifact import RAW, check_target, open_artifact
from waterfill.budget import Budget, format_size, parse_size
from waterfill.checkpoint import Checkpoint, open_checkpoint
from waterfill.codecs import LOSSLESS
from waterfill.errors import BudgetError, WaterfillError, first_line
from waterfill.evaluation import Evaluation, evaluate
from waterfill.kept import coded_bytes
from waterfill.loading import load, load_checkpoint, load_tokenizer, read_plan
from waterfill.loss import Gain
from waterfill.menu import PURPOSES, CodedBytes, Purpose, codec_names
from waterfill.pack import SENSITIVITY_FILE, pack_plan
from waterfill.plan import Plan, Unused
from waterfill.planner import EVERYTHING, Request, make_lossless_plan, make_plan
from waterfill.probe import KINDS, Probe, probe_tokens, read_text
from waterfill.sensitivity import PASSES, Method, Sensitivity, measure
from waterfill.writing import prepare_file, write_file

_log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all)."""


__all__ = [
    "Evaluation",
    "Inspection",
    "evaluate",
    "inspect",
    "load",
    "load_tokenizer",
    "pack",
    "plan",
    "read_plan",
    "sensitivity",
]


class ProbeOptions(TypedDict, total=False):
    """How sensitivities are measured."""

    probe: Literal["self", "random", "text"]
    text: str | Path | None  # with probe="text", which it implies
    sequences: int
    length: int
    seed: int
    method: Method
    revision: str | None


class PlanOptions(ProbeOptions, total=False):
    """What a plan is asked for: exactly one of size, bits, max_kl and lossless; the rest has defaults."""

    size: str | float | None  # bytes of all weight files, or "2.5GB"
    bits: float | None  # stored bits per weight of the matrices
    max_kl: float | None  # predicted loss, nats per token
    lossless: bool  # every bit is kept, and nothing but the revision is left to choose
    gain: Gain
    keep: Sequence[str]
    tie: Sequence[str]
    uniform: bool
    codecs: Sequence[str]
    purpose: Purpose  # storage: entropy-coded, the fewest bytes; memory: runs from its codes
    sensitivity: str | Path | Sensitivity | None


CHECKS = {
    "gain": choice(*get_args(Gain)),
    "purpose": choice(*PURPOSES),
    "probe": choice(*KINDS),
    "method": choice(*PASSES),
    "plan": optional(Check("a file, or a plan", lambda value: isinstance(value, Plan) or PATH.holds(value))),
    "sensitivity": optional(
        Check("a file, or sensitivities", lambda value: isinstance(value, Sensitivity) or PATH.holds(value))
    ),
}


@own_torch_modes()
@checked(ProbeOptions, **CHECKS)
def sensitivity(
    model: str | Path, *, keep: Sequence[str] = (), progress: Progress | None = None, **options: Unpack[ProbeOptions]
) -> Sensitivity:
    """Measure what a disturbance of each matrix costs the model; reuse it for any number of plans."""
    checkpoint = open_checkpoint(model, revision=options.get("revision"))
    return _measure(checkpoint, _describe(checkpoint, keep), progress, options)


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
    checkpoint = open_checkpoint(model, revision=options.get("revision"))
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
    if plan is not None and any(value is not None for name, value in options.items() if name != "revision"):
        raise WaterfillError("a plan has its budget and its choices in it; give either a plan or the options for one")
    checkpoint = open_checkpoint(model, revision=options.get("revision"))
    measured: Sensitivity | None = None
    if plan is None:
        made, measured, architecture = _plan(str(model), checkpoint, progress, options)
    else:
        made = plan if isinstance(plan, Plan) else Plan.load(Path(plan))
        architecture = _describe(checkpoint, made.keep)
    extra = {SENSITIVITY_FILE: measured.to_json().encode()} if measured else {}
    pack_plan(
        made,
        checkpoint,
        architecture,
        Path(out),
        overwrite=overwrite,
        extra=extra,
        progress=None if progress is None else lambda name, done, total: progress("packing", done, total),
    )
    return made


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
    measured = {name: tensor.t2 for name, tensor in stored.tensors.items() if tensor.codec not in (RAW, LOSSLESS)}
    return Inspection(path, stored.size_bytes, read_plan(path), measured)


def _plan(
    model: str, checkpoint: Checkpoint, progress: Progress | None, options: PlanOptions
) -> tuple[Plan, Sensitivity | None, Architecture]:
    # A local path is nobody's business; nor can a plan hold a name that is not text.
    name = _as_text(Path(model).resolve().name if Path(model).is_dir() else model)
    if options.get("lossless"):
        _check_alone(options)
        architecture = _describe(checkpoint, EVERYTHING)
        sizes = _coded_bytes(checkpoint, architecture.kept, progress)
        lossless = make_lossless_plan(name, architecture, checkpoint.fingerprint, sizes)
        return replace(lossless, unused=_unused(checkpoint, architecture)), None, architecture
    size = options.get("size")
    request = Request(
        budget=Budget(None if size is None else parse_size(size), options.get("bits"), options.get("max_kl")),
        gain=options.get("gain", "auto"),
        keep=tuple(options.get("keep", ())),
        ties=tuple(options.get("tie", ())),
        uniform=options.get("uniform", False),
        codecs=tuple(options.get("codecs", ())),
        purpose=options.get("purpose", "storage"),
    )
    architecture = _describe(checkpoint, request.keep)
    codec_names(architecture, request.codecs)  # refuses what is none, before minutes of measuring
    given = options.get("sensitivity")
    if given is None:
        measured = _measure(checkpoint, architecture, progress, cast(ProbeOptions, options))
    else:
        measured = given_sensitivity(given, checkpoint)
    sizes = _coded_bytes(checkpoint, architecture.kept, progress)
    made = make_plan(name, architecture, measured, request, sizes)
    return replace(made, unused=_unused(checkpoint, architecture)), measured, architecture


def _describe(checkpoint: Checkpoint, keep: Sequence[str]) -> Architecture:
    """The architecture; a warning says what does not fit together between config.json and the weights."""
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
    others = {"lossless", "revision"}
    given = [name for name, value in options.items() if name not in others and value not in (None, False, (), [])]
    if given:
        raise BudgetError(
            f"a lossless plan keeps every bit, whatever else is asked for; leave out "
            f"{', '.join(sorted(given))}, or lossless"
        )


def _coded_bytes(checkpoint: Checkpoint, kept: Sequence[Kept], progress: Progress | None) -> CodedBytes:
    """Sizes of losslessly coded tensors, found by coding them; with progress over those that are surely asked for."""
    total, done = sum(math.prod(tensor.shape) for tensor in kept), 0

    def step(count: int) -> None:
        nonlocal done
        done = min(done + count, total)
        if progress:
            progress("coding what is kept", done, total)

    def size(tensor: Kept | Matrix) -> int | None:
        return coded_bytes(checkpoint, tensor, step if isinstance(tensor, Kept) else None)

    return size


def given_sensitivity(given: str | Path | Sensitivity, checkpoint: Checkpoint) -> Sensitivity:
    """Sensitivities that were measured before; WaterfillError if they are not of these weights."""
    measured = given if isinstance(given, Sensitivity) else Sensitivity.load(Path(given))
    if measured.fingerprint != checkpoint.fingerprint:
        raise WaterfillError(
            f"the sensitivities are of other weights (fingerprint {measured.fingerprint}) than {checkpoint.path} "
            f"holds ({checkpoint.fingerprint}); measure them again"
        )
    return measured


def _measure(
    checkpoint: Checkpoint, architecture: Architecture, progress: Progress | None, options: ProbeOptions
) -> Sensitivity:
    text = options.get("text")
    chosen = {key: options[key] for key in ("sequences", "length", "seed") if key in options}
    probe = Probe(kind="text" if text else options.get("probe", "self"), text=Path(text) if text else None, **chosen)

    def step(what: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(what, done, total)

    tokenizer = load_tokenizer(checkpoint.path) if text else None  # before minutes of loading
    if text:
        read_text(Path(text))
    model = load_checkpoint(checkpoint)
    method = options.get("method", "fisher")
    with _failing(model, "sampling its own text", "give it one (--text), or random tokens (--probe random)"):
        tokens = probe_tokens(model, tokenizer, probe, step("sampling a probe"))
    with _failing(model, f"being measured by {method}", "the other method may do (--method), or keep all (--lossless)"):
        return measure(
            model,
            architecture.matrices,
            tokens,
            method=method,
            seed=probe.seed,
            fingerprint=checkpoint.fingerprint,
            probe={
                "kind": probe.kind,
                "sequences": tokens.shape[0],
                "length": tokens.shape[1],
                "seed": probe.seed,
                "text": _as_text(Path(text).name) if text else None,
            },
            progress=step("measuring sensitivities"),
        )


@contextmanager
def _failing(model: object, doing: str, advice: str) -> Iterator[None]:
    """What transformers' code raises becomes a sentence: a model class may lack what others have."""
    try:
        yield
    except Exception as error:
        if isinstance(error, WaterfillError) or not _raised_in("transformers", error):
            raise
        raise WaterfillError(f"{type(model).__name__} fails at {doing} ({first_line(error)}); {advice}") from error


def _raised_in(package: str, error: Exception) -> bool:
    names = (frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__))
    return any(name.partition(".")[0] == package for name in names)


def _as_text(name: str) -> str:
    """A file's name, of any bytes, as text."""
    return name.encode("utf-8", "replace").decode()
