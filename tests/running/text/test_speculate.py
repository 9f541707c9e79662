"""Drafted tokens change how many passes the engine's texts take, never what they say or how likely that is."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from tests.support.toys import Toy
from waterfill.running.text.generation import generate
from waterfill.running.text.next_token import Rules, probabilities
from waterfill.running.text.speculate import Draft, DraftModel, Lookup, verify
from waterfill.running.text.tokenizer import Tokenizer

WORDS = 8
RUNS = 4000
RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """One character for each id."""
    backend = Backend(models.WordLevel({chr(97 + i): i for i in range(WORDS)}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(1, 6))
def test_look_up_finds_what_transformers_finds(ids: list[int], most: int) -> None:
    theirs, _ = PromptLookupCandidateGenerator(num_output_tokens=most, max_length=1000).get_candidates(
        torch.tensor([ids])
    )
    assert list(Lookup(most).propose(ids, 99, RANDOM).ids) == theirs[0, len(ids) :].tolist()
    assert len(Lookup(most).propose(ids, 1, RANDOM).ids) <= 1
    assert not Lookup(most).propose(ids, 0, RANDOM).ids


def test_a_draft_follows_its_own_distribution_and_reads_what_is_new() -> None:
    toy, rules, random = Toy(WORDS), Rules(temperature=0.9, top_k=3), np.random.default_rng(1)
    drafter = DraftModel(toy.sequence(), rules)
    draft = drafter.propose([1, 2, 3], 99, random)
    assert len(draft.ids) == 5
    assert draft.chances is not None
    text = [1, 2, 3, *draft.ids]
    for place, chances in enumerate(draft.chances):
        assert np.array_equal(chances, probabilities(toy.logits(text[: 3 + place]), [], rules))
    assert toy.passes == [3, 1, 1, 1, 1]
    other = (draft.ids[2] + 1) % WORDS
    assert len(drafter.propose([1, 2, 3, *draft.ids[:2], other], 2, random).ids) == 2
    assert toy.passes[5:] == [1, 1], "what was accepted is in the cache, what was rejected is not"


@pytest.mark.parametrize("penalty", [1.0, 1.4])
@pytest.mark.parametrize("way", ["lookup", "same draft", "other draft"])
def test_greedy_texts_are_those_without_drafts(tokenizer: Tokenizer, way: str, penalty: float) -> None:
    total = 0
    for seed in range(8):
        model = Toy(WORDS, seed)
        plain = "".join(generate(model, tokenizer, "abcab", max_new_tokens=60, **greedy(penalty)))
        ways: dict[str, Any] = {
            "lookup": {"lookup": 4},
            "same draft": {"draft": Toy(WORDS, seed)},
            "other draft": {"draft": Toy(WORDS, seed + 1)},
        }
        generation = generate(model, tokenizer, "abcab", max_new_tokens=60, **greedy(penalty), **ways[way])
        assert "".join(generation) == plain
        found = generation.speculation
        assert found is not None
        assert generation.stats.tokens == found.passes + found.accepted == 60
        assert found.accepted <= found.drafted
        total += found.passes
        if way == "same draft":
            assert found.passes == 10
            assert found.accepted == found.drafted == 50
    assert total < 8 * 60


def greedy(penalty: float) -> dict[str, float]:
    return {"temperature": 0, "repetition_penalty": penalty}


def expected(model: Toy, prompt: list[int], length: int, rules: Rules) -> dict[tuple[int, ...], float]:
    """Probability of every continuation."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        longer = {}
        for begun, chance in found.items():
            text = [*prompt, *begun]
            p = probabilities(model.logits(text), text, rules)
            longer |= {(*begun, int(token)): chance * p[token] for token in np.flatnonzero(p)}
        found = longer
    return found


def chi_squared(counts: dict[tuple[int, ...], int], chances: dict[tuple[int, ...], float]) -> tuple[float, int]:
    """Of the continuations that are to be seen at least 5 times, and of all others as one; degrees of freedom."""
    common = [said for said, p in chances.items() if RUNS * p >= 5]
    pairs = [(counts.get(said, 0), RUNS * chances[said]) for said in common]
    rest = RUNS - sum(wanted for _, wanted in pairs)
    if rest >= 5:
        pairs.append((RUNS - sum(seen for seen, _ in pairs), rest))
    return sum((seen - wanted) ** 2 / wanted for seen, wanted in pairs), len(pairs) - 1


@pytest.mark.parametrize("rules", [Rules(top_k=3), Rules(temperature=1.5, repetition_penalty=1.5), Rules(top_p=0.8)])
@pytest.mark.parametrize("way", ["draft", "lookup"])
def test_samples_follow_the_models_own_distribution(tokenizer: Tokenizer, way: str, rules: Rules) -> None:
    model, draft, prompt = Toy(WORDS, 35, spread=1.0), Toy(WORDS, 4, spread=1.0), "abcdabcdab"
    ids = tokenizer.prompt_ids(prompt)
    options: dict[str, Any] = {"draft": draft} if way == "draft" else {"lookup": 3}
    sampling = {"temperature": rules.temperature, "top_k": rules.top_k, "top_p": rules.top_p}
    counts: dict[tuple[int, ...], int] = {}
    passes = accepted = 0
    for seed in range(RUNS):
        generation = generate(
            model,
            tokenizer,
            prompt,
            max_new_tokens=3,
            seed=seed,
            repetition_penalty=rules.repetition_penalty,
            **sampling,
            **options,
        )
        said = tuple(tokenizer.prompt_ids("".join(generation)))
        counts[said] = counts.get(said, 0) + 1
        assert generation.speculation is not None
        passes, accepted = passes + generation.speculation.passes, accepted + generation.speculation.accepted
    chances = expected(model, ids, 3, rules)
    assert set(counts) <= set(chances)
    assert passes + accepted == 3 * RUNS
    assert 0.1 * RUNS < accepted < 1.9 * RUNS, "some drafts are accepted and some are not"
    statistic, freedom = chi_squared(counts, chances)
    assert freedom > 5
    assert statistic < chi2.ppf(0.999, freedom)
    of_draft = expected(draft, ids, 3, rules)
    off = sum(abs(chances.get(s, 0) - of_draft.get(s, 0)) for s in {*chances, *of_draft}) / 2
    assert off > 0.2, "the draft's own distribution is another one"


def test_a_rejected_token_is_replaced_from_what_the_draft_left_over() -> None:
    p, q = np.array([0.1, 0.6, 0.3]), np.array([0.8, 0.1, 0.1])
    logits = np.log(np.array([p, [1, 0, 0]], np.float32) + 1e-30).astype(np.float32)
    random = np.random.default_rng(0)
    replaced = [
        token
        for _ in range(4000)
        for token, *more in [verify(logits, [0], Draft([0], [q]), Rules(), random)]
        if not more
    ]
    assert len(replaced) / 4000 == pytest.approx(1 - 0.1 / 0.8, abs=0.02)
    assert np.bincount(replaced, minlength=3) / len(replaced) == pytest.approx([0, 5 / 7, 2 / 7], abs=0.03)


def test_the_penalty_counts_the_tokens_of_the_draft_before() -> None:
    """The second 1 is certain as long as the first is not seen; then it is as likely as 0."""
    logits, certain = np.array([[0, 9]] * 3, np.float32), np.array([0.0, 1.0])
    for chances in (None, [certain, certain]):
        random = np.random.default_rng(0)
        texts = [verify(logits, [0], Draft([1, 1], chances), Rules(repetition_penalty=1e6), random) for _ in range(999)]
        assert sum(text[0] for text in texts) / 999 > 0.99
        assert sum(len(text) == 3 for text in texts) / 999 == pytest.approx(0.5, abs=0.05)


def test_distributions_that_differ_by_rounding_leave_no_residual() -> None:
    class Largest:
        def random(self) -> float:
            return math.nextafter(1, 0)

    logits = np.array([[0, 0, -np.inf]] * 2, np.float32)
    rounded = np.array([0.5 + 2**-51, 0.5, 0])
    assert verify(logits, [0], Draft([0], [rounded]), Rules(), Largest()) == [1]  # type: ignore[arg-type]


def test_drafts_equal_to_the_model_are_all_accepted() -> None:
    p = probabilities(np.array([1, 2, 3], np.float32), [], Rules())
    logits = np.array([[1, 2, 3]] * 3, np.float32)
    for first, second in itertools.product(range(3), repeat=2):
        found = verify(logits, [0], Draft([first, second], [p, p]), Rules(), np.random.default_rng(first))
        assert found[:2] == [first, second]
        assert len(found) == 3
