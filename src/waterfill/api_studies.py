"""The verbs that study a model: `compare` ways to store it, `report` on one that is packed. `api` has the others.

compare   model + text + budgets + methods ──► Comparison (compare/)
report    artifact (+ original + text) ──► Report, and its page (report/)
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import torch

from waterfill import api, files
from waterfill.ambient import own_torch_modes
from waterfill.architecture import Architecture, describe
from waterfill.arguments import PATH, POSITIVE, SIZE, checked, each
from waterfill.artifact import open_artifact
from waterfill.budget import Budget, parse_size
from waterfill.checkpoint import Checkpoint, open_checkpoint
from waterfill.compare import DEFAULT_BITS, OURS, Comparison, Method, Row, Subject, compare_methods, known, select
from waterfill.compare.cache import Results, comparisons_folder
from waterfill.errors import WaterfillError
from waterfill.evaluate import Divergence, default_context, divergence, token_ids
from waterfill.evaluate import windows as text_windows
from waterfill.loading import load_checkpoint
from waterfill.loss import Gain
from waterfill.menu import Purpose, codec_names
from waterfill.planner import Request
from waterfill.probe import Probe, probe_tokens, read_text
from waterfill.report import Report, Sample, gather, render
from waterfill.runtime.generate import Sampling, generate
from waterfill.sensitivity import Sensitivity, measure
from waterfill.writing import prepare_file, write_file

PROMPTS = ("Once upon a time", "The capital of France is", "def fibonacci(n):")
SAMPLE_TOKENS = 64
# Without the baseline that nobody ships, and without variants of what is there already.
USUAL_METHODS = ("waterfill", "bnb-*", "hqq-[2348]", "quanto-*", "torchao-*", "gptq-*", "gguf-*[!x]")


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
@checked(CompareOptions, text=PATH, sizes=each(SIZE, "sizes"), bits=each(POSITIVE, "numbers above 0"), **api.CHECKS)
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
    progress: api.Progress | None = None,
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
    checkpoint = open_checkpoint(model, revision=options.get("revision"))
    architecture = describe(checkpoint, options.get("keep", ()))
    codec_names(architecture, options.get("codecs"))  # refuses what is none, before minutes of measuring
    tokenizer = api.load_tokenizer(checkpoint.path)
    ids = token_ids(tokenizer, text)
    original = load_checkpoint(checkpoint)
    context = default_context(original) if context is None else context
    ids = text_windows(ids, context)[:max_windows].flatten()
    calibrated = any(method.calibrated for method in peers)
    measured, calibration = _measured(checkpoint, architecture, original, tokenizer, progress, options, calibrated)
    name = Path(model).resolve().name if Path(model).is_dir() else str(model)
    subject = Subject(name, checkpoint, architecture, original, measured, calibration)
    request = Request(
        Budget(bits=16.0),
        gain=options.get("gain", "auto"),
        keep=tuple(options.get("keep", ())),
        codecs=tuple(options.get("codecs", ())),
        purpose=options.get("purpose", "storage"),
    )
    return compare_methods(
        subject,
        ids,
        text=Path(text).name,
        context=context,
        methods=peers,
        ours=ours,
        budgets=budgets or [Budget(bits=rate) for rate in DEFAULT_BITS],
        request=request,
        match=match,
        batch=batch,
        progress=progress,
    )


@own_torch_modes()
@checked()
def report(
    artifact: str | Path,
    *,
    output: str | Path | None = None,
    original: str | Path | None = None,
    text: str | Path | None = None,
    context: int | None = None,
    max_windows: int | None = None,
    batch: int = 1,
    prompts: Sequence[str] | None = None,
    max_new_tokens: int = SAMPLE_TOKENS,
    revision: str | None = None,
    progress: api.Progress | None = None,
) -> Report:
    """Write one self-contained HTML page about an artifact, and return what it says.

    Args:
        output: the page; `ARTIFACT.html` beside the artifact when None.
        original: the model that was packed; with it the page shows what both write, and with a text what was lost.
        text: a text to measure on.
        prompts: what both models continue; three of ours when None, none when empty.

    Raises:
        WaterfillError: a bad artifact, model or text; a text without the original.
    """
    path = Path(artifact)
    if text is not None and original is None:
        raise WaterfillError("a measurement compares with the original; give --original MODEL beside --text")
    if revision is not None and original is None:
        raise WaterfillError(f"{path} has no revision {revision!r}, only a hub model has; leave the revision out")
    stored = open_artifact(path, verify=True)
    plan = api.read_plan(path)
    page = Path(output) if output is not None else path.resolve().with_name(path.resolve().name + ".html")
    prepare_file(page)
    found: Divergence | None = None
    samples: tuple[Sample, ...] = ()
    ids: torch.Tensor | None = None
    if original is not None:
        checkpoint = open_checkpoint(original, revision=revision)
        if checkpoint.fingerprint != plan.fingerprint:
            raise WaterfillError(
                f"{path} was packed from other weights (fingerprint {plan.fingerprint}) than {checkpoint.path} holds "
                f"({checkpoint.fingerprint}); give the model that it was packed from"
            )
        tokenizer = api.load_tokenizer(checkpoint.path)
        ids = None if text is None else token_ids(tokenizer, text)
        reference = load_checkpoint(checkpoint)
        packed = api.load(path, dtype=reference.dtype, verify=False)
        if ids is not None:
            context = default_context(reference) if context is None else context
            ids = text_windows(ids, context)[:max_windows].flatten()
            step = _step(progress, "measuring")
            found = divergence(reference, packed, ids, context=context, batch=batch, progress=step)
        chosen = PROMPTS if prompts is None else tuple(prompts)
        samples = _samples(reference, packed, tokenizer, chosen, max_new_tokens, _step(progress, "sampling"))
    compared, same_text = _compared(plan.fingerprint, ids, context)
    facts = gather(
        stored,
        plan,
        json.loads(files.read_text(path / "config.json")),
        divergence=found,
        text=None if text is None else Path(text).name,
        samples=samples,
        compared=compared,
        same_text=same_text,
        original=original is not None,
        options=_sample_options(prompts, max_new_tokens),
    )
    facts = replace(facts, path=page)
    write_file(page, render(facts))
    return facts


def _methods(patterns: Sequence[str]) -> tuple[tuple[str, ...], tuple[Method, ...]]:
    """Our own methods, and the peers, that the patterns name."""
    ours = tuple(name for name in OURS if any(fnmatchcase(name, pattern) for pattern in patterns))
    rest = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in OURS)]
    everything = [pattern for pattern in patterns if any(fnmatchcase(name, pattern) for name in known())]
    wanted = dict.fromkeys([*everything, *rest])
    return ours, select(tuple(wanted)) if wanted else ()


def _measured(
    checkpoint: Checkpoint,
    architecture: Architecture,
    model: Any,
    tokenizer: Any,
    progress: api.Progress | None,
    options: CompareOptions,
    calibrated: bool,
) -> tuple[Sensitivity, torch.Tensor | None]:
    """Sensitivities, and the tokens that calibrated peers see: those of the same probe. Both are kept on disk."""
    wanted = options.get("sensitivity")
    given = None if wanted is None else api.given_sensitivity(wanted, checkpoint)
    if given is not None and not calibrated:
        return given, None
    text = options.get("calibration")
    chosen = {key: options[key] for key in ("sequences", "length", "seed") if key in options}
    kind = "text" if text else options.get("probe", "self")
    probe = Probe(kind=kind, text=Path(text) if text else None, **chosen)
    folder = comparisons_folder() / checkpoint.fingerprint / "probes"
    digest = "" if text is None else blake2b(read_text(Path(text)).encode(), digest_size=8).hexdigest()
    identity = f"{kind}-{probe.sequences}-{probe.length}-{probe.seed}-{digest}".rstrip("-")
    tokens_file = folder / f"{identity}.tokens.json"
    try:
        tokens = torch.tensor(json.loads(tokens_file.read_text()), dtype=torch.int64)
    except (OSError, ValueError):
        tokens = probe_tokens(model, tokenizer, probe, _step(progress, "sampling a probe"))
        write_file(tokens_file, json.dumps(tokens.tolist()))
    if given is not None:
        return given, tokens
    kept = "-".join(sorted(options.get("keep", ())))
    suffix = f"-{blake2b(kept.encode(), digest_size=6).hexdigest()}" if kept else ""
    sensitivity_file = folder / f"{identity}{suffix}.sensitivity.json"
    try:
        return Sensitivity.load(sensitivity_file), tokens
    except WaterfillError:
        pass
    recorded = {"kind": kind, "sequences": tokens.shape[0], "length": tokens.shape[1], "seed": probe.seed}
    found = measure(
        model,
        architecture.matrices,
        tokens,
        seed=probe.seed,
        fingerprint=checkpoint.fingerprint,
        probe={**recorded, "text": Path(text).name if text else None},
        progress=_step(progress, "measuring sensitivities"),
    )
    write_file(sensitivity_file, found.to_json())
    return found, tokens


def _samples(
    original: Any,
    packed: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    tokens: int,
    step: Callable[[int, int], None] | None,
) -> tuple[Sample, ...]:
    """Greedy continuations of every prompt by both models."""
    chosen = Sampling(max_new_tokens=tokens, temperature=0)
    samples = []
    for number, prompt in enumerate(prompts):
        texts = ["".join(generate(model, tokenizer, prompt, chosen)) for model in (original, packed)]
        samples.append(Sample(prompt, *texts))
        if step is not None:
            step(number + 1, len(prompts))
    return tuple(samples)


def _sample_options(prompts: Sequence[str] | None, tokens: int) -> list[str]:
    """What samples were asked for, as options of the command line."""
    length = [] if tokens == SAMPLE_TOKENS else [f"--max-new-tokens {tokens}"]
    return [*(f"--prompt {shlex.quote(prompt)}" for prompt in prompts or ()), *length]


def _compared(fingerprint: str, ids: torch.Tensor | None, context: int | None) -> tuple[tuple[Row, ...], bool]:
    """What `compare` has measured of this model, on these tokens if it has seen them (then True), else on the text that
    it measured most methods on."""
    groups: dict[tuple[str, int], dict[tuple[str, str], Row]] = {}
    for key, row in Results(fingerprint).rows():
        if row.kl is not None:
            plan = str(key.get("options")) if row.family == "waterfill" else ""
            groups.setdefault((str(key.get("text")), int(key.get("context", 0))), {})[row.method, plan] = row
    here = (
        None if ids is None else groups.get((blake2b(ids.numpy().tobytes(), digest_size=8).hexdigest(), context or 0))
    )
    rows = here or max(groups.values(), key=len, default={})
    return tuple(sorted(rows.values(), key=lambda row: (row.family, row.size_bytes or 0, row.method))), here is not None


def _step(progress: api.Progress | None, what: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(what, done, total)
