"""The engine's next token follows the distribution of transformers' processors of logits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from waterfill.base.errors import WaterfillError
from waterfill.running.text.next_token import Doubles, Floats, Rules, choose_token, draw, probabilities

EDGE = 1e-5  # of probability: tokens so near a threshold may go either way


def expected(logits: Floats, seen: list[int], rules: Rules) -> Doubles:
    """What transformers samples from."""
    scores = processors(rules)(torch.tensor([seen]), torch.tensor(logits)[None])
    return scores[0].double().softmax(-1).numpy()


def processors(rules: Rules, *, top_p: bool = True, min_p: bool = True) -> Any:
    """As `_get_logits_processor` of transformers' generation lists them."""
    found = LogitsProcessorList()
    if rules.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(rules.repetition_penalty))
    if rules.temperature != 1:
        found.append(TemperatureLogitsWarper(rules.temperature))
    if rules.top_k:
        found.append(TopKLogitsWarper(rules.top_k))
    if top_p and rules.top_p < 1:
        found.append(TopPLogitsWarper(rules.top_p))
    if min_p and rules.min_p is not None:
        found.append(MinPLogitsWarper(rules.min_p))
    return found


def on_an_edge(logits: Floats, seen: list[int], rules: Rules) -> bool:
    """Whether a threshold of top-p or min-p falls on a token, to rounding."""
    before = processors(rules, top_p=False, min_p=False)(torch.tensor([seen]), torch.tensor(logits)[None])[0]
    held = before.double().softmax(-1).sort().values.cumsum(-1)
    after = processors(rules, min_p=False)(torch.tensor([seen]), torch.tensor(logits)[None])[0].double().softmax(-1)
    least = (rules.min_p or 0) * after.max()
    return bool(((held - (1 - rules.top_p)).abs() < EDGE).any() or ((after - least).abs() < EDGE * after).any())


all_rules = st.builds(
    Rules,
    temperature=st.sampled_from([1.0, 0.3, 0.8, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 50, 5000]),
    top_p=st.sampled_from([1.0, 0.01, 0.5, 0.83, 0.95, 0.999]),
    min_p=st.sampled_from([None, 0.0, 0.07, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.6]),
)


@st.composite
def logits_with_ties(draw: st.DrawFn) -> Floats:
    """Few values, so that many are equal; some tokens impossible, as a model's padding of its vocabulary may be."""
    size = draw(st.integers(2, 700))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    values = draw(st.sampled_from([3, 20, 10_000]))
    logits = (random.integers(0, values, size) * (draw(st.sampled_from([1.0, 12.0])) / values) - 3).astype(np.float32)
    if draw(st.booleans()):
        logits[random.integers(0, size, size // 3)] = -np.inf
        logits[0] = 1
    return logits


@given(logits_with_ties(), st.lists(st.integers(0, 60), min_size=1, max_size=9), all_rules)
@example(np.zeros(8, np.float32), [1], Rules(top_p=0.45))
@example(np.zeros(400, np.float32), [1], Rules(top_k=3))
@example(np.zeros(400, np.float32), [1], Rules(top_p=0.999))
def test_distributions_equal_those_of_transformers(logits: Floats, seen: list[int], rules: Rules) -> None:
    seen = [token % len(logits) for token in seen]
    assume(not on_an_edge(logits, seen, rules))
    found, wanted = probabilities(logits, seen, rules), expected(logits, seen, rules)
    assert np.allclose(np.sort(found), np.sort(wanted), rtol=1e-5, atol=0)
    assert found.sum() == pytest.approx(1)
    differ = np.flatnonzero((found > 0) != (wanted > 0))
    scores = processors(rules, top_p=False, min_p=False)(torch.tensor([seen]), torch.tensor(logits)[None])[0]
    assert len(scores[differ].unique()) <= 1, "of equals, torch's sort may have top-p keep others"


def test_of_equals_top_p_keeps_the_first() -> None:
    assert np.flatnonzero(probabilities(np.zeros(40, np.float32), [], Rules(top_p=0.12))).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "rules", [Rules(top_k=50), Rules(top_p=0.9), Rules(temperature=0.7, top_k=40, top_p=0.95, min_p=0.05), Rules()]
)
@pytest.mark.parametrize("spread", [0.01, 2.0, 6.0])
def test_a_large_vocabulary(rules: Rules, spread: float) -> None:
    """Of one where nearly all tokens are equally likely, top-p keeps nearly all."""
    logits = (spread * np.random.default_rng(3).standard_normal(100_000)).astype(np.float32)
    found, wanted = probabilities(logits, [1], rules), expected(logits, [1], rules)
    # Sums over 100000 float32 probabilities differ in the last digits, and so may the last tokens that are kept.
    assert np.count_nonzero((found > 0) != (wanted > 0)) <= 20
    assert np.abs(found - wanted).sum() < 1e-3


def test_greedy_is_the_first_of_the_likeliest() -> None:
    random = np.random.default_rng(0)
    logits = np.array([0, 2, 3, 3, -1], np.float32)
    assert choose_token(logits, [0], Rules.greedy(), random) == 2
    assert choose_token(logits, [2], Rules.greedy(1.2), random) == 3
    assert choose_token(np.array([-1, -2], np.float32), [0], Rules.greedy(3.0), random) == 1
    assert probabilities(logits, [0], Rules.greedy()).tolist() == [0, 0, 1, 0, 0]


def test_ids_beyond_the_logits_are_not_penalised() -> None:
    logits = np.array([0, 2, 3], np.float32)
    assert np.array_equal(
        probabilities(logits, [7, 3], Rules(repetition_penalty=2.0)), probabilities(logits, [], Rules())
    )
    assert logits.tolist() == [0, 2, 3], "the model's own array is left alone"


def test_samples_follow_the_probabilities_and_the_seed() -> None:
    logits, rules = np.log(np.array([0.5, 0.2, 0.2, 0.1], np.float32)), Rules(top_k=3)
    runs = [
        [choose_token(logits, [], rules, random) for _ in range(3000)]
        for random in map(np.random.default_rng, (1, 1, 2))
    ]
    assert runs[0] == runs[1] != runs[2]
    p = probabilities(logits, [], rules)
    counts = np.bincount(runs[0], minlength=4)
    assert counts[3] == 0
    assert sum((counts[:3] - 3000 * p[:3]) ** 2 / (3000 * p[:3])) < 13.8, "99.9th percentile, 2 degrees of freedom"


def test_a_number_next_to_one_draws_the_last_token() -> None:
    class Largest:
        def random(self) -> float:
            return math.nextafter(1, 0)

    for size in range(1, 200):
        assert draw(np.full(size, 1 / size), Largest()) == size - 1  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("rules", [Rules(), Rules(top_k=2, top_p=0.5), Rules.greedy()])
def test_logits_that_are_no_numbers_are_refused(value: float, rules: Rules) -> None:
    with pytest.raises(WaterfillError, match="logits are NaN or infinite"):
        choose_token(np.array([0, value, 1, 2], np.float32), [0], rules, np.random.default_rng(0))
