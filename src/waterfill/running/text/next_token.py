"""The next token from a model's logits, with numpy.

    logits ──► repetition penalty ──► temperature ──► top-k ──► top-p ──► min-p ──► probabilities ──► a token

Order, ties and the float32 arithmetic of each step are those of transformers' processors of logits, so that both
runners sample from one distribution. Only the candidates that are left are ever sorted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from waterfill.base.errors import WaterfillError

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

_FIRST_CANDIDATES = 256  # likeliest tokens that are looked at first for top-p; 8 times as many at each further try


@dataclass(frozen=True)
class Rules:
    """How a token is chosen; the values are in range, and those given as defaults change nothing."""

    temperature: float = 1.0  # more than 0
    top_k: int = 0  # 0 is all
    top_p: float = 1.0
    min_p: float | None = None  # of the likeliest token's probability
    repetition_penalty: float = 1.0
    sample: bool = True

    @classmethod
    def greedy(cls, repetition_penalty: float = 1.0) -> Rules:
        """Always the likeliest token, the first of equals."""
        return cls(repetition_penalty=repetition_penalty, sample=False)


def probabilities(logits: Floats, seen: Sequence[int], rules: Rules) -> Doubles:
    """The distribution that the next token is sampled from: float64 [vocabulary], whose sum is 1.

    `logits` is float32 [vocabulary], and `seen` has all ids of the text so far, the prompt's included. Greedy rules
    give one token all of the probability.

    Raises:
        WaterfillError: logits that are NaN or infinite.
    """
    tokens, weights = _candidates(logits, seen, rules)
    dense = np.zeros(len(logits))
    dense[tokens] = weights
    return dense


def choose_token(logits: Floats, seen: Sequence[int], rules: Rules, random: np.random.Generator) -> int:
    """The id of the next token; arguments and errors are those of `probabilities`."""
    tokens, weights = _candidates(logits, seen, rules)
    return int(tokens[0] if len(tokens) == 1 else tokens[draw(weights, random)])


def draw(weights: Doubles, random: np.random.Generator) -> int:
    """An index, each as likely as its share of the weights, float64 [n] of which one at least is positive."""
    sums = np.cumsum(weights)
    place = np.searchsorted(sums, random.random() * sums[-1], side="right")
    return min(int(place), len(weights) - 1)  # the product may be rounded up to the sum


def _candidates(logits: Floats, seen: Sequence[int], rules: Rules) -> tuple[Indices, Doubles]:
    """Tokens that can be chosen, in rising order of ids, and their probabilities."""
    scores = _penalised(logits, seen, rules.repetition_penalty)
    best = scores.argmax()
    if not np.isfinite(scores[best]):  # argmax finds the first NaN too
        raise WaterfillError(
            "the model's logits are NaN or infinite instead of finite numbers; verify the model's files"
        )
    if not rules.sample:
        return np.array([best]), np.ones(1)
    if rules.temperature != 1.0:
        scores = scores / np.float32(rules.temperature)
    tokens = _likeliest(scores, rules.top_k) if rules.top_k else np.arange(len(scores))
    if rules.top_p < 1.0:
        tokens = tokens[_nucleus(scores[tokens], rules.top_p)]
    if rules.min_p:
        shares = _softmax(scores[tokens])
        tokens = tokens[shares >= np.float32(rules.min_p) * shares.max()]
    left = scores[tokens].astype(np.float64)
    weights = np.exp(left - left.max())
    return tokens, weights / weights.sum()


def _penalised(logits: Floats, seen: Sequence[int], penalty: float) -> Floats:
    """Scores of tokens seen before moved down, once each: divided if positive, else multiplied (arXiv 1909.05858)."""
    if penalty == 1.0:
        return logits
    ids = np.asarray(seen, dtype=np.intp)
    ids = ids[ids < len(logits)]  # an embedding can have more rows than the head
    scores, old = logits.copy(), logits[ids]
    scores[ids] = np.where(old < 0, old * np.float32(penalty), old / np.float32(penalty))
    return scores


def _likeliest(scores: Floats, count: int) -> Indices:
    """Indices of the `count` highest scores and of all that equal the last of them."""
    if count >= len(scores):
        return np.arange(len(scores))
    last = len(scores) - count
    return np.flatnonzero(scores >= np.partition(scores, last)[last])


def _nucleus(scores: Floats, share: float) -> Indices:
    """Indices, rising, of the likeliest tokens that hold `share` of the probability (arXiv 1904.09751, section 3.1).

    A token goes if it and all that are less likely hold no more than the rest. Of equals the first stay, as with
    greedy choice; with transformers it is up to torch's sort, which is not stable.
    """
    chances = _softmax(scores)
    total, count = chances.sum(dtype=np.float64), _FIRST_CANDIDATES
    while True:
        top = _likeliest(scores, count)
        below = total - chances[top].sum(dtype=np.float64) if len(top) < len(scores) else 0.0
        if below <= 1 - share or len(top) == len(scores):
            break
        count *= 8
    ranked = np.sort(scores[top])
    held = below + np.cumsum(np.sort(chances[top]), dtype=np.float64)
    kept = held.astype(np.float32) > np.float32(1 - share)
    kept[-1] = True
    least = ranked[kept.argmax()]
    equals = np.flatnonzero(scores == least)[: np.count_nonzero(ranked[kept] == least)]
    return np.sort(np.concatenate([np.flatnonzero(scores > least), equals]))


def _softmax(scores: Floats) -> Floats:
    weights: Floats = np.exp(scores - scores.max())
    weights /= weights.sum()
    return weights
