"""Sensitivities of a checkpoint: sequences of a probe, passes of the model on some of them, until they say enough.

    checkpoint ──► own text, or another probe: sequences ──► passes: alpha, beta ──► a plan's noise, tried ──► enough?
                              └───────────── all are kept by the weights' fingerprint ─────────────┘

The model is read block by block as it is run, so that it may be larger than memory.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from waterfill.base import process
from waterfill.base.progress import LOADING, Progress, stage, step_of
from waterfill.files.architecture import Architecture
from waterfill.files.blockwise import load_blockwise
from waterfill.files.checkpoint import Checkpoint
from waterfill.files.original import load_checkpoint
from waterfill.planning.ancestral import Writer
from waterfill.planning.disturbance import Disturbance, Losses, losses
from waterfill.planning.estimators import ProbePass
from waterfill.planning.options import ProbeOptions
from waterfill.planning.pace import fast_dtype, forecast, sampling_s
from waterfill.planning.precision import PRECISION, parse_precision, relative_error
from waterfill.planning.probe import Probe
from waterfill.planning.probe_store import ProbeStore, Shelf
from waterfill.planning.probe_texts import TOGETHER, ProbeTexts, failing
from waterfill.planning.sensitivity import Method, Sensitivity, one_pass, summary, trainable
from waterfill.planning.spread import capped
from waterfill.planning.trials import Trial, error_of_trials, usable

_log = logging.getLogger(__name__)

FIRST = 4  # passes before it is asked whether they are enough
ALLOTTING = 6  # passes that a plan is made by which is then tried: its loss is not what they have to tell
PASS_TOKENS = 320  # of a pass, about: what it takes however many there are is worth some sequences
LEAST_PASSES = 4  # of a number of sequences that is asked for: their spread gives the error
WORTH_SAYING_S = 5.0  # that measuring takes, before it is said
TRIAL_TOKENS = 640  # that are tried together, about, with the same noise
EVEN_KL = 0.05  # nats per token that even noise is to cost
PLAN_SHARE = 3  # one in so many sequences is tried with a plan's noise, which costs much the same beside even noise
LEAST_SEQUENCES = 2  # that tell how well a loss is known
MEASURING = "measuring sensitivities"
TRYING = "trying the plan"


def probe_of(options: ProbeOptions, text: str | Path | None) -> Probe:
    """What to measure on: a text where there is one, else what is asked for."""
    chosen = {key: options[key] for key in ("sequences", "length", "seed") if key in options}
    return Probe(kind="text" if text else options.get("probe", "self"), text=Path(text) if text else None, **chosen)


def measure_checkpoint(
    checkpoint: Checkpoint,
    architecture: Architecture,
    progress: Progress | None,
    options: ProbeOptions,
    *,
    write: Writer | None = None,
    planned: Callable[[Sensitivity], Disturbance] | None = None,
) -> Sensitivity:
    """Measure as many sequences as are asked for; else as many as it takes for a predicted loss to be known to the
    `precision` asked for: that of what is `planned`, which is tried; without, that of an optimal allocation.

    Args:
        write: own text; transformers samples it when None.
        planned: what a plan made with sensitivities does to the matrices.

    Raises:
        WaterfillError: the model's class, or the text, does not allow it.
    """
    passes = _Measurement(checkpoint, architecture, progress, options, write)
    precision = parse_precision(options.get("precision", PRECISION))
    if planned is not None and passes.tries:
        count = min(ALLOTTING, passes.most) if passes.adaptive else passes.most
        sequences = passes.whole_parts(TOGETHER) if passes.adaptive else passes.sequences
        measured = passes.sensitivity(count, tried=sequences)
        return _tried(passes, measured, planned(measured), sequences, precision)
    if not passes.adaptive:
        return passes.sensitivity(passes.most)
    count = min(FIRST, passes.most)
    while True:
        measured = passes.sensitivity(count)
        known = relative_error(measured, architecture.matrices)
        if known <= precision or count >= passes.most:
            break
        count = min(passes.most, _more(count, known / precision))
    if known > precision:
        _tell(int(measured.probe["sequences"] or 0), known, precision)
    return measured


def _tried(
    passes: _Measurement, measured: Sensitivity, noise: Disturbance, count: int, precision: float
) -> Sensitivity:
    """With trials of a plan, on so many sequences or as many as it takes."""
    if noise.predicted(measured) <= 0:
        return measured
    while trials := passes.trials(measured, noise, count):
        known = error_of_trials(trials)
        if known <= precision or count >= passes.sequences:
            break
        count = passes.whole_parts(_more(count, known / precision))
    if trials and passes.adaptive and known > precision:
        _tell(count, known, precision)
    return replace(measured, trials=trials)


def _more(count: int, times: float) -> int:
    """How many to go on with, where so many times the error asked for is left: some at a time, the first may be odd."""
    return max(count + 1, math.ceil(count * min(2.0, times**2)))


def _tell(sequences: int, known: float, precision: float) -> None:
    _log.warning(
        "after %d sequences the predicted loss is known to ±%.0f %%, not ±%.0f %%; ask for more with --sequences",
        *(sequences, 100 * known, 100 * precision),
    )


def measured_tokens(
    checkpoint: Checkpoint,
    architecture: Architecture,
    progress: Progress | None,
    options: ProbeOptions,
    *,
    write: Writer | None = None,
) -> torch.Tensor:
    """The sequences of a probe alone, int64 `[sequences, length]`, as many as are asked for; kept, and used again."""
    return _Measurement(checkpoint, architecture, progress, options, write).tokens()


class _Measurement:
    """Passes over a probe's sequences, some at a time, each of them made once; and trials of plans on them."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        progress: Progress | None,
        options: ProbeOptions,
        write: Writer | None,
    ) -> None:
        self._checkpoint, self._matrices, self._progress = checkpoint, architecture.matrices, progress
        self._method: Method = options.get("method", "fisher")
        self._probe = probe_of(options, options.get("text"))
        self.adaptive = options.get("sequences") is None
        self._store = ProbeStore.of(checkpoint.fingerprint, kept=options.get("cache", True))
        self._texts = texts = ProbeTexts(
            checkpoint,
            self._probe,
            progress,
            self._store,
            weights=sum(math.prod(matrix.shape) for matrix in self._matrices),
            adaptive=self.adaptive,
            model=lambda: self._model,
            whole=self._method == "perturb",
            write=write,
        )
        self._each = max(1, PASS_TOKENS // texts.length)  # sequences of a pass
        self._each_tried = max(1, TRIAL_TOKENS // texts.length)
        if not self.adaptive:
            self._each = max(1, min(self._each, self._probe.sequences // LEAST_PASSES))
        windows = 0 if self.adaptive else self._probe.sequences  # of a text: they are spread over it
        self._dtype = fast_dtype(self._matrices) if self._method == "fisher" else torch.float32
        self._of_text = _digest(texts.text), windows if texts.text else 0
        self._passes = self._store.passes(
            self._matrices, *texts.key, self._each, *self._of_text, self._method, self._dtype
        )
        self._done: list[ProbePass] = []
        self._lost: dict[tuple[str, int], tuple[float, ...]] = {}  # by noise and part

    @property
    def tries(self) -> bool:
        """Whether plans can be tried: not with a model that is disturbed where it is."""
        return self._method == "fisher"

    @property
    def sequences(self) -> int:
        """Of the probe, at most."""
        return self._texts.most

    @cached_property
    def most(self) -> int:
        """Passes at most: over the sequences asked for, or over as many as there are where nobody says how many."""
        return -(-self.sequences // self._each)

    def tokens(self) -> torch.Tensor:
        """All sequences, int64 `[sequences, length]`."""
        due = self._texts.missing(self.sequences) * self._texts.length
        if (seconds := sampling_s(self._matrices, due)) >= WORTH_SAYING_S:
            _log.info("sampling %d tokens of its own text: about %.0f s on this machine", due, seconds)
        return self._texts.some(range(self.sequences), self.sequences)

    def _of_pass(self, number: int) -> range:
        """Numbers of its sequences."""
        return range(number * self._each, min((number + 1) * self._each, self.sequences))

    def _part(self, number: int, count: int) -> torch.Tensor:
        """What a pass reads, of so many, int64 `[sequences, length]`."""
        return self._texts.some(self._of_pass(number), self._of_pass(count - 1).stop)

    def sensitivity(self, count: int, *, tried: int = 0) -> Sensitivity:
        """Of the first `count` passes; so many sequences will be tried then."""
        self._reuse(count)
        if len(self._done) < count:
            self._measure_to(count, tried)
        sequences = [len(self._of_pass(number)) for number in range(count)]
        return summary(
            self._done,
            sequences,
            sum(sequences) * (self._texts.length - 1 - self._texts.lead),
            method=self._method,
            fingerprint=self._checkpoint.fingerprint,
            probe=described(self._probe, sum(sequences), self._texts.length),
        )

    def _reuse(self, count: int) -> None:
        """What was measured before."""
        begun = len(self._done)
        while len(self._done) < count and (stored := self._passes.probe_pass(len(self._done))) is not None:
            self._done.append(stored)
        if reused := sum(len(self._of_pass(number)) for number in range(begun, len(self._done))):
            _log.info("%d sequences of the probe were measured before, and are not again", reused)

    def _measure_to(self, count: int, tried: int) -> None:
        if self._method == "fisher":
            self._foretell(count, tried)
        self._part(len(self._done), count)  # sampled before it is said that measuring begins
        self._model  # noqa: B018 - and loaded
        step = step_of(self._progress, MEASURING)
        if step:
            step(len(self._done), count)
        for number in range(len(self._done), count):
            self._done.append(self._passes.probe_pass(number) or self._measure(number, count))
            if step:
                step(number + 1, count)

    def _foretell(self, count: int, tried: int) -> None:
        """What it will take, before it begins."""
        first, stop = self._of_pass(len(self._done)).start, self._of_pass(count - 1).stop
        config = self._texts.config.get_text_config()
        ahead = forecast(
            self._matrices,
            passes=count - len(self._done),
            sequences=stop - first,
            sampled=self._texts.sampled_from(first, stop),
            tried=tried,
            length=self._texts.length,
            vocabulary=getattr(config, "vocab_size", 0),
            layers=getattr(config, "num_hidden_layers", 1),
            dtype=self._dtype,
        )
        if ahead.seconds < WORTH_SAYING_S:
            return
        _log.info(
            "measuring %d tokens in %s: about %.0f s on this machine, and %.1f GB of memory%s",
            ahead.tokens,
            str(self._dtype).removeprefix("torch."),
            ahead.seconds,
            ahead.peak_bytes / 1e9,
            "; more if the prediction asks for it" if self.adaptive else "",
        )

    def _measure(self, number: int, count: int) -> ProbePass:
        part, model, method = self._part(number, count), self._model, self._method
        advice = "the other method may do (--method), or keep all (--lossless)"
        with failing(model, f"being measured by {method}", advice), trainable(model, self._matrices, method):
            measured = one_pass(
                model,
                self._matrices,
                part,
                method=method,
                seed=self._probe.seed,
                number=number,
                lead=self._texts.lead,
            )
        self._passes.keep_pass(number, measured)
        return measured

    @cached_property
    def _model(self) -> Any:
        with stage(self._progress, LOADING):
            if self._method == "perturb":  # it changes weights where they are
                return load_checkpoint(self._checkpoint)
            return load_blockwise(self._checkpoint, self._dtype)

    # -----------------------------------------------------------------------------------------------------------------
    # Trials

    def whole_parts(self, sequences: int) -> int:
        """So many, or a few more, that are tried together."""
        return min(self.sequences, -(-sequences // self._each_tried) * self._each_tried)

    def trials(self, measured: Sensitivity, plan: Disturbance, sequences: int) -> tuple[Trial, ...]:
        """What the first `sequences` lose with even noise, which is the same for every plan, and what some of them lose
        with that of a plan: but where it is so little that rough arithmetic loses as much by itself."""
        even = Disturbance.even(self._matrices, measured, EVEN_KL)
        if even.predicted(measured) <= 0:
            return ()
        told = self._dtype == torch.float32 or plan.predicted(measured) > EVEN_KL
        some = max(LEAST_SEQUENCES, -(-sequences // PLAN_SHARE))
        parts = range(-(-sequences // self._each_tried))
        begun = sum((even.digest, number) in self._lost for number in parts)
        step = step_of(self._progress, TRYING)
        process.release()  # what passes have held
        if step:
            step(begun, len(parts))
        lost: dict[Disturbance, list[float]] = {even: [], plan: []}
        for number in parts:
            both = [even, plan] if told and number * self._each_tried < some else [even]
            for noise, losses_of_part in zip(both, self._losses(number, both), strict=True):
                lost[noise] += losses_of_part
            if step and number >= begun:
                step(number + 1, len(parts))
        return usable(Trial(noise.predicted(measured), capped(values)) for noise, values in lost.items() if values)

    def _losses(self, number: int, disturbances: Sequence[Disturbance]) -> Losses:
        """Of a part of the sequences, by disturbance."""
        rows = range(number * self._each_tried, min((number + 1) * self._each_tried, self.sequences))
        due = [each for each in disturbances if (each.digest, number) not in self._lost]
        shelves = {each: self._shelf(each) for each in due}
        for each in due:
            if (known := shelves[each].losses(number)) is not None and len(known) == len(rows):
                self._lost[each.digest, number] = known
        due = [each for each in due if (each.digest, number) not in self._lost]
        if due:
            for each, lost in zip(due, self._lose(number, self._texts.some(rows, rows.stop), due), strict=True):
                shelves[each].keep_losses(number, lost)
                self._lost[each.digest, number] = lost
        return tuple(self._lost[each.digest, number] for each in disturbances)

    def _shelf(self, noise: Disturbance) -> Shelf:
        return self._store.trials(*self._texts.key, *self._of_text, self._each_tried, self._dtype, noise.digest)

    def _lose(self, number: int, part: torch.Tensor, disturbances: Sequence[Disturbance]) -> Losses:
        seed, lead = self._probe.seed * 1_000_003 + number, self._texts.lead
        with failing(self._model, "being tried with a plan's noise", "measure by the other method (--method perturb)"):
            return losses(self._model, self._matrices, part, disturbances, seed, lead=lead)


def _digest(text: str) -> str:
    return blake2b(text.encode("utf-8", "replace"), digest_size=8).hexdigest()


def described(probe: Probe, sequences: int, length: int) -> dict[str, Any]:
    """What sensitivities say of the probe that they were measured on."""
    text = as_text(probe.text.name) if probe.text else None
    return {"kind": probe.kind, "sequences": sequences, "length": length, "seed": probe.seed, "text": text}


def as_text(name: str) -> str:
    """A file's name, of any bytes, as text."""
    return name.encode("utf-8", "replace").decode()
