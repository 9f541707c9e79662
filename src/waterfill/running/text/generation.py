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
from waterfill.running.text.model import Lease, Sequences, TokenModel, TokenSequence, read
from waterfill.running.text.next_token import Floats, Rules
from waterfill.running.text.sampling import DRAFT_TOKENS, GenerationStats, Sampling, check_speculation, free_positions
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
        return self._run.speculation if self._run.speculates else None


def generate(
    model: TokenModel | Sequences,
    tokenizer: Tokenizer,
    prompt: str | Sequence[Message],
    sampling: Sampling | None = None,
    *,
    defaults: Defaults | None = None,
    draft: TokenModel | Sequences | None = None,
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

    Given a model's `Sequences`, a prompt that begins as the last text did is read from where it differs.

    Generation starts with the first piece asked for; an exception of the model is raised from the iteration.

    Raises:
        WaterfillError: a sampling value is outside its range, messages are malformed, a prompt is not valid UTF-8,
            leaves no room or holds tokens that the model does not know, a text does not fit in the model's memory, or a
            draft has another vocabulary.
    """
    asked = Asked(model, tokenizer, sampling, defaults, draft=draft, lookup=lookup, **overrides)
    run = asked.run(asked.ids(prompt))
    return Generation(tokenizer, run)


class Asked:
    """How texts are to be generated; the arguments are those of `generate`."""

    def __init__(
        self,
        model: TokenModel | Sequences,
        tokenizer: Tokenizer,
        sampling: Sampling | None,
        defaults: Defaults | None,
        *,
        draft: TokenModel | Sequences | None = None,
        lookup: int | None = None,
        **overrides: Any,
    ) -> None:
        check_speculation(draft, lookup)
        self._sampling, self._defaults = replace(sampling or Sampling(), **overrides), defaults or Defaults()
        self._rules, self._tokenizer, self._lookup = self._defaults.rules(self._sampling), tokenizer, lookup
        self._sequences = _sequences(model)
        self._draft = None if draft is None else _sequences(draft)
        if self._draft is not None and self._draft.model.vocabulary != self._sequences.model.vocabulary:
            raise WaterfillError(
                f"the draft has a vocabulary of {self._draft.model.vocabulary} tokens and the model one of "
                f"{self._sequences.model.vocabulary}; give a draft with the model's own tokenizer"
            )

    def ids(self, prompt: str | Sequence[Message]) -> list[int]:
        """Of a prompt.

        Raises:
            WaterfillError: they are not the model's, or leave no room.
        """
        ids, model = self._tokenizer.prompt_ids(prompt), self._sequences.model
        if max(ids) >= model.vocabulary:
            raise unknown_token("the prompt", max(ids), model.vocabulary)
        free_positions(len(ids), model.positions)
        return ids

    def run(self, ids: list[int]) -> Run:
        """A text behind a prompt, not begun.

        Raises:
            MemoryLimitError: it does not fit.
        """
        model, lease = self._sequences.model, Lease(self._sequences)
        leases, draft, drafted = [lease], None, self._lookup or 0
        drafter: Drafter | None = None if self._lookup is None else Lookup(self._lookup)
        if self._draft is not None:
            leases.append(Lease(self._draft))
            draft, drafted = leases[-1].sequence, DRAFT_TOKENS
            drafter = DraftModel(draft, self._rules)
        most = min(self._sampling.max_new_tokens, free_positions(len(ids), model.positions))
        model.expect(lease.sequence, len(ids) + most, len(ids), logits=drafted + 1, draft=draft)
        seed = self._sampling.seed
        return Run(lease.sequence, ids, most, self._rules, self._defaults.ends, drafter, seed, tuple(leases))


def _sequences(model: TokenModel | Sequences) -> Sequences:
    return model if isinstance(model, Sequences) else Sequences(model)


@dataclass
class Clock:
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


@dataclass
class Run:
    """A text that is generated, token by token: `ids` are the prompt's, and then those that were added."""

    sequence: TokenSequence
    ids: list[int]
    most: int  # tokens to add
    rules: Rules
    ends: frozenset[int]
    drafter: Drafter | None
    seed: int | None
    leases: tuple[Lease, ...] = ()  # on the sequences, for as long as the text is not ended
    clock: Clock = field(default_factory=Clock)
    speculation: Speculation = field(default_factory=Speculation)

    def __post_init__(self) -> None:
        self.ids, self._random = list(self.ids), default_rng(self.seed)
        self._end = len(self.ids) + self.most
        self.speculates = self.drafter is not None

    @property
    def ended(self) -> bool:
        """Whether there are no more tokens."""
        return len(self.ids) >= self._end

    def propose(self) -> Draft:
        """What may come next."""
        if self.drafter is None:
            return Draft()
        return self.drafter.propose(self.ids, self._end - len(self.ids) - 1, self._random)

    def take(self, draft: Draft, logits: Floats) -> list[int]:
        """The tokens that a pass gives, from its logits `[drafted + 1, vocabulary]`; the text has them from now on."""
        new = verify(logits, self.ids, draft, self.rules, self._random)
        self.speculation.passes += 1
        self.speculation.drafted += len(draft.ids)
        self.speculation.accepted += len(new) - 1
        last = next((place for place, token in enumerate(new) if token in self.ends), None)
        if last is not None:
            new = new[: last + 1]
            self._end = 0
        self.ids += new
        return new

    def tokens(self) -> Iterator[list[int]]:
        """The tokens of each pass of the model, up to an end of text."""
        while not self.ended:
            draft = self.propose()
            (logits,) = read([self.sequence], [[*self.ids, *draft.ids]], [len(draft.ids) + 1])
            yield self.take(draft, logits)

    def close(self) -> None:
        """The text is ended: its sequences are free for another, and nothing of them is held here any more."""
        self._end = 0
        for lease in self.leases:
            lease.close()
        self.leases, self.drafter = (), None
        self.__dict__.pop("sequence", None)


def _pieces(tokenizer: Tokenizer, run: Run) -> Generator[str, None, None]:
    stream = TextStream(tokenizer)
    try:
        run.clock.start()
        for tokens in run.tokens():
            run.clock.count(len(tokens))
            if piece := "".join(map(stream.add, tokens)):
                yield piece
        if piece := stream.end():
            yield piece
    finally:
        run.close()
