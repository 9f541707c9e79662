"""Token sequences on which sensitivities are measured.

self    sampled from the model itself at temperature 1, from random tokens on: data-free (default)
random  uniform tokens, as in the HIGGS paper (arXiv 2411.17525, §5): ranks tensors, over-predicts the loss
text    windows spread over a text file of the user's
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from waterfill.base import reading
from waterfill.base.errors import UnsupportedError, WaterfillError, unknown_token
from waterfill.base.progress import Step
from waterfill.files.context import context_length
from waterfill.files.growing_cache import reserve
from waterfill.files.model_calls import read_on
from waterfill.files.settings.tokenizing import in_words
from waterfill.planning.ancestral import Writer, sample

Kind = Literal["self", "random", "text"]
KINDS: tuple[Kind, ...] = ("self", "random", "text")
MOST_SEQUENCES = 48  # where nobody says how many
LENGTH = 160  # tokens of a sequence: short ones say more for what they cost (docs/design.md §5)
LEAD_SHARE = 4  # one token of so many only gives context: with little of it, a model loses more than it does usually
MOST_TOKENS = 1 << 28  # of a probe; 2 GB of token ids


@dataclass(frozen=True)
class Probe:
    """What to measure on: `sequences` of `length` tokens each."""

    kind: Kind = "self"
    sequences: int = MOST_SEQUENCES
    length: int = LENGTH
    seed: int = 0
    text: Path | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise WaterfillError(f"the probe {self.kind!r} is unknown; use {', '.join(KINDS)}")
        if self.sequences < 2 or self.length < 2:
            raise WaterfillError(
                f"a probe of {self.sequences} sequences of {self.length} tokens cannot give a standard error; "
                "use at least 2 sequences of 2 tokens"
            )
        if self.sequences * self.length > MOST_TOKENS:
            raise WaterfillError(
                f"a probe of {self.sequences} sequences of {self.length} tokens is more than {MOST_TOKENS} tokens; "
                "use fewer or shorter sequences"
            )
        if (self.kind == "text") != (self.text is not None):
            source = "no text file" if self.text is None else f"the text file {self.text}"
            raise WaterfillError(f"probe {self.kind!r} and {source} do not go together; a text file makes a text probe")


def lead_of(length: int) -> int:
    """Tokens at the beginning of a sequence that only give context to the others."""
    return length // LEAD_SHARE


def probe_tokens(
    model: Any, tokenizer: Any, probe: Probe, progress: Step | None = None, writer: Writer | None = None
) -> torch.Tensor:
    """int64 `[sequences, length]`, deterministic for a seed. `tokenizer` is needed for text only, and `writer` writes
    the model's own (`own_text`)."""
    length = min(probe.length, context_length(model.config) or probe.length)
    if probe.kind == "self":
        return own_text(model, range(probe.sequences), length, probe.seed, progress, writer=writer)
    vocabulary = _vocabulary(model)
    if probe.kind == "random":
        generator = torch.Generator().manual_seed(probe.seed)
        return torch.randint(vocabulary, (probe.sequences, length), generator=generator)
    return _within(_windows(tokenizer, probe, length), model, probe)


def _vocabulary(model: Any) -> int:
    """Tokens that are both read and predicted: an embedding may have rows for prompts as well, a head for padding."""
    rows = [len(model.get_input_embeddings().weight)]
    head = model.get_output_embeddings()
    return min(rows if head is None else [*rows, len(head.weight)])


def own_text(
    model: Any,
    numbers: Sequence[int],
    length: int,
    seed: int,
    progress: Step | None = None,
    *,
    start: int | None = None,
    writer: Writer | None = None,
) -> torch.Tensor:
    """Sequences that a transformers model would write, int64 `[numbers, length]`: by the writer, or by the model itself
    where there is none or it cannot. Each depends on the seed and its number.

    Args:
        start: a token that is before the random one that each goes on from.

    Raises:
        WaterfillError: logits are NaN or infinite, or not those of one token where one was read.
    """
    if writer is not None:
        with suppress(UnsupportedError):  # it has said why
            return writer(numbers, length, seed, progress, start=start)
    return sample(
        lambda _: _Texts(model, length),  # through the key/value cache
        numbers,
        length,
        seed,
        start=start,
        vocabulary=_vocabulary(model),
        progress=progress,
    )


class _Texts:
    """Texts of up to `length` tokens that a transformers model reads on in."""

    def __init__(self, model: Any, length: int) -> None:
        self._model, self._length, self._past = model, length, None

    @torch.no_grad()  # not inference mode: what a model keeps between passes may meet the backward passes that follow
    def __call__(self, last: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        first = self._past is None
        logits, self._past = read_on(self._model, torch.from_numpy(last)[:, None], self._past)
        if logits.shape[1] != 1:
            raise WaterfillError(
                f"{type(self._model).__name__} predicts {logits.shape[1]} tokens from one that follows others, and "
                "cannot sample its own text; give it one (--text), or random tokens (--probe random)"
            )
        if first:
            reserve(self._past, self._length)
        rows: npt.NDArray[np.float32] = logits[:, -1].float().numpy()
        return rows


def read_text(path: Path) -> str:
    """A text to measure on.

    Raises:
        WaterfillError: it is none.
    """
    try:
        return reading.read_text(path, sys.maxsize)
    except (OSError, UnicodeDecodeError) as error:
        raise WaterfillError(f"cannot read {path} as UTF-8 text ({error}); name a readable text file") from error


def spread_windows(model: Any, tokenizer: Any, probe: Probe) -> torch.Tensor:
    """At most `MOST_SEQUENCES` windows of a text, int64 `[sequences, length]`, in an order in which the first ones are
    spread over the text as all are: by the reversed bits of their places (van der Corput)."""
    length = min(probe.length, context_length(model.config) or probe.length)
    everything = _everything(tokenizer, probe, length, least=2)
    count = min(len(everything), MOST_SEQUENCES)
    places = torch.linspace(0, len(everything) - 1, count).round().long()
    order = sorted(range(count), key=lambda place: f"{place:0{MOST_SEQUENCES.bit_length()}b}"[::-1])
    return _within(everything[places[order]], model, probe)


def _within(tokens: torch.Tensor, model: Any, probe: Probe) -> torch.Tensor:
    vocabulary = _vocabulary(model)
    if (highest := int(tokens.max())) >= vocabulary:
        raise unknown_token(str(probe.text), highest, vocabulary)
    return tokens


def _windows(tokenizer: Any, probe: Probe, length: int) -> torch.Tensor:
    windows = _everything(tokenizer, probe, length, least=probe.sequences)
    return windows[torch.linspace(0, len(windows) - 1, probe.sequences).round().long()]


def _everything(tokenizer: Any, probe: Probe, length: int, *, least: int) -> torch.Tensor:
    """All windows of a text, `[windows, length]`."""
    assert probe.text is not None
    text = read_text(probe.text)
    with in_words():
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    available = len(ids) // length
    if available < least:
        raise WaterfillError(
            f"{probe.text} holds {available} windows of {length} tokens, the probe needs {least}; "
            "give a longer text or ask for fewer or shorter sequences"
        )
    return ids[: available * length].view(available, length)
