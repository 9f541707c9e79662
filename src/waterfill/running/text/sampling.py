"""What generating text means, whoever does it: the choices that can be made, what a prompt must be, what it all took.

Imports neither torch nor transformers: both runners, with them and without, have this in common.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from waterfill.base.arguments import SEED, Check, check, number, whole
from waterfill.base.errors import WaterfillError

DRAFT_TOKENS = 5  # that a draft writes before they are verified


_EXTREME = 1e6  # that logits are divided or multiplied by at most: float32 has room for the result
_RANGES: Mapping[str, Check] = {
    "max_new_tokens": whole(1),
    "temperature": number(
        f"0 (greedy), or a number from {1 / _EXTREME} to {_EXTREME:.0f}",
        lambda value: value == 0 or 1 / _EXTREME <= value <= _EXTREME,
    ),
    "top_p": number("a number above 0 and at most 1", lambda value: 0 < value <= 1),
    "top_k": whole(0),  # 0 is all
    "repetition_penalty": number(
        f"1 (none), or a number from {1 / _EXTREME} to {_EXTREME:.0f}", lambda value: 1 / _EXTREME <= value <= _EXTREME
    ),
    "seed": SEED,
}


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token. None leaves a choice to the model's generation_config.

    Raises:
        WaterfillError: a value outside its range.
    """

    max_new_tokens: int = 128
    temperature: float | None = None  # 0 is greedy: always the likeliest token, whatever top_p and top_k say
    top_p: float | None = None  # sample among the likeliest tokens that hold this much probability; 1 is all
    top_k: int | None = None  # sample among this many likeliest tokens; 0 is all
    repetition_penalty: float | None = None  # divides the score of tokens seen before; 1 is none
    seed: int | None = None  # the same seed gives the same text

    def __post_init__(self) -> None:
        for name, wanted in _RANGES.items():
            value = getattr(self, name)
            if value is not None or name == "max_new_tokens":
                check(name, value, wanted)

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of transformers' `generate` that say the same."""
        if self.temperature == 0:
            chosen: dict[str, Any] = {"do_sample": False}
        else:
            chosen = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
            chosen = {name: value for name, value in chosen.items() if value is not None}
            if chosen:  # whoever sets one of them wants to sample, even if the model's own default is greedy
                chosen["do_sample"] = True
        if self.repetition_penalty is not None:
            chosen["repetition_penalty"] = self.repetition_penalty
        return chosen


@dataclass(frozen=True)
class GenerationStats:
    """What a generation took, as far as it has come."""

    tokens: int  # generated, the end-of-text token included
    first_token_s: float  # from the start to the first token: reading the prompt
    elapsed_s: float  # from the start to the last token

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first token; NaN before there are two."""
        decoding_s = self.elapsed_s - self.first_token_s
        return (self.tokens - 1) / decoding_s if decoding_s > 0 else math.nan


def check_speculation(draft: object, lookup: int | None) -> None:
    """Refuse two sources of drafts, and a look-up of no tokens."""
    if draft is not None and lookup is not None:
        raise WaterfillError("tokens are drafted by a model or looked up in the text; give either draft or lookup")
    if lookup is not None:
        check("lookup", lookup, whole(1))


def begun(ids: list[int], beginning: int | None) -> list[int]:
    """A prompt's ids; if it has none, the id that a text begins with.

    Raises:
        WaterfillError: there is none either.
    """
    if not ids and beginning is None:
        raise WaterfillError("the prompt is empty and the tokenizer has no token to begin with; give a prompt")
    return ids if beginning is None or ids else [beginning]


def free_positions(prompt_tokens: int, positions: int | None) -> int:
    """How many tokens a model can add to a prompt before its positions are used up.

    Raises:
        WaterfillError: there are none.
    """
    if not positions:
        return sys.maxsize
    if prompt_tokens >= positions:
        raise WaterfillError(
            f"the prompt has {prompt_tokens} tokens, but the model has room for {positions}; shorten it"
        )
    return int(positions) - prompt_tokens
