"""Text from a model, piece by piece as it is generated, in the caller's own thread.

prompt or messages ──► ids ──► a pass of the model ──► tokens ──► pieces of text ──► `Generation` iterates
                                    ▲ drafts ◄───────────┘
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from numpy.random import default_rng  # imported here, before a streamed model sees what memory is left

from waterfill.base.errors import WaterfillError, unknown_token
from waterfill.files.settings.messages import Message
from waterfill.running.text.defaults import Defaults
from waterfill.running.text.model import TokenModel, read
from waterfill.running.text.next_token import Rules
from waterfill.running.text.sampling import DRAFT_TOKENS, GenerationStats, Sampling, check_speculation, room
from waterfill.running.text.speculate import Draft, Drafter, DraftModel, Lookup, verify
from waterfill.running.text.tokenizer import TextStream, Tokenizer


@dataclass
class Speculation:
    """What drafts were worth, as far as a generation has come."""

    passes: int = 0  # of the model; each gives one token and those of the draft that it accepts
    drafted: int = 0
    accepted: int = 0


class Generation(Iterator[str]):
    """Pieces of text, as they come. Nothing runs but while one is asked for; `close` ends the text where it is."""

    def __init__(self, tokenizer: Tokenizer, run: Run) -> None:
        self._run = run
        self._pieces = _pieces(tokenizer, run)

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """End the text: there are no more pieces."""
        self._pieces.close()

    @property
    def stats(self) -> GenerationStats:
        """Counts and times up to now; complete once the iteration has ended."""
        return self._run.clock.stats()

    @property
    def speculation(self) -> Speculation | None:
        """What drafts were worth up to now; None if there are none."""
        return None if self._run.drafter is None else self._run.speculation


def generate(
    model: TokenModel,
    tokenizer: Tokenizer,
    prompt: str | Sequence[Message],
    sampling: Sampling | None = None,
    *,
    defaults: Defaults | None = None,
    draft: TokenModel | None = None,
    lookup: int | None = None,
    **overrides: Any,
) -> Generation:
    """Continue a text, or answer a conversation, and stream what the model says.

    A string is continued as it is. Messages go through the tokenizer's chat template; without one they become lines
    "User: …", "Assistant: …" with a final "Assistant:" for the model to continue. Special tokens are left out of the
    text. Generation ends at an end-of-text token, after `max_new_tokens`, or when the model's positions are used up.

    `defaults` is what the model's files say of sampling and of ends of text (`defaults.read_defaults`); `overrides`
    replace fields of `sampling`. The same seed gives the same text; without one every text is another.

    Several tokens can be verified in one pass over the weights. They are drafted by a smaller model of the same
    tokenizer (`draft`), or found behind an earlier occurrence of the last tokens (`lookup`: how many at most). What is
    said follows the model's own distribution all the same.

    The model's cache is kept: a prompt that begins as the last text did is read from where it differs.

    Generation starts with the first piece asked for; an exception of the model is raised from the iteration. Raises
    WaterfillError for a sampling value outside its range, malformed messages, a prompt that is not valid UTF-8 or
    leaves no room, tokens that the model does not know, a text that does not fit in the model's memory, or a draft of
    another vocabulary.
    """
    sampling, defaults = replace(sampling or Sampling(), **overrides), defaults or Defaults()
    check_speculation(draft, lookup)
    rules = defaults.rules(sampling)
    drafter: Drafter | None = None if lookup is None else Lookup(lookup)
    if draft is not None:
        if draft.vocabulary != model.vocabulary:
            raise WaterfillError(
                f"the draft has a vocabulary of {draft.vocabulary} tokens and the model one of {model.vocabulary}; "
                "give a draft with the model's own tokenizer"
            )
        drafter = DraftModel(draft, rules)
    ids = tokenizer.prompt_ids(prompt)
    if max(ids) >= model.vocabulary:
        raise unknown_token("the prompt", max(ids), model.vocabulary)
    most = min(sampling.max_new_tokens, room(len(ids), model.positions))
    drafted = DRAFT_TOKENS if draft is not None else lookup or 0
    model.expect(len(ids) + most, len(ids), logits=drafted + 1, draft=draft)
    return Generation(tokenizer, Run(model, ids, most, rules, defaults.ends, drafter, sampling.seed))


@dataclass
class _Clock:
    """Counts tokens and takes the time."""

    tokens: int = 0
    start_s: float = math.nan
    first_s: float = math.nan
    last_s: float = math.nan

    def start(self) -> None:
        self.start_s = time.perf_counter()

    def count(self, tokens: int) -> None:
        self.last_s = time.perf_counter()
        if self.tokens == 0:
            self.first_s = self.last_s
        self.tokens += tokens

    def stats(self) -> GenerationStats:
        return GenerationStats(self.tokens, self.first_s - self.start_s, self.last_s - self.start_s)


@dataclass(frozen=True)
class Run:
    """A text to be generated."""

    model: TokenModel
    ids: Sequence[int]  # of the prompt
    most: int  # tokens to add
    rules: Rules
    ends: frozenset[int]
    drafter: Drafter | None
    seed: int | None
    clock: _Clock = field(default_factory=_Clock)
    speculation: Speculation = field(default_factory=Speculation)

    def tokens(self) -> Iterator[list[int]]:
        """The tokens of each pass of the model, up to an end of text."""
        ids, random = list(self.ids), default_rng(self.seed)
        end = len(ids) + self.most
        while len(ids) < end:
            draft = Draft() if self.drafter is None else self.drafter.propose(ids, end - len(ids) - 1, random)
            logits = read(self.model, [*ids, *draft.ids], len(draft.ids) + 1)
            new = verify(logits, ids, draft, self.rules, random)
            self.speculation.passes += 1
            self.speculation.drafted += len(draft.ids)
            self.speculation.accepted += len(new) - 1
            last = next((place for place, token in enumerate(new) if token in self.ends), None)
            if last is not None:
                yield new[: last + 1]
                return
            yield new
            ids += new


def _pieces(tokenizer: Tokenizer, run: Run) -> Generator[str, None, None]:
    stream = TextStream(tokenizer)
    run.clock.start()
    for tokens in run.tokens():
        run.clock.count(len(tokens))
        if piece := "".join(map(stream.add, tokens)):
            yield piece
    if piece := stream.end():
        yield piece
