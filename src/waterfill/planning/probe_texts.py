"""The sequences of a probe, as they are asked for: own text sampled some at a time, or windows that are there at once.

    number ──► sampled before? (`ProbeStore`) ──► written now, with the sequences after it ──► token ids [length]

Sequence k is the same whoever else is asked for, so that a longer probe begins as a shorter one does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch
import transformers

from waterfill.base.errors import UnsupportedError, WaterfillError, first_line
from waterfill.base.progress import Progress, step_of
from waterfill.files.checkpoint import Checkpoint
from waterfill.files.context import context_length
from waterfill.files.original import fits, load_checkpoint, load_tokenizer
from waterfill.planning.ancestral import Writer, start_token
from waterfill.planning.probe import MOST_SEQUENCES, Probe, lead_of, own_text, probe_tokens, read_text, spread_windows
from waterfill.planning.probe_store import ProbeStore

_log = logging.getLogger(__name__)

TOGETHER = 24  # of own text that are sampled at once: more cost little beside these
HELD_WEIGHTS = 1 << 28  # of a model whose codes stay in memory from one sampling to the next; larger are packed anew
SAMPLING = "sampling a probe"


class ProbeTexts:
    """Of one probe of one model.

    Args:
        weights: of the model; all own text of a large one is sampled at once.
        adaptive: nobody says how many sequences there are to be: as many as it takes.
        model: the model as it is measured, to tokenize and sample with.
        whole: whether that is in memory as a whole.
        write: own text; transformers samples it when None.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        probe: Probe,
        progress: Progress | None,
        store: ProbeStore,
        *,
        weights: int,
        adaptive: bool,
        model: Callable[[], Any],
        whole: bool,
        write: Writer | None,
    ) -> None:
        self._checkpoint, self._probe, self._progress = checkpoint, probe, progress
        self._adaptive, self._model, self._whole, self._write = adaptive, model, whole, write
        self._together = TOGETHER if weights <= HELD_WEIGHTS else MOST_SEQUENCES
        self.text = read_text(probe.text) if probe.text else ""  # before minutes of loading
        self._tokenizer = load_tokenizer(checkpoint.path) if probe.text else None
        self._start = _text_start(checkpoint.path, self.config) if probe.kind == "self" else None
        self.key = probe.kind, probe.length, probe.seed, write is None, self._start  # what decides the sequences
        self._kept = store.text(*self.key)
        self._fresh: dict[int, torch.Tensor] = {}

    @cached_property
    def config(self) -> Any:
        """The model's."""
        return transformers.AutoConfig.from_pretrained(self._checkpoint.path, trust_remote_code=False)

    @cached_property
    def length(self) -> int:
        """Tokens of a sequence: those asked for, or as many as the model reads."""
        return min(self._probe.length, context_length(self.config) or self._probe.length)

    @cached_property
    def lead(self) -> int:
        """Tokens at the beginning of each that only give context."""
        return lead_of(self.length)

    @cached_property
    def most(self) -> int:
        """Sequences at most: those asked for, or as many as there are where nobody says how many."""
        if not self._adaptive:
            return self._probe.sequences
        return len(self._given) if self._probe.kind == "text" else MOST_SEQUENCES

    def some(self, numbers: range, last: int) -> torch.Tensor:
        """These sequences, of which `last` will be asked for in all; int64 `[sequences, length]`."""
        return torch.stack([self._sequence(number, last) for number in numbers])

    def missing(self, last: int) -> int:
        """How many of the first `last` are to be sampled yet."""
        if self._probe.kind != "self":
            return 0
        return sum(self._own(number) is None for number in range(last))

    def due(self, number: int, last: int) -> range:
        """What is sampled together where sequence `number` is not there yet."""
        return range(number, max(last, number + self._together) if self._adaptive else last)

    def sampled_from(self, number: int, last: int) -> int:
        """Sequences that are sampled first where this one is asked for."""
        if self._probe.kind != "self" or self._own(number) is not None:
            return 0
        return len(self.due(number, last))

    def _sequence(self, number: int, last: int) -> torch.Tensor:
        """int64 `[length]`."""
        if self._probe.kind != "self":
            return self._given[number]
        if (known := self._own(number)) is None:
            self._sample(self.due(number, last))
            known = self._fresh[number]
        return known

    def _own(self, number: int) -> torch.Tensor | None:
        """Own text, as far as it was sampled: now, or before."""
        fresh = self._fresh.get(number)
        known = self._kept.sequence(number) if fresh is None else fresh
        return None if known is None or len(known) != self.length else known

    def _sample(self, numbers: range) -> None:
        missing = [number for number in numbers if self._own(number) is None]
        for number, sequence in zip(missing, self._written(missing), strict=True):
            self._kept.keep_sequence(number, sequence)
            self._fresh[number] = sequence

    def _written(self, numbers: list[int]) -> torch.Tensor:
        """By who was given to write, or else by the model itself, loaded as a whole where it fits in memory."""
        step, length, seed, start = step_of(self._progress, SAMPLING), self.length, self._probe.seed, self._start
        if self._write is not None:
            with suppress(UnsupportedError):  # it has said why
                return self._write(numbers, length, seed, step, start=start)
        loaded = self._whole or not fits(self._checkpoint)
        model = self._model() if loaded else load_checkpoint(self._checkpoint)
        with failing(model, "sampling its own text", "give it one (--text), or random tokens (--probe random)"):
            return own_text(model, numbers, length, seed, step, start=start)

    @cached_property
    def _given(self) -> torch.Tensor:
        """All sequences that there are without sampling, int64 `[sequences, length]`, the first ones of them spread as
        the others are."""
        if self._adaptive and self._probe.kind == "text":
            return spread_windows(self._model(), self._tokenizer, self._probe)
        return probe_tokens(self._model(), self._tokenizer, self._probe)


def _text_start(path: Path, config: Any) -> int | None:
    """The token that sampling starts from, where the tokenizer puts it before texts, or nobody knows. All attention
    falls back on a first token, and disturbing one that no text has may cost many times as much."""
    start = start_token(config)
    try:
        tokenizer = load_tokenizer(path)
    except WaterfillError:
        return start
    return start if start in tokenizer("a", verbose=False)["input_ids"][:1] else None


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
