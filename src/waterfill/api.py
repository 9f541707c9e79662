"""The verbs: what the command line calls, and what `import waterfill` offers.

plan ──► pack ──► load ──► generate
                      └──► evaluate          inspect: what is in an artifact
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, cast

import torch
import transformers

from waterfill.architecture import Architecture, Kept, Matrix, describe
from waterfill.artifact import RAW, check_target, open_artifact
from waterfill.budget import Budget, parse_size
from waterfill.checkpoint import WEIGHT_DTYPES, Checkpoint, check_finite, open_checkpoint
from waterfill.codecs import LOSSLESS
from waterfill.errors import ArtifactError, BudgetError, WaterfillError
from waterfill.evaluate import Divergence, default_context, divergence, token_ids
from waterfill.evaluate import windows as text_windows
from waterfill.kept import coded_bytes
from waterfill.loss import Gain
from waterfill.menu import CodedBytes, Purpose
from waterfill.pack import PLAN_FILE, SENSITIVITY_FILE, pack_plan
from waterfill.plan import Plan
from waterfill.planner import EVERYTHING, Request, make_lossless_plan, make_plan
from waterfill.probe import Probe, probe_tokens
from waterfill.sensitivity import Method, Sensitivity, measure

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all)."""

_log = logging.getLogger(__name__)

FLOAT32_SHARE = 0.4  # of the free memory that a float32 copy of the model may take; else it keeps its own dtype


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

    size: str | int | None  # bytes of all weight files, or "2.5GB"
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


def sensitivity(
    model: str | Path, *, keep: Sequence[str] = (), progress: Progress | None = None, **options: Unpack[ProbeOptions]
) -> Sensitivity:
    """Measure what a disturbance of each matrix costs the model; reuse it for any number of plans."""
    checkpoint = open_checkpoint(model, revision=options.get("revision"))
    return _measure(checkpoint, describe(checkpoint, keep), progress, options)


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
        save.parent.mkdir(parents=True, exist_ok=True)  # fails before minutes of measuring, if it does
    checkpoint = open_checkpoint(model, revision=options.get("revision"))
    made, measured = _plan(str(model), checkpoint, progress, options)[:2]
    if save is not None:
        save.write_text(made.to_json(), encoding="utf-8")
        if measured is not None:
            save.with_suffix(".sensitivity.json").write_text(measured.to_json(), encoding="utf-8")
    return made


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
        architecture = describe(checkpoint, made.keep)
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


def load(artifact: str | Path, *, dtype: torch.dtype | None = None, verify: bool = True) -> Any:
    """The packed model as a transformers model, ready for `generate` and pipelines; its weights stay packed.

    Args:
        dtype: of the activations; the checkpoint's own when None.
        verify: compare every byte with its digest first.

    Raises:
        ArtifactError: torn, altered or of an unknown version.
    """
    path = Path(artifact)
    open_artifact(path, verify=verify)
    config = transformers.AutoConfig.from_pretrained(path)
    config.quantization_config["verified"] = True
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, config=config, dtype="auto" if dtype is None else dtype
    ).eval()


def load_tokenizer(path: Path) -> Any:
    """The tokenizer in the directory of a checkpoint or artifact; WaterfillError if there is none."""
    absent = WaterfillError(
        f"{path} has no tokenizer that transformers can load; put the files of the model's tokenizer there"
    )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    except Exception as error:  # each tokenizer class fails in its own way on files that are absent or damaged
        raise absent from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise absent  # without files some classes make a tokenizer that knows no text
    return tokenizer


@dataclass(frozen=True)
class Evaluation:
    """An artifact measured against the model it was packed from."""

    ppl: float  # GPTQ convention at this context
    ppl_reference: float
    kl: float  # KL(reference || packed), nats per token
    kl_stderr: float
    top1_agreement: float
    predicted_kl: float | None
    predicted_low: float | None
    predicted_high: float | None
    size_bytes: int
    context: int
    tokens: int
    divergence: Divergence


def evaluate(
    artifact: str | Path,
    against: str | Path,
    text: str | Path,
    *,
    context: int | None = None,
    max_windows: int | None = None,
    batch: int = 1,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity, KL divergence and top-1 agreement on a text file, beside the prediction.

    Args:
        context: tokens per window; 2048 or the model's positions, if that is less, when None.
        max_windows: measure on the first windows only.
    """
    path = Path(artifact)
    stored = open_artifact(path, verify=True)
    checkpoint = open_checkpoint(against, revision=revision)
    ids = _common_ids(checkpoint.path, path, Path(text))  # before minutes of loading
    reference = _load_checkpoint(checkpoint)
    packed = load(path, dtype=reference.dtype, verify=False)
    context = context or default_context(reference)
    if max_windows is not None:
        ids = text_windows(ids, context)[:max_windows].flatten()
    measured = divergence(
        reference,
        packed,
        ids,
        context=context,
        batch=batch,
        progress=None if progress is None else lambda done, total: progress("measuring", done, total),
    )
    predicted = read_plan(path).predicted if (path / PLAN_FILE).exists() else None
    return Evaluation(
        ppl=measured.ppl,
        ppl_reference=measured.ppl_reference,
        kl=measured.kl,
        kl_stderr=measured.kl_stderr,
        top1_agreement=measured.top1_agreement,
        predicted_kl=predicted.kl if predicted else None,
        predicted_low=predicted.kl_low if predicted else None,
        predicted_high=predicted.kl_high if predicted else None,
        size_bytes=stored.size_bytes,
        context=measured.context,
        tokens=measured.tokens,
        divergence=measured,
    )


def _common_ids(checkpoint: Path, artifact: Path, text: Path) -> torch.Tensor:
    """Token ids of a text, on which the tokenizers of a model and of its artifact have to agree."""
    ids = token_ids(load_tokenizer(checkpoint), text)
    try:
        tokenizer = load_tokenizer(artifact)
    except WaterfillError:
        return ids  # the model may have got its tokenizer after it was packed
    if not torch.equal(ids, token_ids(tokenizer, text)):
        raise WaterfillError(
            f"{artifact} and {checkpoint} have tokenizers that cut {text} into different tokens; "
            "give the model that the artifact was packed from"
        )
    return ids


@dataclass(frozen=True)
class Inspection:
    """What is in an artifact: the plan it was packed by, and what was measured while packing."""

    path: Path
    size_bytes: int
    plan: Plan
    measured_t2: Mapping[str, float]  # of every packed matrix


def inspect(artifact: str | Path, *, verify: bool = True) -> Inspection:
    """Open an artifact and say what is in it; `verify` reads every byte."""
    path = Path(artifact)
    stored = open_artifact(path, verify=verify)
    measured = {name: tensor.t2 for name, tensor in stored.tensors.items() if tensor.codec not in (RAW, LOSSLESS)}
    return Inspection(path, stored.size_bytes, read_plan(path), measured)


def read_plan(artifact: Path) -> Plan:
    """The plan that an artifact was packed by."""
    if not (artifact / PLAN_FILE).exists():
        raise ArtifactError(f"{artifact} has no {PLAN_FILE}; give a directory that `waterfill pack` wrote")
    return Plan.load(artifact / PLAN_FILE)


def _plan(
    model: str, checkpoint: Checkpoint, progress: Progress | None, options: PlanOptions
) -> tuple[Plan, Sensitivity | None, Architecture]:
    name = Path(model).resolve().name if Path(model).is_dir() else model  # a local path is nobody's business
    if options.get("lossless"):
        _check_alone(options)
        architecture = describe(checkpoint, EVERYTHING)
        sizes = _coded_bytes(checkpoint, architecture.kept, progress)
        return make_lossless_plan(name, architecture, checkpoint.fingerprint, sizes), None, architecture
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
    architecture = describe(checkpoint, request.keep)
    given = options.get("sensitivity")
    if given is None:
        measured = _measure(checkpoint, architecture, progress, cast(ProbeOptions, options))
    else:
        measured = given if isinstance(given, Sensitivity) else Sensitivity.load(Path(given))
        if measured.fingerprint != checkpoint.fingerprint:
            raise WaterfillError(
                f"the sensitivities are of other weights (fingerprint {measured.fingerprint}) than {checkpoint.path} "
                f"holds ({checkpoint.fingerprint}); measure them again"
            )
    sizes = _coded_bytes(checkpoint, architecture.kept, progress)
    return make_plan(name, architecture, measured, request, sizes), measured, architecture


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


def _measure(
    checkpoint: Checkpoint, architecture: Architecture, progress: Progress | None, options: ProbeOptions
) -> Sensitivity:
    text = options.get("text")
    chosen = {key: options[key] for key in ("sequences", "length", "seed") if key in options}
    probe = Probe(kind="text" if text else options.get("probe", "self"), text=Path(text) if text else None, **chosen)

    def step(what: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(what, done, total)

    tokenizer = load_tokenizer(checkpoint.path) if text else None  # before minutes of loading
    model = _load_checkpoint(checkpoint)
    tokens = probe_tokens(model, tokenizer, probe, step("sampling a probe"))
    return measure(
        model,
        architecture.matrices,
        tokens,
        method=options.get("method", "fisher"),
        seed=probe.seed,
        fingerprint=checkpoint.fingerprint,
        probe={
            "kind": probe.kind,
            "sequences": tokens.shape[0],
            "length": tokens.shape[1],
            "seed": probe.seed,
            "text": Path(text).name if text else None,
        },
        progress=step("measuring sensitivities"),
    )


def _load_checkpoint(checkpoint: Checkpoint) -> Any:
    """The original model: in float32, where products are exact enough and CPUs are fast, unless memory forbids it.

    Raises CheckpointError for NaN or infinite weights, whose traces in the model's outputs would name no tensor.
    """
    for tensor in checkpoint.tensors.values():
        if tensor.dtype in WEIGHT_DTYPES:
            check_finite(checkpoint.read(tensor.name), tensor.name, tensor.file)
    weights = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    dtype: torch.dtype | str = torch.float32
    if 4 * weights > FLOAT32_SHARE * _free_memory_bytes():
        dtype = "auto"
        _log.warning("%s is measured in its own dtype: a float32 copy would not fit in memory", checkpoint.path)
    return transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint.path, dtype=dtype, experts_implementation="eager"
    ).eval()


def _free_memory_bytes() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024.0 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))
    except (OSError, StopIteration):
        return math.inf
