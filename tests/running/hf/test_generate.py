"""Streaming generation on the example model: the text is transformers' own, and the thread ends however it is left."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from waterfill.base.errors import WaterfillError
from waterfill.running.hf.generate import HfGeneration, Sampling, generate
from waterfill.running.loading import check_generation

PROMPT = "def read_file(path):\n"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def model(ref_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(ref_llama, dtype=torch.float32)


@pytest.fixture
def tokenizer(ref_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(ref_llama)


@contextmanager
def counted_forwards(model: Any, fail_at: int | None = None) -> Iterator[list[int]]:
    """Count the model's forward passes, or let one of them fail."""
    calls: list[int] = []

    def hook(*_: Any) -> None:
        calls.append(len(calls) + 1)
        if len(calls) == fail_at:
            raise RuntimeError("the disk caught fire")

    handle = model.register_forward_pre_hook(hook)
    try:
        yield calls
    finally:
        handle.remove()


def generating_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "waterfill-generate"]


def test_streamed_pieces_are_the_text_that_transformers_generates(model: Any, tokenizer: Any) -> None:
    inputs = tokenizer(PROMPT, return_tensors="pt")
    whole = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    pieces = list(generate(model, tokenizer, PROMPT, temperature=0, max_new_tokens=40))
    assert "".join(pieces) == tokenizer.decode(whole, skip_special_tokens=True)
    assert len(pieces) > 1
    assert all(pieces)


def test_unset_options_come_from_the_models_generation_config(model: Any, tokenizer: Any) -> None:
    assert model.generation_config.do_sample
    inputs = tokenizer(PROMPT, return_tensors="pt")
    torch.manual_seed(5)
    whole = model.generate(**inputs, max_new_tokens=30)[0, inputs["input_ids"].shape[1] :]
    text = "".join(generate(model, tokenizer, PROMPT, max_new_tokens=30, seed=5))
    assert text == tokenizer.decode(whole, skip_special_tokens=True)


def test_a_seed_repeats_the_text_and_leaves_the_callers_random_state_alone(model: Any, tokenizer: Any) -> None:
    before = torch.get_rng_state()
    sampling = Sampling(max_new_tokens=20, temperature=1.0, top_p=1.0, top_k=0, seed=1)
    first = "".join(generate(model, tokenizer, PROMPT, sampling))
    assert "".join(generate(model, tokenizer, PROMPT, sampling)) == first
    assert "".join(generate(model, tokenizer, PROMPT, sampling, seed=2)) != first
    assert torch.equal(torch.get_rng_state(), before)
    "".join(generate(model, tokenizer, PROMPT, sampling, seed=None))
    assert not torch.equal(torch.get_rng_state(), before)


def test_the_likeliest_token_alone_is_greedy(model: Any, tokenizer: Any) -> None:
    greedy = "".join(generate(model, tokenizer, PROMPT, max_new_tokens=15, temperature=0))
    assert "".join(generate(model, tokenizer, PROMPT, max_new_tokens=15, top_k=1, temperature=1.5)) == greedy
    assert (
        "".join(generate(model, tokenizer, PROMPT, max_new_tokens=15, repetition_penalty=50.0, temperature=0)) != greedy
    )


def test_arguments_that_transformers_receives() -> None:
    assert Sampling().arguments() == {}
    assert Sampling(temperature=0, top_p=0.5, top_k=3).arguments() == {"do_sample": False}
    assert Sampling(top_p=0.5).arguments() == {"do_sample": True, "top_p": 0.5}
    assert Sampling(temperature=0.5, top_k=0, repetition_penalty=1.1).arguments() == {
        "do_sample": True,
        "temperature": 0.5,
        "top_k": 0,
        "repetition_penalty": 1.1,
    }


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_prompts_that_are_not_utf8_are_refused(template: str | None, model: Any, tokenizer: Any) -> None:
    """A byte that is not UTF-8 reaches a program as a surrogate."""
    tokenizer.chat_template = template
    text = os.fsdecode(b"caf\xe9")
    for prompt in (text, [{"role": "user", "content": "coffee?"}, {"role": "user", "content": text}]):
        with pytest.raises(WaterfillError, match=r"not valid UTF-8: its character 4 is '\\udce9'; write it in UTF-8"):
            generate(model, tokenizer, prompt)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("top_k", -1),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_values_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(WaterfillError, match=f"{name} is {value}; choose"):
        Sampling(**{name: value})


def test_stats_count_the_tokens_and_the_time(model: Any, tokenizer: Any) -> None:
    with counted_forwards(model) as forwards:
        generation = generate(model, tokenizer, PROMPT, temperature=0, max_new_tokens=12)
        assert generation.stats.tokens == 0
        assert not forwards, "nothing runs before the first piece is asked for"
        list(generation)
    stats = generation.stats
    assert stats.tokens == len(forwards) == 12
    assert 0 < stats.first_token_s < stats.elapsed_s
    assert stats.tokens_per_second == pytest.approx(11 / (stats.elapsed_s - stats.first_token_s))
    single = generate(model, tokenizer, PROMPT, temperature=0, max_new_tokens=1)
    list(single)
    assert single.stats.tokens == 1
    assert math.isnan(single.stats.tokens_per_second)


def test_an_error_of_the_model_reaches_the_consumer_after_the_text_before_it(model: Any, tokenizer: Any) -> None:
    pieces: list[str] = []
    with counted_forwards(model, fail_at=20), pytest.raises(RuntimeError, match="the disk caught fire"):
        pieces.extend(generate(model, tokenizer, PROMPT, temperature=0, max_new_tokens=40))
    assert not generating_threads()
    whole = "".join(generate(model, tokenizer, PROMPT, temperature=0, max_new_tokens=40))
    assert pieces
    assert whole.startswith("".join(pieces))


def first_piece(generation: HfGeneration) -> str:
    for piece in generation:
        return piece
    raise AssertionError("no text was generated")


def test_leaving_early_stops_the_model(model: Any, tokenizer: Any) -> None:
    with counted_forwards(model) as forwards:
        generation = generate(model, tokenizer, PROMPT, temperature=0, max_new_tokens=900)
        first_piece(generation)
        generation.close()
        assert not generating_threads()
        assert len(forwards) < 300
        assert generation.stats.tokens >= 1
        assert list(generation) == []

        first_piece(generate(model, tokenizer, PROMPT, temperature=0, max_new_tokens=900))  # dropped, not closed
        assert not generating_threads()
        assert len(forwards) < 600


def test_messages_without_a_template_become_plain_lines(model: Any, tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Read a file"},
        {"role": "assistant", "content": "open()"},
        {"role": "user", "content": "And close it"},
    ]
    lines = "System: Be brief.\nUser: Read a file\nAssistant: open()\nUser: And close it\nAssistant:"
    assert answer(model, tokenizer, messages) == answer(model, tokenizer, lines)


def test_messages_go_through_the_chat_template(model: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    messages = [{"role": "user", "content": "Read a file"}]
    assert answer(model, tokenizer, messages) == answer(model, tokenizer, "<user>Read a file\n<assistant>")
    assert answer(model, tokenizer, messages) != answer(model, tokenizer, "User: Read a file\nAssistant:")


def answer(model: Any, tokenizer: Any, prompt: Any) -> str:
    return "".join(generate(model, tokenizer, prompt, temperature=0, max_new_tokens=16))


def test_conversations_that_cannot_be_answered_are_refused(model: Any, tokenizer: Any) -> None:
    with pytest.raises(WaterfillError, match="give at least one"):
        generate(model, tokenizer, [])
    with pytest.raises(WaterfillError, match="'role' and 'content'"):
        generate(model, tokenizer, [{"role": "user"}])
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(WaterfillError, match="refuses the conversation \\(roles must alternate\\)"):
        generate(model, tokenizer, [{"role": "user", "content": "hello"}])


def test_an_empty_prompt_starts_from_the_first_token_of_a_text(model: Any, tokenizer: Any) -> None:
    assert answer(model, tokenizer, "") == answer(model, tokenizer, tokenizer.bos_token)
    tokenizer.bos_token = None
    with pytest.raises(WaterfillError, match="the prompt is empty"):
        generate(model, tokenizer, "")


def test_generation_ends_where_the_models_positions_do(model: Any, tokenizer: Any) -> None:
    long = " ".join(["x"] * 4000)
    ids = tokenizer(long, verbose=False)["input_ids"][:1019]
    generation = generate(model, tokenizer, tokenizer.decode(ids), temperature=0, max_new_tokens=100)
    prompt_tokens = len(tokenizer(tokenizer.decode(ids))["input_ids"])
    list(generation)
    assert generation.stats.tokens == 1024 - prompt_tokens < 100
    with pytest.raises(WaterfillError, match="but the model has room for 1024; shorten it"):
        generate(model, tokenizer, long)


# What a generation_config.json says, and whether it is refused before the weights are read (a), as a generation starts
# (b), or is no obstacle.
CHOICES: list[tuple[Any, str]] = [
    ("{", "a"), ("[1]", "a"), ('"x"', "a"), ("null", "a"), ("[" * 100_000, "a"), ("{}", ""),
    ({"stop_strings": ["the end"]}, ""), ({"stop_strings": "x"}, ""), ({"stop_strings": 5}, "a"),
    ({"num_return_sequences": 3, "do_sample": True}, ""), ({"num_return_sequences": 3}, "a"), ({"num_beams": 4}, ""),
    ({"num_beams": "x"}, "a"), ({"do_sample": True, "temperature": 0.0}, "b"), ({"temperature": "hot"}, "a"),
    ({"repetition_penalty": 0}, "b"), ({"repetition_penalty": [1]}, "a"), ({"do_sample": True, "top_k": 50.0}, "b"),
    ({"top_k": 1.5}, "a"), ({"do_sample": True, "min_p": 2.0}, "b"), ({"do_sample": "yes"}, "a"),
    ({"penalty_alpha": 0.6, "top_k": 4}, "b"), ({"dola_layers": "low"}, "b"), ({"constraints": [1]}, "b"),
    ({"bad_words_ids": [3]}, "b"), ({"bad_words_ids": [[99999]]}, "b"), ({"suppress_tokens": "x"}, "a"),
    ({"suppress_tokens": [1]}, ""), ({"eos_token_id": "x"}, "a"), ({"eos_token_id": [1, None]}, "a"),
    ({"eos_token_id": 99999}, ""), ({"pad_token_id": True}, "a"), ({"forced_eos_token_id": 99999}, "a"),
    ({"forced_eos_token_id": [3]}, ""), ({"max_new_tokens": 0}, "a"), ({"max_length": "x"}, "a"),
    ({"no_repeat_ngram_size": "x"}, "a"), ({"no_repeat_ngram_size": 2}, ""), ({"guidance_scale": 1.5}, ""),
    ({"exponential_decay_length_penalty": 3}, "b"), ({"sequence_bias": 3}, "b"), ({"watermarking_config": 3}, "a"),
    ({"cache_implementation": "nonsense"}, "a"), ({"use_cache": "x"}, "a"), ({"prefill_chunk_size": 0}, "b"),
    ({"prompt_lookup_num_tokens": "x"}, "a"), ({"max_time": "x"}, "a"), ({"use_mtp": True}, "b"),
    ({"early_stopping": "x"}, "a"), ({"custom_generate": "some/code"}, ""), ({"an_option_of_next_year": [1]}, ""),
]  # fmt: skip


@pytest.mark.parametrize(("choices", "refused"), CHOICES, ids=range(len(CHOICES)))
def test_choices_of_the_model_are_followed_or_refused_in_words(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choices: Any, refused: str
) -> None:
    text = choices if isinstance(choices, str) else json.dumps(choices)
    (tmp_path / "generation_config.json").write_text(text)
    if refused == "a":
        with pytest.raises(WaterfillError, match=r"generation_config\.json (sets|has|holds|cannot)"):
            check_generation(tmp_path, model.config)
        return
    check_generation(tmp_path, model.config)
    monkeypatch.setattr(model, "generation_config", GenerationConfig.from_pretrained(tmp_path))
    generation = generate(model, tokenizer, "once", max_new_tokens=3, seed=1)
    if refused:
        with pytest.raises(WaterfillError, match=r"as its generation_config\.json wants, which sets .*; change it"):
            list(generation)
    else:
        list(generation)
        assert 1 <= generation.stats.tokens <= 3


def test_a_text_ends_at_a_stop_string(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = "".join(generate(model, tokenizer, "def read(", temperature=0, max_new_tokens=24))
    stop = whole[5:8]
    monkeypatch.setattr(model, "generation_config", GenerationConfig(stop_strings=[stop], eos_token_id=0))
    text = "".join(generate(model, tokenizer, "def read(", temperature=0, max_new_tokens=24))
    assert stop in text
    assert whole.startswith(text)
    assert len(text) < len(whole)


def test_tokens_that_the_model_does_not_know_are_refused(model: Any, tokenizer: Any) -> None:
    known = model.config.vocab_size
    tokenizer.add_tokens(["<|extra|>"])
    assert len(tokenizer) == known + 1
    with pytest.raises(WaterfillError, match=f"the prompt holds token {known}, but the model knows {known} tokens"):
        generate(model, tokenizer, "a <|extra|>")
