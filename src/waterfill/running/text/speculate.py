"""Several tokens in one pass: drafted cheaply, verified together, with the distribution of the text unchanged.

    ids ──► draft (looked up in the text, or written by a smaller model) ──► one pass of the model ──► verify ──► tokens

Where reading the weights takes the time, a pass over a few tokens costs what one over a single token does. The rule of
acceptance is that of speculative sampling (Leviathan et al., arXiv 2211.17192, section 2.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from waterfill.running.text.model import TokenSequence, read
from waterfill.running.text.next_token import Doubles, Floats, Rules, choose_token, draw, probabilities
from waterfill.running.text.sampling import DRAFT_TOKENS

LONGEST_MATCH = 2  # tokens at the end of the text that are looked for


@dataclass(frozen=True)
class Draft:
    """Tokens that may come next."""

    ids: Sequence[int] = ()
    chances: Sequence[Doubles] | None = None  # that each was sampled from, [vocabulary]; None: none other was possible


class Drafter(Protocol):
    """A source of drafts."""

    def propose(self, ids: Sequence[int], most: int, random: np.random.Generator) -> Draft:
        """What may follow a text, in `most` tokens or fewer."""


@dataclass(frozen=True)
class Lookup:
    """Prompt look-up: what followed when the text's last tokens came for the first time, two of them or else one."""

    tokens: int  # at most

    def propose(self, ids: Sequence[int], most: int, random: np.random.Generator) -> Draft:
        """See `Drafter`."""
        text, most = np.asarray(ids), min(most, self.tokens)
        for size in range(min(LONGEST_MATCH, len(ids) - 1), 0, -1):
            ends = np.arange(size, len(ids))  # behind each earlier place where they can be
            matches = np.all([text[ends - back] == text[-back] for back in range(1, size + 1)], axis=0)
            if most > 0 and matches.any():
                start = int(ends[matches.argmax()])
                return Draft(ids[start : start + most])
        return Draft()


@dataclass(frozen=True)
class DraftModel:
    """A smaller model of the same vocabulary, which chooses tokens by the same rules."""

    sequence: TokenSequence
    rules: Rules

    def propose(self, ids: Sequence[int], most: int, random: np.random.Generator) -> Draft:
        """See `Drafter`."""
        text, chances = list(ids), []
        end = len(ids) + min(most, DRAFT_TOKENS)
        if (positions := self.sequence.model.positions) is not None:
            end = min(end, positions + 1)  # the last token is not read
        while len(text) < end:
            (logits,) = read([self.sequence], [text])[0]
            if self.rules.sample:
                chances.append(probabilities(logits, text, self.rules))
                text.append(draw(chances[-1], random))
            else:
                text.append(choose_token(logits, text, self.rules, random))
        return Draft(text[len(ids) :], chances if self.rules.sample else None)


def verify(logits: Floats, ids: Sequence[int], draft: Draft, rules: Rules, random: np.random.Generator) -> list[int]:
    """The tokens that follow `ids`: those of the draft that are accepted, and one more, which is the model's own.

    `logits` is float32 [drafted + 1, vocabulary]: after `ids` and after each token of the draft.

    A token x of the draft is kept with probability min(1, p(x)/q(x)), where p is the model's distribution and q the
    draft's; the first that is not is replaced by a sample of max(p - q, 0). If q is certain of x that is the same as
    a sample of p, which is kept if it is x; so, too, where p is certain: the likeliest token.
    """
    text = list(ids)
    for place, drafted in enumerate(draft.ids):
        if draft.chances is None:
            token = choose_token(logits[place], text, rules, random)
        else:
            token = _accepted(drafted, probabilities(logits[place], text, rules), draft.chances[place], random)
        text.append(token)
        if token != drafted:
            return text[len(ids) :]
    text.append(choose_token(logits[-1], text, rules, random))
    return text[len(ids) :]


def _accepted(drafted: int, p: Doubles, q: Doubles, random: np.random.Generator) -> int:
    """A sample of p, by way of one of q."""
    if random.random() * q[drafted] < p[drafted]:
        return drafted
    residual = np.maximum(p - q, 0)
    return draw(residual if residual.any() else p, random)  # p and q may differ by no more than rounding
