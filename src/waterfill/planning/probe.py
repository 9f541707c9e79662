"""Token sequences on which sensitivities are measured.

self    sampled from the model itself at temperature 1: data-free, and of the kind the model was made for (default)
random  uniform tokens, as in the HIGGS paper (arXiv 2411.17525, §5): ranks tensors, over-predicts the loss
text    windows spread over a text file of the user's
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from waterfill.base import reading
from waterfill.base.errors import WaterfillError, unknown_token
from waterfill.base.progress import Step
from waterfill.files.context import context_length
from waterfill.files.model_calls import read_on
from waterfill.files.settings.tokenizing import in_words
from waterfill.planning.estimators import check_probabilities

Kind = Literal["self", "random", "text"]
KINDS: tuple[Kind, ...] = ("self", "random", "text")
MOST_TOKENS = 1 << 28  # of a probe; 2 GB of token ids


@dataclass(frozen=True)
class Probe:
    """What to measure on: `sequences` of `length` tokens each."""

    kind: Kind = "self"
    sequences: int = 32
    length: int = 512
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
            given = "no text file" if self.text is None else f"the text file {self.text}"
            raise WaterfillError(f"probe {self.kind!r} and {given} do not go together; a text file makes a text probe")


def probe_tokens(model: Any, tokenizer: Any, probe: Probe, progress: Step | None = None) -> torch.Tensor:
    """int64 `[sequences, length]`, deterministic for a seed. `tokenizer` is needed for text only."""
    length = min(probe.length, context_length(model.config) or probe.length)
    if probe.kind == "self":
        return _sample(model, probe.sequences, length, _generator(probe), progress)
    vocabulary = _vocabulary(model)
    if probe.kind == "random":
        return torch.randint(vocabulary, (probe.sequences, length), generator=_generator(probe))
    tokens = _windows(tokenizer, probe, length)
    if (highest := int(tokens.max())) >= vocabulary:
        raise unknown_token(str(probe.text), highest, vocabulary)
    return tokens


def _generator(probe: Probe) -> torch.Generator:
    return torch.Generator().manual_seed(probe.seed)


def _vocabulary(model: Any) -> int:
    """Tokens that are both read and predicted: an embedding may have rows for prompts as well, a head for padding."""
    rows = [len(model.get_input_embeddings().weight)]
    head = model.get_output_embeddings()
    return min(rows if head is None else [*rows, len(head.weight)])


@torch.no_grad()  # not inference mode: the tokens are an input of the backward passes that follow
def _sample(model: Any, sequences: int, length: int, generator: torch.Generator, progress: Step | None) -> torch.Tensor:
    """Ancestral sampling through the key/value cache. A document that ends is followed by the next one."""
    tokens = torch.empty(sequences, length, dtype=torch.int64)
    start = _start_token(model.config)
    vocabulary = _vocabulary(model)
    tokens[:, 0] = start if start is not None else torch.randint(vocabulary, (sequences,), generator=generator)
    past = None
    if progress:
        progress(0, length - 1)
    for position in range(1, length):
        logits, past = read_on(model, tokens[:, position - 1 : position], past)
        if logits.shape[1] != 1:
            raise WaterfillError(
                f"{type(model).__name__} predicts {logits.shape[1]} tokens from one that follows others, and cannot "
                "sample its own text; give it one (--text), or random tokens (--probe random)"
            )
        cumulative = logits[:, -1].to(torch.float64).softmax(-1).cumsum(-1)
        check_probabilities(cumulative[:, -1])
        draw = torch.rand(sequences, 1, generator=generator, dtype=torch.float64) * cumulative[:, -1:]
        tokens[:, position] = torch.searchsorted(cumulative, draw).clamp_max(vocabulary - 1)[:, 0]
        if progress:
            progress(position, length - 1)
    return tokens


def _start_token(config: Any) -> int | None:
    for name in ("bos_token_id", "eos_token_id"):
        value = getattr(config, name, None)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int):
            return value
    return None


def read_text(path: Path) -> str:
    """A text to measure on; WaterfillError if it is none."""
    try:
        return reading.read_text(path, sys.maxsize)
    except (OSError, UnicodeDecodeError) as error:
        raise WaterfillError(f"cannot read {path} as UTF-8 text ({error}); name a readable text file") from error


def _windows(tokenizer: Any, probe: Probe, length: int) -> torch.Tensor:
    assert probe.text is not None
    text = read_text(probe.text)
    with in_words():
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    available = len(ids) // length
    if available < probe.sequences:
        raise WaterfillError(
            f"{probe.text} holds {available} windows of {length} tokens, the probe needs {probe.sequences}; "
            "give a longer text or ask for fewer or shorter sequences"
        )
    chosen = torch.linspace(0, available - 1, probe.sequences).round().long()
    return ids[: available * length].view(available, length)[chosen]
