"""Who generates: the engine where it runs the model, else transformers; a model, its draft and how to ask them.

artifact ──open_runner──┬── Engine ─────────────────────────┬──► Runner.generate(prompt) ──► pieces of text
                        └── waterfill.load, transformers ───┘
"""

from __future__ import annotations

import gc
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from waterfill.base.errors import MemoryLimitError, UnsupportedError, WaterfillError
from waterfill.files.settings.messages import Message
from waterfill.running.streaming.streamer import Streamer
from waterfill.running.text.sampling import GenerationStats, Sampling, check_speculation

Choice = Literal["auto", "native", "transformers"]

_log = logging.getLogger("waterfill.engine")


class Pieces(Iterator[str], Protocol):
    """Text as it is generated."""

    stats: GenerationStats

    def close(self) -> None:
        """Stop."""


class Runner(Protocol):
    """A model ready to generate."""

    @property
    def streaming(self) -> Streamer | None:
        """Who reads the weights; None where they are in memory."""

    def generate(self, prompt: str | Sequence[Message], sampling: Sampling) -> Pieces:
        """Continue a text, or answer a conversation."""


@dataclass(frozen=True)
class Options:
    """Of a run. A draft is loaded first, and whole: what it takes is not free when the model decides what to keep."""

    memory: str | float | None = None
    draft: Path | None = None
    lookup: int | None = None

    def __post_init__(self) -> None:
        check_speculation(self.draft, self.lookup)


def open_runner(artifact: Path, options: Options, engine: Choice = "auto") -> Runner:
    """Open a packed model, by the engine if it can be.

    Raises WaterfillError as `waterfill.load` does, and with "native" for a model that the engine does not run.
    """
    if engine != "transformers":
        try:
            return _Native(artifact, options)
        except UnsupportedError as reason:
            if engine == "native":
                raise WaterfillError(
                    f"the native engine does not run {artifact}: {reason}; leave it to transformers"
                ) from reason
            _log.info("%s is run by transformers, slower and in more memory: %s", artifact, reason)
    return _Transformers(artifact, options)


class _Opened(ABC):
    """A model with its draft. One in memory that leaves too little of that for a text is streamed from then on."""

    def __init__(self, artifact: Path, options: Options) -> None:
        self._artifact, self._options = artifact, options
        self._draft = None if options.draft is None else self._open(options.draft, streamed=False)
        self._model = self._open(artifact, streamed=None)

    @property
    def streaming(self) -> Streamer | None:
        found: Streamer | None = self._model.streaming
        return found

    def generate(self, prompt: str | Sequence[Message], sampling: Sampling) -> Any:
        try:
            return self._ask(prompt, sampling)
        except MemoryLimitError:
            if self.streaming is not None:
                raise
        _log.info("the weights leave too little memory for the text: they are streamed from now on")
        self._model = None  # before it is opened again
        gc.collect()
        self._model = self._open(self._artifact, streamed=True)
        return self._ask(prompt, sampling)

    @abstractmethod
    def _open(self, artifact: Path, *, streamed: bool | None) -> Any:
        """A model within the limit of memory, with `streaming`."""

    @abstractmethod
    def _ask(self, prompt: str | Sequence[Message], sampling: Sampling) -> Any:
        """`Pieces` that have not begun. Raises MemoryLimitError if the text does not fit beside the weights."""


class _Native(_Opened):
    def _open(self, artifact: Path, *, streamed: bool | None) -> Any:
        from waterfill.running.engine.engine import Engine

        return Engine(artifact, memory=self._options.memory, streamed=streamed)

    def _ask(self, prompt: str | Sequence[Message], sampling: Sampling) -> Any:
        return self._model.generate(prompt, sampling, draft=self._draft, lookup=self._options.lookup)


class _Transformers(_Opened):
    def __init__(self, artifact: Path, options: Options) -> None:
        from waterfill.files.original import load_tokenizer

        super().__init__(artifact, options)
        self._tokenizer = load_tokenizer(artifact)

    def _open(self, artifact: Path, *, streamed: bool | None) -> Any:
        from waterfill.running.loading import load

        return load(artifact, memory=self._options.memory, streamed=streamed)

    def _ask(self, prompt: str | Sequence[Message], sampling: Sampling) -> Any:
        from waterfill.running.hf.generate import generate

        options = {"draft": self._draft, "lookup": self._options.lookup}
        return generate(self._model, self._tokenizer, prompt, sampling, **options)
