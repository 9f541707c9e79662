"""Calibrated rounding: tokens that moments of inputs are taken on, what feedback by them leaves, and that feedback.

    own text, or a file ──► tokens ──► moments ──► share of each matrix's loss that is left, to plan with
                                          └──────► feedback, as the matrix is packed

A plan says what it was calibrated on, so that whoever packs by it takes the same tokens. Shares are kept by the
fingerprint of the weights: another plan needs no moments, only whoever packs does.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from hashlib import blake2b
from pathlib import Path

import torch

from waterfill.base import process
from waterfill.base.errors import WaterfillError
from waterfill.base.progress import Progress, step_of
from waterfill.codecs import get_codec
from waterfill.codecs.feedback import Blocks, Feedback, Left, expected
from waterfill.codecs.nested.codec import EARLY_NOISE
from waterfill.files.architecture import Architecture
from waterfill.files.artifact.format import is_packed
from waterfill.files.checkpoint import Checkpoint
from waterfill.planning.ancestral import Writer
from waterfill.planning.inventory import PlannedMatrix
from waterfill.planning.measuring import WORTH_SAYING_S, as_text, measured_tokens
from waterfill.planning.moments import InputMoments
from waterfill.planning.options import CHECKS, PlanOptions, ProbeOptions
from waterfill.planning.pace import fast_dtype, speed
from waterfill.planning.plan import UNPROMISED, Calibration, Plan
from waterfill.planning.probe import LENGTH
from waterfill.planning.probe_store import FORGETFUL, ProbeStore, Shelf
from waterfill.planning.sensitivity import Sensitivity

_log = logging.getLogger(__name__)

VARIABLE = "WATERFILL_FEEDBACK"  # of the environment: what is done where nobody says
SELF = "self"
TOKENS = 16384  # of the model's own, or of a text; how the loss falls with them: `benchmarks.calibrated`
TEXT_LENGTH = 512  # tokens of a window of a text: they cost no sampling
MOMENTS_BYTES = 1 << 30  # that are held at a time, where there is memory
FREE_SHARE = 0.25  # of the memory that is free


def calibrated_on(
    options: PlanOptions, given: Sensitivity | None, matrices: Sequence[PlannedMatrix], codecs: Sequence[str]
) -> str | Path | None:
    """What errors are fed back by: the text that is asked for, or else the model's own, where the plan is in earnest
    about this model, and any of the codecs gains by it. None for no feedback.

    Args:
        given: sensitivities, where they are not measured now.

    Raises:
        WaterfillError: options that do not go together; a setting that there is not.
    """
    on = options.get("calibrate")
    asked = options.get("feedback") or os.environ.get(VARIABLE) or "auto"
    if not CHECKS["feedback"].holds(asked):
        raise WaterfillError(f"{VARIABLE} is {asked!r}; set it to auto or none")
    if on is not None:
        if options.get("feedback") == "none":
            raise WaterfillError("--calibrate and --feedback none do not go together; give one of them")
        return on
    guessed = options.get("alpha") == "uniform" or (given is not None and given.probe.get("kind") in UNPROMISED)
    rough = options.get("quick", False) or options.get("probe") == "random"
    if asked == "none" or guessed or rough or not any(_blocks(matrix.shape[1], codecs) for matrix in matrices):
        if "calibration_tokens" in options:
            raise WaterfillError(
                "calibration tokens are of what is calibrated on; say what (--calibrate self, or a file)"
            )
        if options.get("quick") and asked == "auto":
            _log.info("a quick plan feeds no errors back; without --quick, less is lost for the same bytes")
        return None
    return SELF


class Calibrated:
    """Error feedback for the matrices of a model, by the moments of what they are multiplied with on some tokens.

    Args:
        take: takes the moments, when somebody needs them.
        shares: of their loss that are left, by codecs; where they are kept.
    """

    def __init__(
        self,
        record: Calibration,
        take: Callable[[], InputMoments],
        shares: Callable[[Sequence[str]], Shelf],
        progress: Progress | None = None,
    ) -> None:
        self.record = record
        self._take, self._shares, self._progress = take, shares, progress
        self._feedback: tuple[str, Feedback] | None = None  # of one input at a time: it is as large as its moments

    @cached_property
    def _moments(self) -> InputMoments:
        return self._take()

    def left(self, matrices: Sequence[PlannedMatrix], codecs: Sequence[str]) -> dict[str, Left]:
        """What is left of each matrix's loss, whichever of these codecs it gets; of those that gain by feedback."""
        shelf, names = self._shares(codecs), {matrix.name for matrix in matrices}
        if (known := shelf.left()) is not None and known.keys() <= names:
            _log.info("what error feedback leaves was predicted before, and is not again")
            return known
        left = self._predicted(matrices, codecs)
        shelf.keep_left(left)
        return left

    def _predicted(self, matrices: Sequence[PlannedMatrix], codecs: Sequence[str]) -> dict[str, Left]:
        left: dict[str, Left] = {}
        by_input: dict[str, Left] = {}
        early_t2 = EARLY_NOISE if any(get_codec(name).level_count > 1 for name in codecs if is_packed(name)) else None
        step = step_of(self._progress, "predicting what feedback gains")
        for number, matrix in enumerate(matrices):
            if step:
                step(number, len(matrices))
            blocks = _blocks(matrix.shape[1], codecs)
            if not blocks or matrix.name not in self._moments.names:
                continue
            key = self._moments.leader(matrix.name)  # whose width gives the blocks
            if key not in by_input:
                by_input[key] = expected(*self._moments.of(key), blocks, self._moments.weighed(key), early_t2)
                if matrix.role != "embedding":
                    by_input[key] = by_input[key]._replace(alpha=None)  # products are all that it costs
            if by_input[key].loss < 1:
                left[matrix.name] = by_input[key]
        if step:
            step(len(matrices), len(matrices))
        return left

    def feedback(self, name: str) -> Feedback | None:
        """For a matrix; None where nothing is known of its input."""
        if name not in self._moments.names:
            return None
        leader = self._moments.leader(name)
        if self._feedback is None or self._feedback[0] != leader:
            self._feedback = None  # before there is another
            self._feedback = leader, Feedback(self._moments.of(name).both)
        return self._feedback[1]


def calibrate(
    checkpoint: Checkpoint,
    architecture: Architecture,
    on: str | Path,
    progress: Progress | None,
    options: ProbeOptions,
    *,
    tokens: int = TOKENS,
    write: Writer | None = None,
) -> Calibrated:
    """Take moments of about so many `tokens` of the model's own text ("self"), or of a text.

    Raises:
        WaterfillError: the text cannot be read, or is too short; the model cannot write text.
    """
    length = LENGTH if on == SELF else TEXT_LENGTH
    record = Calibration(
        kind="self" if on == SELF else "text",
        sequences=max(2, math.ceil(tokens / length)),
        length=length,
        seed=options.get("seed", 0),
        text=None if on == SELF else as_text(Path(on).name),
    )
    return _taken(checkpoint, architecture, record, on, progress, options, write)


def calibrated_again(
    checkpoint: Checkpoint,
    architecture: Architecture,
    plan: Plan,
    on: str | Path | None,
    progress: Progress | None,
    options: ProbeOptions,
    *,
    write: Writer | None = None,
) -> Calibrated | None:
    """What a plan was made with; None of one without feedback. `on` is the text that it was calibrated on.

    Raises:
        WaterfillError: the text is not given, or another one is.
    """
    record = plan.calibration
    if record is None:
        if on is not None:
            raise WaterfillError("the plan was made without calibration; leave it out, or make a plan with it")
        return None
    if record.kind != SELF and on in (None, SELF):
        raise WaterfillError(f"the plan was calibrated on {record.text}; give that text again (--calibrate)")
    again = _taken(checkpoint, architecture, record, on or SELF, progress, options, write)
    if again.record != record:
        raise WaterfillError(
            "the plan was calibrated on other tokens than these"
            + (f"; give the text that was {record.text}" if record.text else "; make a new plan")
        )
    return again


def _taken(
    checkpoint: Checkpoint,
    architecture: Architecture,
    record: Calibration,
    on: str | Path,
    progress: Progress | None,
    options: ProbeOptions,
    write: Writer | None,
) -> Calibrated:
    probing = ProbeOptions(sequences=record.sequences, length=record.length, seed=record.seed)
    if "cache" in options:
        probing["cache"] = options["cache"]
    if record.kind != SELF:
        probing["text"] = on
    ids = measured_tokens(checkpoint, architecture, progress, probing, write=write)
    store = ProbeStore.of(checkpoint.fingerprint, kept=options.get("cache", True))
    return on_tokens(checkpoint, architecture, ids, record, progress, store)


def on_tokens(
    checkpoint: Checkpoint,
    architecture: Architecture,
    ids: torch.Tensor,
    record: Calibration,
    progress: Progress | None = None,
    store: ProbeStore = FORGETFUL,
) -> Calibrated:
    """By the moments of these tokens, int64 `[sequences, length]`, which the record says the origin of."""
    record = replace(record, sequences=len(ids), length=ids.shape[1], tokens=_digest(ids))
    dtype = fast_dtype(architecture.matrices)

    def shares(codecs: Sequence[str]) -> Shelf:
        return store.shares(architecture.matrices, record.tokens, dtype, *codecs)

    return Calibrated(record, partial(_moments, checkpoint, architecture, ids, dtype, progress), shares, progress)


def _moments(
    checkpoint: Checkpoint,
    architecture: Architecture,
    ids: torch.Tensor,
    dtype: torch.dtype,
    progress: Progress | None,
) -> InputMoments:
    """Of these tokens; says what taking them will take."""
    moments = InputMoments(
        checkpoint,
        architecture,
        ids,
        dtype=dtype,
        limit_bytes=min(MOMENTS_BYTES, FREE_SHARE * process.free_bytes()),
        progress=progress,
    )
    operations = moments.operations + 2 * sum(math.prod(matrix.shape) for matrix in architecture.matrices)
    if (seconds := ids.numel() * operations / speed(torch.float32)) >= WORTH_SAYING_S:
        _log.info("error feedback takes moments on %d tokens: about %.0f s on this machine", ids.numel(), seconds)
    without = [m.name for m in architecture.matrices if m.name not in moments.names and m.role != "embedding"]
    if without:
        _log.info("%d matrices have no input of their own, such as %s, and no feedback", len(without), without[0])
    return moments


def _blocks(width: int, codecs: Sequence[str]) -> Blocks:
    """Those of the first codec; none where one of them has none."""
    every = [get_codec(name).feedback(width) for name in codecs if is_packed(name)]
    return every[0] if every and all(every) else ()


def _digest(tokens: torch.Tensor) -> str:
    return blake2b(tokens.contiguous().numpy().tobytes(), digest_size=8).hexdigest()
