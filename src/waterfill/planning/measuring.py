"""Sensitivities of a checkpoint: a probe is read or sampled, and the model measured on it.

checkpoint ──► model (float32) ──► probe: tokens ──► sensitivity.measure ──► Sensitivity, which says what it was made of
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch

from waterfill.base.errors import WaterfillError, first_line
from waterfill.base.progress import Progress, Step, step_of
from waterfill.files.architecture import Architecture
from waterfill.files.checkpoint import Checkpoint
from waterfill.files.original import load_checkpoint, load_tokenizer
from waterfill.planning.ancestral import Writer
from waterfill.planning.options import ProbeOptions
from waterfill.planning.probe import Probe, probe_tokens, read_text
from waterfill.planning.sensitivity import Method, Sensitivity, measure


def probe_of(options: ProbeOptions, text: str | Path | None) -> Probe:
    """What to measure on: a text where there is one, else what is asked for."""
    chosen = {key: options[key] for key in ("sequences", "length", "seed") if key in options}
    return Probe(kind="text" if text else options.get("probe", "self"), text=Path(text) if text else None, **chosen)


def measure_checkpoint(
    checkpoint: Checkpoint,
    architecture: Architecture,
    progress: Progress | None,
    options: ProbeOptions,
    writer: Writer | None = None,
) -> Sensitivity:
    """Load the model and measure it; `writer` writes its own text, or else the model. Raises WaterfillError where its
    class, or the text, does not allow it."""
    probe = probe_of(options, options.get("text"))
    tokenizer = load_tokenizer(checkpoint.path) if probe.text else None  # before minutes of loading
    if probe.text:
        read_text(probe.text)
    model = load_checkpoint(checkpoint)
    method = options.get("method", "fisher")
    with _failing(model, "sampling its own text", "give it one (--text), or random tokens (--probe random)"):
        tokens = probe_tokens(model, tokenizer, probe, step_of(progress, "sampling a probe"), writer)
    with _failing(model, f"being measured by {method}", "the other method may do (--method), or keep all (--lossless)"):
        return measure_on(
            model, checkpoint, architecture, probe, tokens, method=method, progress=step_of(progress, MEASURING)
        )


MEASURING = "measuring sensitivities"


def measure_on(
    model: Any,
    checkpoint: Checkpoint,
    architecture: Architecture,
    probe: Probe,
    tokens: torch.Tensor,
    *,
    method: Method = "fisher",
    progress: Step | None = None,
) -> Sensitivity:
    """Measure a model of a checkpoint on the tokens of a probe, int64 `[sequences, length]`."""
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
            "text": as_text(probe.text.name) if probe.text else None,
        },
        progress=progress,
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


def as_text(name: str) -> str:
    """A file's name, of any bytes, as text."""
    return name.encode("utf-8", "replace").decode()
