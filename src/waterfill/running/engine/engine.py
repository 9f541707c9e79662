"""A packed model ready to talk: its weights, its tokenizer and its own choices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from waterfill.base.arguments import CacheBits, checked
from waterfill.files.artifact import open_artifact
from waterfill.files.settings.messages import Message
from waterfill.running.engine.cache import Sequence as EngineSequence
from waterfill.running.engine.families.llama_spec import read_spec
from waterfill.running.engine.opening import open_model
from waterfill.running.streaming.fit import Form
from waterfill.running.streaming.streamer import Streamer
from waterfill.running.streaming.tuning import GIVEN, USUAL, Tuning
from waterfill.running.text.batch import TOGETHER, Generations, generate_many
from waterfill.running.text.defaults import read_defaults
from waterfill.running.text.generation import Generation, generate
from waterfill.running.text.model import Sequences
from waterfill.running.text.sampling import Sampling
from waterfill.running.text.tokenizer_files import load_tokenizer


class Engine:
    """A packed model of a family that the engine knows, run without torch and transformers.

        engine = waterfill.Engine("out", memory="1GB")
        for piece in engine.generate("Once upon a time", temperature=0):
            print(piece, end="")

    Args:
        memory: what the process may take in all, in bytes or as "1GB"; as much as is free when None.
        memory_form: "levels", "codes" or "auto", as of `waterfill.load`.
        rate: bits per weight to read at most, of an artifact that was packed at several rates.
        streamed: whether weights come from storage for every token; None streams what does not fit.
        verify: compare every byte with its digest first.
        tuning: sizes and times of streaming; other ones are for tests and benchmarks.
        kv: bits of keys and values in the cache, 8, 5, 4 or 3, or of each, as "5,4"; 16, also when None, are numbers as
            they are.

    Raises:
        UnsupportedError: a model that takes transformers (`waterfill.load`), or no native library; says why.
        ArtifactError: torn, altered or of an unknown version.
        WaterfillError: `memory` is not a size, or too small for the model even when it is streamed.
    """

    @checked(tuning=GIVEN)
    def __init__(
        self,
        artifact: str | Path,
        *,
        memory: str | float | None = None,
        memory_form: Form = "auto",
        rate: float | None = None,
        streamed: bool | None = None,
        verify: bool = True,
        tuning: Tuning = USUAL,
        kv: CacheBits = None,
    ) -> None:
        opened = open_artifact(Path(artifact), verify=False)
        if verify:
            opened.verify_files()  # before anything else is made of them
        read_spec(opened)  # what takes transformers is found before any weights are read
        self.defaults = read_defaults(opened.path)
        self.tokenizer = load_tokenizer(opened.path)
        self.model = open_model(
            opened,
            memory=memory,
            memory_form=memory_form,
            rate=rate,
            streamed=streamed,
            verify=verify,
            tuning=tuning,
            kv=kv,
        )
        self._sequences = Sequences(self.model)

    @property
    def streaming(self) -> Streamer | None:
        """Who decodes the weights as they are multiplied; None where they are in memory as levels."""
        return self.model.streaming

    def generate(
        self,
        prompt: str | Sequence[Message],
        sampling: Sampling | None = None,
        *,
        draft: Engine | None = None,
        lookup: int | None = None,
        **overrides: Any,
    ) -> Generation:
        """Continue a text, or answer a conversation: pieces of text as they come (`text.generation.generate`).

        A prompt that begins as the last text did is read from where it differs. Any number of texts may be generated at
        the same time, in one thread or several.
        """
        return generate(
            self._sequences,
            self.tokenizer,
            prompt,
            sampling,
            defaults=self.defaults,
            draft=None if draft is None else draft._sequences,
            lookup=lookup,
            **overrides,
        )

    def generate_many(
        self,
        prompts: Sequence[str | Sequence[Message]],
        sampling: Sampling | None = None,
        *,
        lookup: int | None = None,
        together: int = TOGETHER,
        **overrides: Any,
    ) -> Generations:
        """Continue several texts at once, `together` of them in a pass over the weights: (number, piece) as they come,
        or all of them by `.texts()` (`text.batch.generate_many`)."""
        return generate_many(
            self._sequences,
            self.tokenizer,
            prompts,
            sampling,
            defaults=self.defaults,
            lookup=lookup,
            together=together,
            **overrides,
        )

    def sequence(self) -> EngineSequence:
        """A text of its own in the model's memory, to be read token by token (`sequence.forward(ids)` gives logits);
        forgotten, and its memory given back, when nobody holds it any more."""
        return self.model.sequence()
