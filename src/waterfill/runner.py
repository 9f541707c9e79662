"""Who generates: the engine where it runs the model, else transformers; a model, its draft and how to ask them.

artifact ──open_runner──┬── Engine ─────────────────────────┬──► Runner.generate(prompt) ──► pieces of text
                        └── waterfill.load, transformers ───┘
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from waterfill.errors import UnsupportedError, WaterfillError
from waterfill.sampling import GenerationStats, Message, Sampling, check_speculation
from waterfill.streaming.streamer import Streamer

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
    """Of a run. A draft is loaded first: what it takes is no longer free when the model decides what to keep."""

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


class _Native:
    def __init__(self, artifact: Path, options: Options) -> None:
        from waterfill.engine.engine import Engine

        self._lookup = options.lookup
        self._draft = None if options.draft is None else Engine(options.draft)
        self._engine = Engine(artifact, memory=options.memory)

    @property
    def streaming(self) -> Streamer | None:
        return self._engine.streaming

    def generate(self, prompt: str | Sequence[Message], sampling: Sampling) -> Any:
        return self._engine.generate(prompt, sampling, draft=self._draft, lookup=self._lookup)


class _Transformers:
    def __init__(self, artifact: Path, options: Options) -> None:
        from waterfill.loading import load, load_tokenizer

        self._lookup = options.lookup
        self._draft = None if options.draft is None else load(options.draft)
        self._model, self._tokenizer = load(artifact, memory=options.memory), load_tokenizer(artifact)

    @property
    def streaming(self) -> Streamer | None:
        found: Streamer | None = self._model.streaming
        return found

    def generate(self, prompt: str | Sequence[Message], sampling: Sampling) -> Any:
        from waterfill.runtime.generate import generate

        return generate(self._model, self._tokenizer, prompt, sampling, draft=self._draft, lookup=self._lookup)
