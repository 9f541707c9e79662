"""Generating with the engine: one text whatever the pieces, the end where it is asked for, nothing read twice."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.toys import Toy
from waterfill.base.errors import WaterfillError
from waterfill.running.hf import generate as runtime
from waterfill.running.text.defaults import Defaults, read_defaults
from waterfill.running.text.generation import Generation, generate
from waterfill.running.text.model import Sequences
from waterfill.running.text.next_token import Rules, choose_token
from waterfill.running.text.sampling import Sampling
from waterfill.running.text.tokenizer import Tokenizer
from waterfill.running.text.tokenizer_files import load_tokenizer

VOCABULARY = 8192
PROMPT = "def read_file(path):\n"


@pytest.fixture(scope="module")
def tokenizer(ref_llama: Path) -> Tokenizer:
    return load_tokenizer(ref_llama)


@pytest.fixture
def model() -> Toy:
    return Toy(VOCABULARY)


def continued(toy: Toy, ids: Sequence[int], count: int, rules: Rules, seed: int | None = None) -> list[int]:
    """Ids that follow, chosen one by one without any cache."""
    text, random = list(ids), np.random.default_rng(seed)
    for _ in range(count):
        text.append(choose_token(toy.logits(text), text, rules, random))
    return text[len(ids) :]


def test_pieces_are_the_text_of_the_tokens(model: Toy, tokenizer: Tokenizer) -> None:
    ids = tokenizer.prompt_ids(PROMPT)
    pieces = list(generate(model, tokenizer, PROMPT, temperature=0, max_new_tokens=40))
    assert "".join(pieces) == tokenizer.decode(continued(model, ids, 40, Rules.greedy()))
    assert len(pieces) > 10
    assert all(pieces)


class Recomputed(Toy):
    """A transformers model behind the engine's interface; it reads the whole text in every pass."""

    def __init__(self, model: Any) -> None:
        self.model, self.vocabulary, self.positions = model, VOCABULARY, 1024
        self.ids, self.passes = [], []

    def read(self, sequence: Any, ids: Sequence[int], logits: int) -> Any:
        sequence.ids += ids
        with torch.inference_mode():
            return self.model(torch.tensor([sequence.ids])).logits[0, -logits:].float().numpy()


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.2}])
def test_the_text_is_that_of_transformers(tokenizer: Tokenizer, ref_llama: Path, options: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(ref_llama, dtype=torch.float32)
    theirs = AutoTokenizer.from_pretrained(ref_llama)
    options |= {"temperature": 0, "max_new_tokens": 30}
    for prompt in (PROMPT, [{"role": "user", "content": "Read a file"}]):
        text = "".join(runtime.generate(model, theirs, prompt, **options))
        for speculation in ({}, {"lookup": 4}):
            found = generate(
                Recomputed(model), tokenizer, prompt, defaults=read_defaults(ref_llama), **options, **speculation
            )
            assert "".join(found) == text


def test_what_is_not_given_comes_from_the_models_files(model: Toy, tokenizer: Tokenizer, ref_llama: Path) -> None:
    ids, defaults = tokenizer.prompt_ids(PROMPT), read_defaults(ref_llama)
    rules = Rules(temperature=0.8, top_k=50, top_p=0.95)
    sampled = continued(model, ids, 30, rules, seed=5)
    text = "".join(generate(model, tokenizer, PROMPT, defaults=defaults, max_new_tokens=30, seed=5))
    assert text == tokenizer.decode(sampled) != tokenizer.decode(continued(model, ids, 30, Rules.greedy()))


def test_a_seed_repeats_the_text(model: Toy, tokenizer: Tokenizer) -> None:
    sampling = Sampling(max_new_tokens=20, temperature=1.0, top_p=1.0, top_k=0, seed=1)
    first = "".join(generate(model, tokenizer, PROMPT, sampling))
    assert "".join(generate(model, tokenizer, PROMPT, sampling)) == first
    assert "".join(generate(model, tokenizer, PROMPT, sampling, seed=2)) != first
    unseeded = {"".join(generate(model, tokenizer, PROMPT, sampling, seed=None)) for _ in range(3)}
    assert len(unseeded) == 3


def test_the_penalty_counts_the_prompt_and_the_answer(model: Toy, tokenizer: Tokenizer) -> None:
    ids = tokenizer.prompt_ids(PROMPT)
    text = "".join(generate(model, tokenizer, PROMPT, temperature=0, repetition_penalty=1e5, max_new_tokens=60))
    said = continued(model, ids, 60, Rules.greedy(1e5))
    assert text == tokenizer.decode(said)
    assert len({*ids, *said}) == len(set(ids)) + 60, "no token comes twice"


@pytest.mark.parametrize("way", ["plain", "lookup", "draft"])
def test_a_text_ends_at_each_of_its_ends(model: Toy, tokenizer: Tokenizer, way: str) -> None:
    said = continued(model, tokenizer.prompt_ids(PROMPT), 30, Rules.greedy())
    end = next(place for place in range(10, 30) if said[place] not in said[:place])
    ends = frozenset({said[end], *(token for token in range(VOCABULARY) if token not in said)})
    options: dict[str, Any] = {"plain": {}, "lookup": {"lookup": 8}, "draft": {"draft": Toy(VOCABULARY)}}[way]
    for _ in range(2):  # the second time drafts are all right
        generation = generate(model, tokenizer, PROMPT, temperature=0, defaults=Defaults({}, ends), **options)
        assert "".join(generation) == tokenizer.decode(said[: end + 1])
        assert generation.stats.tokens == end + 1


@pytest.mark.parametrize("way", ["plain", "lookup", "draft"])
def test_a_text_ends_where_the_positions_do(tokenizer: Tokenizer, way: str) -> None:
    ids = tokenizer.prompt_ids(PROMPT)
    model = Toy(VOCABULARY, positions=len(ids) + 9)
    short = Toy(VOCABULARY, positions=len(ids) + 3)
    options: dict[str, Any] = {"plain": {}, "lookup": {"lookup": 8}, "draft": {"draft": short}}[way]
    generation = generate(model, tokenizer, PROMPT, temperature=0, max_new_tokens=100, **options)
    assert "".join(generation) == tokenizer.decode(continued(model, ids, 9, Rules.greedy()))
    assert generation.stats.tokens == 9
    with pytest.raises(WaterfillError, match=f"has {len(ids)} tokens, but the model has room for 2; shorten it"):
        generate(Toy(VOCABULARY, positions=2), tokenizer, PROMPT)


def test_stats_count_the_tokens_and_the_time(model: Toy, tokenizer: Tokenizer) -> None:
    generation = generate(model, tokenizer, PROMPT, temperature=0, max_new_tokens=12)
    assert generation.stats.tokens == 0
    assert math.isnan(generation.stats.first_token_s)
    assert not model.passes, "nothing runs before the first piece is asked for"
    list(generation)
    stats = generation.stats
    assert stats.tokens == len(model.passes) == 12
    assert 0 < stats.first_token_s < stats.elapsed_s
    assert stats.tokens_per_second == pytest.approx(11 / (stats.elapsed_s - stats.first_token_s))
    assert generation.speculation is None


def test_leaving_early_stops_the_model(model: Toy, tokenizer: Tokenizer) -> None:
    generation = generate(model, tokenizer, PROMPT, temperature=0, max_new_tokens=900)
    assert next(generation)
    passes = len(model.passes)
    generation.close()
    assert list(generation) == []
    assert len(model.passes) == passes <= 3
    assert generation.stats.tokens == passes


def test_only_what_is_new_in_a_conversation_is_read(model: Toy, tokenizer: Tokenizer) -> None:
    sequences = Sequences(model)
    messages = [{"role": "user", "content": "Read a file"}]
    answer = "".join(generate(sequences, tokenizer, messages, temperature=0, max_new_tokens=5))
    assert model.passes == [len(tokenizer.prompt_ids(messages)), 1, 1, 1, 1]
    held = list(model.ids)

    messages += [{"role": "assistant", "content": "open()"}, {"role": "user", "content": "And close it"}]
    ids = tokenizer.prompt_ids(messages)
    common = next(place for place, token in enumerate(ids) if held[place : place + 1] != [token])
    assert common > 5
    model.passes.clear()
    again = "".join(generate(sequences, tokenizer, messages, temperature=0, max_new_tokens=2))
    assert model.passes == [len(ids) - common, 1]
    assert again == tokenizer.decode(continued(model, ids, 2, Rules.greedy()))

    model.passes.clear()
    assert "".join(generate(sequences, tokenizer, messages[:1], temperature=0, max_new_tokens=5)) == answer
    assert model.passes == [1] * 5, "of a prompt that is all known the last token is read again"


@pytest.mark.parametrize(
    "change", [lambda sequence: sequence.truncate(2), lambda sequence: sequence.model.forward([sequence], [[5, 6, 7]])]
)
def test_a_sequence_that_others_have_used_is_read_as_it_is(model: Toy, tokenizer: Tokenizer, change: Any) -> None:
    sequences = Sequences(model)
    whole = "".join(generate(sequences, tokenizer, PROMPT, temperature=0, max_new_tokens=9))
    used = sequences.take()
    change(used)
    sequences.give_back(used)
    assert "".join(generate(sequences, tokenizer, PROMPT, temperature=0, max_new_tokens=9)) == whole


def test_a_text_that_was_never_begun_gives_its_sequence_back(model: Toy, tokenizer: Tokenizer) -> None:
    sequences = Sequences(model)
    "".join(generate(sequences, tokenizer, PROMPT, temperature=0, max_new_tokens=3))
    model.passes.clear()
    generation = generate(sequences, tokenizer, PROMPT, temperature=0, max_new_tokens=3)
    del generation
    "".join(generate(sequences, tokenizer, PROMPT, temperature=0, max_new_tokens=3))
    assert model.passes == [1] * 3, "what was read of the first text is still there"


class Fails(Toy):
    """Runs into an error, of the user's making or its own, halfway through one pass."""

    def __init__(self, at: int, error: type[BaseException]) -> None:
        super().__init__(VOCABULARY)
        self.at, self.error = at, error

    def forward(self, sequences: Any, tokens: Any, logits: Any = 1) -> Any:
        found = super().forward(sequences, tokens, logits)
        if len(self.passes) == self.at:
            raise self.error("the disk caught fire")
        return found


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_reaches_the_consumer_after_the_text_before_it(
    tokenizer: Tokenizer, error: type[BaseException]
) -> None:
    model, pieces = Fails(20, error), []
    sequences = Sequences(model)
    with pytest.raises(error, match="the disk caught fire"):
        pieces.extend(generate(sequences, tokenizer, PROMPT, temperature=0, max_new_tokens=40))
    whole = tokenizer.decode(continued(model, tokenizer.prompt_ids(PROMPT), 40, Rules.greedy()))
    assert "".join(pieces) == whole[: len("".join(pieces))] != ""
    assert "".join(generate(sequences, tokenizer, PROMPT, temperature=0, max_new_tokens=40)) == whole, (
        "as if nothing was"
    )


def test_two_texts_may_take_turns(model: Toy, tokenizer: Tokenizer) -> None:
    sequences = Sequences(model)
    prompts = (PROMPT, PROMPT + "    return")
    alone = ["".join(generate(Toy(VOCABULARY), tokenizer, p, temperature=0, max_new_tokens=9)) for p in prompts]
    both: list[Generation] = [generate(sequences, tokenizer, p, temperature=0, max_new_tokens=9) for p in prompts]
    texts = ["", ""]
    for _ in range(10):
        texts = [text + next(generation, "") for text, generation in zip(texts, both, strict=True)]
    assert texts == alone


def test_an_empty_prompt_starts_from_the_first_token_of_a_text(model: Toy, tokenizer: Tokenizer) -> None:
    assert tokenizer.prompt_ids("") == [0]
    text = "".join(generate(model, tokenizer, "", temperature=0, max_new_tokens=4))
    assert text == tokenizer.decode(continued(model, [0], 4, Rules.greedy()))


def test_options_that_contradict_each_other(model: Toy, tokenizer: Tokenizer) -> None:
    with pytest.raises(WaterfillError, match="give either draft or lookup"):
        generate(model, tokenizer, "a", draft=model, lookup=3)
    with pytest.raises(WaterfillError, match="lookup is 0; choose a whole number from 1"):
        generate(model, tokenizer, "a", lookup=0)
    with pytest.raises(WaterfillError, match="vocabulary of 16 tokens and the model one of 8192; give a draft with"):
        generate(model, tokenizer, "a", draft=Toy(16))
    with pytest.raises(WaterfillError, match="top_p is 2; choose a number above 0"):
        generate(model, tokenizer, "a", top_p=2)


LEAN = """
import sys
from pathlib import Path
import waterfill.running.engine
from tests.support.toys import Toy
from waterfill.running.text.generation import generate
from waterfill.running.text.defaults import read_defaults
from waterfill.running.text.tokenizer_files import load_tokenizer
path = Path(sys.argv[1])
model, tokenizer, defaults = Toy(8192), load_tokenizer(path), read_defaults(path)
tokenizer.templates["default"] = "{{ messages[0].content }}"
for prompt in ("def f(x, x, x", [{"role": "user", "content": "hello"}]):
    for options in ({}, {"lookup": 3}, {"draft": Toy(8192)}):
        assert "".join(generate(model, tokenizer, prompt, defaults=defaults, max_new_tokens=9, **options))
print(sorted({"torch", "transformers", "jinja2"} & sys.modules.keys()))
"""


def test_neither_torch_nor_transformers_is_imported(ref_llama: Path) -> None:
    command = [sys.executable, "-c", LEAN, str(ref_llama)]
    here = Path(__file__).parents[3]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=here)
    assert done.stdout.strip() == "['jinja2']", done.stderr


def test_tokens_that_the_model_does_not_know_are_refused(tokenizer: Tokenizer) -> None:
    ids = tokenizer.prompt_ids(PROMPT)
    small = Toy(max(ids))
    with pytest.raises(
        WaterfillError, match=f"the prompt holds token {max(ids)}, but the model knows {max(ids)} tokens"
    ):
        generate(small, tokenizer, PROMPT)
