"""The verb `report`: what is known of an artifact, on one page.

artifact (+ original + text) ──► facts: measured, sampled, compared ──► Report, and its page
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from waterfill.base.ambient import own_torch_modes
from waterfill.base.arguments import checked
from waterfill.base.errors import WaterfillError
from waterfill.base.progress import OPENING, READING, Progress, stage, step_of
from waterfill.base.reading import read_text
from waterfill.base.writing import prepare_file, write_file
from waterfill.evaluation import Divergence, default_context, divergence, token_ids, windows
from waterfill.files.artifact import open_artifact
from waterfill.files.checkpoint import Checkpoint, open_checkpoint
from waterfill.files.original import load_checkpoint, load_tokenizer
from waterfill.planning.plan import Plan, read_plan
from waterfill.running.hf.generate import Sampling, generate
from waterfill.running.loading import load
from waterfill.studies.comparison import Row
from waterfill.studies.comparison.cache import Results
from waterfill.studies.report import Continuation, Report, gather, render

PROMPTS = ("Once upon a time", "The capital of France is", "def fibonacci(n):")
SAMPLE_TOKENS = 64


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
    progress: Progress | None = None,
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
    with stage(progress, "checking the artifact"):
        stored = open_artifact(path, verify=True)
    plan = read_plan(path)
    page = Path(output) if output is not None else path.resolve().with_name(path.resolve().name + ".html")
    prepare_file(page)
    beside = _Beside()
    if original is not None:
        with stage(progress, OPENING):
            checkpoint = open_checkpoint(original, revision=revision)
        _check_same_weights(path, plan, checkpoint)
        written = _Prompts(PROMPTS if prompts is None else tuple(prompts), max_new_tokens)
        beside = _beside(path, checkpoint, text, context, max_windows, batch, written, progress)
    compared, same_text = _compared(plan.fingerprint, beside.ids, beside.context)
    facts = gather(
        stored,
        plan,
        json.loads(read_text(path / "config.json")),
        divergence=beside.divergence,
        text=None if text is None else Path(text).name,
        samples=beside.samples,
        compared=compared,
        same_text=same_text,
        original=original is not None,
        options=_sample_options(prompts, max_new_tokens),
        progress=progress,
    )
    facts = replace(facts, path=page)
    write_file(page, render(facts))
    return facts


@dataclass(frozen=True)
class _Prompts:
    """What both models continue, and how far."""

    texts: tuple[str, ...]
    tokens: int


@dataclass(frozen=True)
class _Beside:
    """What was found by running the artifact beside its original; nothing without one."""

    divergence: Divergence | None = None
    samples: tuple[Continuation, ...] = ()
    ids: torch.Tensor | None = None  # measured on, [tokens]
    context: int | None = None  # tokens per window


def _check_same_weights(path: Path, plan: Plan, checkpoint: Checkpoint) -> None:
    if checkpoint.fingerprint != plan.fingerprint:
        raise WaterfillError(
            f"{path} was packed from other weights (fingerprint {plan.fingerprint}) than {checkpoint.path} holds "
            f"({checkpoint.fingerprint}); give the model that it was packed from"
        )


def _beside(
    path: Path,
    checkpoint: Checkpoint,
    text: str | Path | None,
    context: int | None,
    max_windows: int | None,
    batch: int,
    prompts: _Prompts,
    progress: Progress | None,
) -> _Beside:
    """Both models in memory: measured on the text if there is one, and heard on the prompts."""
    with stage(progress, READING):
        tokenizer = load_tokenizer(checkpoint.path)
        ids = None if text is None else token_ids(tokenizer, text)
    with stage(progress, "loading both models", 2) as advance:
        reference = load_checkpoint(checkpoint)
        advance()
        packed = load(path, dtype=reference.dtype, verify=False)
    measured: Divergence | None = None
    if ids is not None:
        context = default_context(reference) if context is None else context
        ids = windows(ids, context)[:max_windows].flatten()
        step = step_of(progress, "measuring")
        measured = divergence(reference, packed, ids, context=context, batch=batch, progress=step)
    samples = _continued(reference, packed, tokenizer, prompts, progress)
    return _Beside(measured, samples, ids, context)


def _continued(
    original: Any, packed: Any, tokenizer: Any, prompts: _Prompts, progress: Progress | None
) -> tuple[Continuation, ...]:
    """Greedy continuations of every prompt by both models."""
    greedy = Sampling(max_new_tokens=prompts.tokens, temperature=0)
    samples = []
    with stage(progress, "sampling", len(prompts.texts)) as advance:
        for prompt in prompts.texts:
            texts = ["".join(generate(model, tokenizer, prompt, greedy)) for model in (original, packed)]
            samples.append(Continuation(prompt, *texts))
            advance()
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
