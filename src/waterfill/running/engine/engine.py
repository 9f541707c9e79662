"""A packed model ready to talk: its weights, its tokenizer and its own choices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from waterfill.base.arguments import checked
from waterfill.files.artifact import open_artifact
from waterfill.files.settings.messages import Message
from waterfill.running.engine.families.llama_spec import read_spec
from waterfill.running.engine.opening import open_model
from waterfill.running.streaming.streamer import Streamer
from waterfill.running.streaming.tuning import GIVEN, USUAL, Tuning
from waterfill.running.text.defaults import read_defaults
from waterfill.running.text.generation import Generation, generate
from waterfill.running.text.sampling import Sampling
from waterfill.running.text.tokenizer_files import load_tokenizer


class Engine:
    """A packed model of the Llama kind, run without torch and transformers.

        engine = waterfill.Engine("out", memory="1GB")
        for piece in engine.generate("Once upon a time", temperature=0):
            print(piece, end="")

    Args:
        memory: what the process may take in all, in bytes or as "1GB"; as much as is free when None.
        streamed: whether weights come from storage for every token; None streams what does not fit.
        verify: compare every byte with its digest first.
        tuning: sizes and times of streaming; other ones are for tests and benchmarks.

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
        streamed: bool | None = None,
        verify: bool = True,
        tuning: Tuning = USUAL,
    ) -> None:
        opened = open_artifact(Path(artifact), verify=False)
        if verify:
            opened.verify_files()  # before anything else is made of them
        read_spec(opened)  # what takes transformers is found before any weights are read
        self.defaults = read_defaults(opened.path)
        self.tokenizer = load_tokenizer(opened.path)
        self.model = open_model(opened, memory=memory, streamed=streamed, verify=verify, tuning=tuning)

    @property
    def streaming(self) -> Streamer | None:
        """Who reads the weights; None where they are in memory."""
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
        """Continue a text, or answer a conversation: pieces of text as they come (`engine.generation.generate`)."""
        return generate(
            self.model,
            self.tokenizer,
            prompt,
            sampling,
            defaults=self.defaults,
            draft=None if draft is None else draft.model,
            lookup=lookup,
            **overrides,
        )
