"""One way to generate, whichever engine runs: a packed model with its draft, and how to ask it.

artifact ──open_runner──┬── Engine ─────────────────────────┬──► Runner.generate(prompt) ──► pieces of text
                        └── waterfill.load, transformers ───┘    Runner.generate_many(prompts)
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, get_args

from waterfill.base.arguments import PATH, PLAIN_BITS, CacheBits, Check, cache_bits, checked, optional
from waterfill.base.errors import MemoryLimitError, UnsupportedError, WaterfillError
from waterfill.files.settings.messages import Message
from waterfill.running.streaming.fit import Form
from waterfill.running.streaming.streamer import Streamer
from waterfill.running.text.batch import TOGETHER, Generations
from waterfill.running.text.generation import Clock
from waterfill.running.text.sampling import GenerationStats, Sampling, check_speculation

Choice = Literal["auto", "native", "transformers"]
Prompt = str | Sequence[Message]
T = TypeVar("T")

_log = logging.getLogger("waterfill.engine")


class Pieces(Iterator[str], Protocol):
    """Text as it is generated."""

    @property
    def stats(self) -> GenerationStats:
        """Counts and times up to now."""

    def close(self) -> None:
        """Stop."""


@checked(
    draft=optional(PATH),
    adapter=optional(PATH),
    engine=Check("one of auto, native, transformers", lambda value: value in get_args(Choice)),
)
def open_runner(
    artifact: str | Path,
    *,
    memory: str | float | None = None,
    memory_form: Form = "auto",
    draft: str | Path | None = None,
    lookup: int | None = None,
    engine: Choice = "auto",
    kv: CacheBits = None,
    rate: float | None = None,
    draft_rate: float | None = None,
    adapter: str | Path | None = None,
) -> Runner:
    """Open a packed model to generate with, by the native engine if it can be.

        runner = waterfill.open_runner("out", memory="1GB")
        for piece in runner.generate("Once upon a time", temperature=0):
            print(piece, end="")

    Args:
        memory: what the process may take in all, in bytes or as "1GB"; as much as is free when None. A model that does
            not fit is streamed.
        memory_form: "levels", "codes" or "auto", as of `waterfill.load`; a draft has levels.
        draft: a smaller artifact of the same tokenizer, which drafts tokens. It is loaded first, and whole.
        lookup: draft up to so many tokens from what the text said before.
        engine: who runs the model; "auto" is "native" where that can be.
        kv: bits of keys and values, as of `Engine`, which has to run the model then; a draft's are as they are.
        rate: bits per weight to read at most, of an artifact that was packed at several; a draft's is its highest.
        draft_rate: in place of a draft, the artifact itself at this rate.
        adapter: a folder that PEFT, or `waterfill.tune`, has saved, to run with; transformers runs the model then.

    Raises:
        WaterfillError: as `waterfill.load` does, and with "native" or `kv` for a model that the engine does not run.
    """
    check_speculation(draft, lookup)
    if draft is not None and draft_rate is not None:
        raise WaterfillError(
            f"both the draft {draft} and the artifact's own rate {draft_rate:g} are to draft; leave out one of them"
        )
    check_speculation(draft_rate, lookup)
    coded = cache_bits(kv) != PLAIN_BITS
    if coded and engine == "transformers":
        raise WaterfillError(
            f"kv is {kv!r} and engine is 'transformers', which keeps keys and values as they are; leave one of them out"
        )
    if adapter is not None:
        if coded or engine == "native":
            raise WaterfillError(
                f"the adapter {adapter} takes transformers, which runs neither with engine='native' nor with codes of "
                "keys and values (kv); leave those out"
            )
        from waterfill.running.hf.adapters import check_adapter

        check_adapter(Path(adapter))
        engine = "transformers"
    arguments = (
        Path(artifact),
        memory,
        memory_form,
        None if draft is None else Path(draft),
        lookup,
        kv,
        rate,
        draft_rate,
    )
    if engine != "transformers":
        try:
            return _Native(*arguments)
        except UnsupportedError as reason:
            if coded:
                raise WaterfillError(
                    f"kv is {kv!r}, which takes the native engine, and that does not run {artifact} so: {reason}; "
                    "leave kv out"
                ) from reason
            if engine == "native":
                raise WaterfillError(
                    f"the native engine does not run {artifact}: {reason}; leave it to transformers"
                ) from reason
            _log.info("%s is run by transformers, slower and in more memory: %s", artifact, reason)
    return _Transformers(*arguments, adapter=None if adapter is None else Path(adapter))


class Runner(ABC):
    """A packed model ready to generate, with its draft; `open_runner` makes one. Several threads may ask it.

    Levels that leave too little memory for a text are streamed from then on, unless they were asked for.
    """

    def __init__(
        self,
        artifact: Path,
        memory: str | float | None,
        form: Form,
        draft: Path | None,
        lookup: int | None,
        kv: CacheBits,
        rate: float | None,
        draft_rate: float | None,
    ) -> None:
        self._artifact, self._memory, self._form, self._lookup = artifact, memory, form, lookup
        self._own: dict[str, Any] = {"kv": kv, "rate": rate}  # of the model, not of its draft
        self._opening = threading.RLock()  # texts begin one after the other, and then run beside each other
        if draft_rate is not None:
            self._draft = self._open(artifact, streamed=False, rate=draft_rate)
        else:
            self._draft = None if draft is None else self._open(draft, streamed=False)
        self._model = self._open(artifact, form=form, **self._own)

    @property
    def streaming(self) -> Streamer | None:
        """Who decodes the weights as they are multiplied; None where they are in memory as levels."""
        streamer: Streamer | None = self._model.streaming
        return streamer

    def generate(self, prompt: Prompt, sampling: Sampling | None = None, **overrides: Any) -> Pieces:
        """Continue a text, or answer a conversation: pieces of text as they come.

        `overrides` replace fields of `sampling`.

        Raises:
            WaterfillError: that cannot be asked.
            MemoryLimitError: the text does not fit in memory.
        """
        chosen = replace(sampling or Sampling(), **overrides)
        pieces: Pieces = self._within_memory(lambda: self._ask(prompt, chosen))
        return pieces

    def generate_many(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | None = None,
        *,
        together: int = TOGETHER,
        **overrides: Any,
    ) -> Generations:
        """Continue several texts: (number of the prompt, piece) as they come, or all of them by `.texts()`.

        The native engine has `together` of them in a pass over the weights; transformers writes one after another. A
        draft is not used, look-up is.
        """
        chosen = replace(sampling or Sampling(), **overrides)
        return self._within_memory(lambda: self._ask_many(prompts, chosen, together))

    def _within_memory(self, ask: Callable[[], T]) -> T:
        with self._opening:
            try:
                return ask()
            except MemoryLimitError:
                if self.streaming is not None or self._form != "auto":
                    raise
            _log.info("the weights leave too little memory for the text: they are streamed from now on")
            self._model = None  # before it is opened again
            gc.collect()
            self._model = self._open(self._artifact, streamed=True, **self._own)
            return ask()

    @abstractmethod
    def _open(
        self,
        artifact: Path,
        *,
        streamed: bool | None = None,
        form: Form = "auto",
        kv: CacheBits = None,
        rate: float | None = None,
    ) -> Any:
        """A model within the limit of memory, with `streaming`."""

    @abstractmethod
    def _ask(self, prompt: Prompt, sampling: Sampling) -> Any:
        """`Pieces` that have not begun. Raises MemoryLimitError if the text does not fit beside the weights."""

    @abstractmethod
    def _ask_many(self, prompts: Sequence[Prompt], sampling: Sampling, together: int) -> Generations:
        """The same for several texts."""


class _Native(Runner):
    def _open(self, artifact: Path, *, form: Form = "auto", **options: Any) -> Any:
        from waterfill.running.engine.engine import Engine

        return Engine(artifact, memory=self._memory, memory_form=form, **options)

    def _ask(self, prompt: Prompt, sampling: Sampling) -> Any:
        return self._model.generate(prompt, sampling, draft=self._draft, lookup=self._lookup)

    def _ask_many(self, prompts: Sequence[Prompt], sampling: Sampling, together: int) -> Generations:
        generations: Generations = self._model.generate_many(prompts, sampling, lookup=self._lookup, together=together)
        return generations


class _Transformers(Runner):
    def __init__(self, artifact: Path, *arguments: Any, adapter: Path | None) -> None:
        from waterfill.files.original import load_tokenizer

        self._adapter = adapter
        super().__init__(artifact, *arguments)
        self._tokenizer = load_tokenizer(artifact)

    def _open(self, artifact: Path, *, form: Form = "auto", kv: CacheBits = None, **options: Any) -> Any:
        from waterfill.running.hf.adapters import put_adapter
        from waterfill.running.loading import load

        model = load(artifact, memory=self._memory, memory_form=form, **options)
        if self._adapter is not None and artifact == self._artifact:  # another model that drafts has none
            put_adapter(model, self._adapter)
        return model

    def _ask(self, prompt: Prompt, sampling: Sampling) -> Any:
        from waterfill.running.hf.generate import generate

        options = {"draft": self._draft, "lookup": self._lookup}
        return generate(self._model, self._tokenizer, prompt, sampling, **options)

    def _ask_many(self, prompts: Sequence[Prompt], sampling: Sampling, together: int) -> Generations:
        first = [self._ask(prompt, sampling) for prompt in prompts[:1]]  # what cannot be said is refused now
        clock = Clock()
        return Generations(self._one_by_one(first, prompts, sampling, clock), clock, len(prompts))

    def _one_by_one(
        self, asked: list[Pieces], prompts: Sequence[Prompt], sampling: Sampling, clock: Clock
    ) -> Generator[tuple[int, str], None, None]:
        clock.start()
        for number, prompt in enumerate(prompts):
            stream = asked.pop() if asked else self._ask(prompt, sampling)
            with contextlib.closing(stream):
                counted = 0
                for piece in stream:
                    clock.count(stream.stats.tokens - counted)
                    counted = stream.stats.tokens
                    yield number, piece
