"""Sensitivities of a checkpoint: sequences of a probe, passes of the model on some of them, until they say enough.

    checkpoint ──► own text, or another probe: sequences ──► pass k: alpha, beta ──► enough? ──► Sensitivity
                              └───── both are kept by the weights' fingerprint ─────┘

The model is read block by block as it is run, so that it may be larger than memory.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from hashlib import blake2b
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch
import transformers

from waterfill.base.errors import UnsupportedError, WaterfillError, first_line
from waterfill.base.progress import LOADING, Progress, stage, step_of
from waterfill.files.architecture import Architecture
from waterfill.files.blockwise import load_blockwise
from waterfill.files.checkpoint import Checkpoint
from waterfill.files.context import context_length
from waterfill.files.original import fits, load_checkpoint, load_tokenizer
from waterfill.planning.ancestral import Writer, start_token
from waterfill.planning.estimators import ProbePass
from waterfill.planning.options import ProbeOptions
from waterfill.planning.pace import fast_dtype, forecast, sampling_s
from waterfill.planning.precision import PRECISION, parse_precision, relative_error
from waterfill.planning.probe import (
    MOST_SEQUENCES,
    Probe,
    lead_of,
    own_text,
    probe_tokens,
    read_text,
    spread_windows,
)
from waterfill.planning.probe_store import ProbeStore
from waterfill.planning.sensitivity import Method, Sensitivity, one_pass, summary, trainable

_log = logging.getLogger(__name__)

FIRST = 4  # passes before it is asked whether they are enough
PASS_TOKENS = 320  # of a pass, about: what it takes however many there are is worth some sequences
LEAST_PASSES = 4  # of a number of sequences that is asked for: their spread gives the error
WORTH_SAYING_S = 5.0  # that measuring takes, before it is said
TOGETHER = 24  # of own text that are sampled at once: more cost little beside these
MEASURING = "measuring sensitivities"
SAMPLING = "sampling a probe"

Error = Callable[[Sensitivity], float]
"""How well what is to be known is known from sensitivities: half of a 95 % interval, as a share."""


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
    error: Error | None = None,
) -> Sensitivity:
    """Measure as many sequences as are asked for; else as many as it takes for `error`, that of a predicted loss, to
    be below the `precision` asked for.

    Args:
        write: own text; transformers samples it when None.
        error: of an optimal allocation's loss when None.

    Raises:
        WaterfillError: the model's class, or the text, does not allow it.
    """
    passes = _Measurement(checkpoint, architecture, progress, options, write)
    if options.get("sequences") is not None:
        return passes.sensitivity(passes.most)
    error = error or partial(relative_error, matrices=architecture.matrices)
    precision = parse_precision(options.get("precision", PRECISION))
    count = min(FIRST, passes.most)
    while True:
        measured = passes.sensitivity(count)
        known = error(measured)
        if known <= precision or count >= passes.most:
            break
        count = min(passes.most, max(count + 1, math.ceil(count * min(2.0, (known / precision) ** 2))))
    if known > precision:
        _log.warning(
            "after %d sequences the predicted loss is known to ±%.0f %%, not ±%.0f %%; ask for more with --sequences",
            *(measured.probe["sequences"], 100 * known, 100 * precision),
        )
    return measured


def measured_tokens(
    checkpoint: Checkpoint,
    architecture: Architecture,
    progress: Progress | None,
    options: ProbeOptions,
    *,
    write: Writer | None = None,
) -> torch.Tensor:
    """The sequences of a probe alone, int64 `[sequences, length]`, as many as are asked for; kept, and used again."""
    passes = _Measurement(checkpoint, architecture, progress, options, write)
    return passes.tokens()


class _Measurement:
    """Passes over a probe's sequences, some at a time, each of them made once."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        progress: Progress | None,
        options: ProbeOptions,
        write: Writer | None,
    ) -> None:
        self._checkpoint, self._matrices, self._progress = checkpoint, architecture.matrices, progress
        self._write = write
        self._method: Method = options.get("method", "fisher")
        self._probe = probe_of(options, options.get("text"))
        self._adaptive = options.get("sequences") is None
        text = read_text(self._probe.text) if self._probe.text else ""  # before minutes of loading
        self._tokenizer = load_tokenizer(checkpoint.path) if self._probe.text else None
        own = self._probe.kind == "self"
        self._dropped = int(own and _starts_unseen(checkpoint.path, self._config, self._length))  # first tokens
        store = ProbeStore.of(checkpoint.fingerprint, kept=options.get("cache", True))
        self._each = max(1, PASS_TOKENS // self._length)  # sequences of a pass
        if not self._adaptive:
            self._each = max(1, min(self._each, self._probe.sequences // LEAST_PASSES))
        probe = self._probe.kind, self._probe.length, self._probe.seed, write is None, self._dropped
        windows = 0 if self._adaptive else self._probe.sequences  # of a text: they are spread over it
        self._dtype = fast_dtype(self._matrices) if self._method == "fisher" else torch.float32
        self._texts = store.text(*probe)
        self._passes = store.passes(
            self._matrices, *probe, self._each, _digest(text), windows if text else 0, self._method, self._dtype
        )
        self._done: list[ProbePass] = []

    @cached_property
    def most(self) -> int:
        """Passes at most: over the sequences asked for, or over as many as there are where nobody says how many."""
        return -(-self._sequences // self._each)

    @cached_property
    def _sequences(self) -> int:
        if not self._adaptive:
            return self._probe.sequences
        return len(self._given) if self._probe.kind == "text" else MOST_SEQUENCES

    def _of_pass(self, number: int) -> range:
        """Numbers of its sequences."""
        return range(number * self._each, min((number + 1) * self._each, self._sequences))

    def sensitivity(self, count: int) -> Sensitivity:
        """Of the first `count` passes."""
        self._reuse(count)
        if len(self._done) < count:
            self._measure_to(count)
        sequences = [len(self._of_pass(number)) for number in range(count)]
        return summary(
            self._done,
            sequences,
            sum(sequences) * (self._length - 1 - self._lead),
            method=self._method,
            fingerprint=self._checkpoint.fingerprint,
            probe=described(self._probe, sum(sequences), self._length),
        )

    def _reuse(self, count: int) -> None:
        """What was measured before."""
        begun = len(self._done)
        while len(self._done) < count and (stored := self._passes.probe_pass(len(self._done))) is not None:
            self._done.append(stored)
        if reused := sum(len(self._of_pass(number)) for number in range(begun, len(self._done))):
            _log.info("%d sequences of the probe were measured before, and are not again", reused)

    def _measure_to(self, count: int) -> None:
        if self._method == "fisher":
            self._foretell(count)
        self._part(len(self._done), count)  # sampled before it is said that measuring begins
        self._model  # noqa: B018 - and loaded
        step = step_of(self._progress, MEASURING)
        if step:
            step(len(self._done), count)
        for number in range(len(self._done), count):
            self._done.append(self._passes.probe_pass(number) or self._measure(number, count))
            if step:
                step(number + 1, count)

    def _foretell(self, count: int) -> None:
        """What it will take, before it begins."""
        due = self._due(self._of_pass(len(self._done)).start, count) if self._probe.kind == "self" else ()
        sampled = 0 if not due or self._own(due[0]) is not None else len(due)
        config = self._config.get_text_config()
        ahead = forecast(
            self._matrices,
            passes=count - len(self._done),
            sequences=self._of_pass(count - 1).stop - self._of_pass(len(self._done)).start,
            sampled=sampled,
            length=self._length,
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
            "; more if the prediction asks for it" if self._adaptive else "",
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
                lead=self._lead,
            )
        self._passes.keep_pass(number, measured)
        return measured

    @cached_property
    def _model(self) -> Any:
        with stage(self._progress, LOADING):
            if self._method == "perturb":  # it changes weights where they are
                return load_checkpoint(self._checkpoint)
            return load_blockwise(self._checkpoint, self._dtype)

    @cached_property
    def _length(self) -> int:
        """Tokens of a sequence: those asked for, or as many as the model reads."""
        return min(self._probe.length, context_length(self._config) or self._probe.length)

    @cached_property
    def _lead(self) -> int:
        return lead_of(self._length)

    @cached_property
    def _config(self) -> Any:
        return transformers.AutoConfig.from_pretrained(self._checkpoint.path, trust_remote_code=False)

    # -----------------------------------------------------------------------------------------------------------------
    # Tokens

    def tokens(self) -> torch.Tensor:
        """Of all passes, int64 `[sequences, length]`."""
        if self._probe.kind == "self":
            due = sum(self._own(number) is None for number in range(self._sequences)) * self._length
            if (seconds := sampling_s(self._matrices, due)) >= WORTH_SAYING_S:
                _log.info("sampling %d tokens of its own text: about %.0f s on this machine", due, seconds)
        return torch.cat([self._part(number, self.most) for number in range(self.most)])

    def _part(self, number: int, count: int) -> torch.Tensor:
        """What a pass reads, of so many, int64 `[sequences, length]`."""
        return torch.stack([self._sequence(each, count) for each in self._of_pass(number)])

    def _sequence(self, number: int, count: int) -> torch.Tensor:
        """int64 `[length]`."""
        if self._probe.kind != "self":
            return self._given[number]
        if (known := self._own(number)) is None:
            self._sample(self._due(number, count))
            known = self._fresh[number]
        return known

    def _due(self, number: int, count: int) -> range:
        """What is sampled together where sequence `number` is not there yet, for so many passes."""
        last = self._of_pass(count - 1).stop
        return range(number, max(last, number + TOGETHER) if self._adaptive else last)

    @cached_property
    def _fresh(self) -> dict[int, torch.Tensor]:
        return {}

    def _own(self, number: int) -> torch.Tensor | None:
        """Own text, as far as it was sampled: now, or before."""
        fresh = self._fresh.get(number)
        known = self._texts.sequence(number) if fresh is None else fresh
        return None if known is None or len(known) != self._length else known

    def _sample(self, numbers: range) -> None:
        missing = [number for number in numbers if self._own(number) is None]
        for number, sequence in zip(missing, self._written(missing), strict=True):
            self._texts.keep_sequence(number, sequence)
            self._fresh[number] = sequence

    def _written(self, numbers: list[int]) -> torch.Tensor:
        """By who was given to write, or else by the model itself, loaded as a whole where it fits in memory."""
        step, seed = step_of(self._progress, SAMPLING), self._probe.seed
        length = self._length + self._dropped
        if self._write is not None:
            with suppress(UnsupportedError):  # it has said why
                return self._write(numbers, length, seed, step)[:, self._dropped :]
        loaded = self._method == "perturb" or not fits(self._checkpoint)
        model = self._model if loaded else load_checkpoint(self._checkpoint)
        with failing(model, "sampling its own text", "give it one (--text), or random tokens (--probe random)"):
            return own_text(model, numbers, length, seed, step)[:, self._dropped :]

    @cached_property
    def _given(self) -> torch.Tensor:
        """All sequences that there are without sampling, int64 `[sequences, length]`, the first ones of them spread as
        the others are."""
        if self._adaptive and self._probe.kind == "text":
            return spread_windows(self._model, self._tokenizer, self._probe)
        return probe_tokens(self._model, self._tokenizer, self._probe)


def _starts_unseen(path: Path, config: Any, length: int) -> bool:
    """Whether the token that own text begins with is none that texts begin with: the tokenizer puts none before them.
    All attention falls back on a first token, and disturbing one that no text has may cost many times as much."""
    start, most = start_token(config), context_length(config)
    if start is None or (most is not None and length + 1 > most):
        return False
    try:
        tokenizer = load_tokenizer(path)
    except WaterfillError:
        return False
    return start not in tokenizer("a", verbose=False)["input_ids"][:1]


def _digest(text: str) -> str:
    return blake2b(text.encode("utf-8", "replace"), digest_size=8).hexdigest()


def described(probe: Probe, sequences: int, length: int) -> dict[str, Any]:
    """What sensitivities say of the probe that they were measured on."""
    text = as_text(probe.text.name) if probe.text else None
    return {"kind": probe.kind, "sequences": sequences, "length": length, "seed": probe.seed, "text": text}


@contextmanager
def failing(model: object, doing: str, advice: str) -> Iterator[None]:
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
