"""Probes: what they are sampled from, that a seed repeats them, and what cannot be one."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.models import tiny_llama
from waterfill.base.errors import WaterfillError
from waterfill.planning.probe import MOST_SEQUENCES, Probe, own_text, probe_tokens, spread_windows


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "model", tied=True, dtype=torch.float32)).eval()


@pytest.fixture(scope="module")
def trained(ref_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(ref_llama, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequences": 1}, "1 sequences of 160 tokens cannot give a standard error"),
        ({"length": 1}, f"{MOST_SEQUENCES} sequences of 1 tokens cannot give a standard error"),
        ({"sequences": -3}, "use at least 2 sequences of 2 tokens"),
        ({"kind": "text"}, "probe 'text' and no text file do not go together"),
        ({"kind": "self", "text": Path("a.txt")}, "probe 'self' and the text file a.txt do not go together"),
        ({"kind": "wikitext"}, "probe 'wikitext' is unknown; use self, random, text"),
    ],
)
def test_impossible_probes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(WaterfillError, match=message):
        Probe(**options)


@pytest.mark.parametrize("start", [None, 7])
def test_own_text_is_ancestral_sampling_from_a_random_token(model: Any, start: int | None) -> None:
    """Token by token without a cache, the same draws give the same text."""
    seen: list[tuple[int, int]] = []
    tokens = own_text(model, range(3), 12, 5, lambda done, total: seen.append((done, total)), start=start)
    assert seen == [(position, 11) for position in range(12)]
    assert tokens.dtype == torch.int64
    generators = [np.random.default_rng([5, number]) for number in range(3)]
    expected = torch.tensor([[generator.integers(256)] for generator in generators])
    if start is not None:
        expected = torch.cat([torch.full((3, 1), start), expected], dim=1)
        for generator in generators:
            generator.random()  # what follows the start is none of what the model says
    with torch.no_grad():
        while expected.shape[1] < 12:
            probabilities = model(input_ids=expected).logits[:, -1].double().softmax(-1)
            draws = torch.tensor([[generator.random()] for generator in generators], dtype=torch.float64)
            token = (probabilities.cumsum(-1) < draws).sum(-1, keepdim=True)
            expected = torch.cat([expected, token], dim=1)
    assert torch.equal(tokens, expected)


def test_a_sequence_depends_on_the_seed_and_its_number(model: Any) -> None:
    """Whoever is drawn beside it, and in whichever batch."""
    tokens = own_text(model, range(40), 10, seed=3)
    assert torch.equal(own_text(model, [39, 2], 10, seed=3), tokens[[39, 2]])
    assert own_text(model, [], 10, seed=3).shape == (0, 10)
    assert not torch.equal(own_text(model, range(40), 10, seed=-3), tokens)


def test_self_probe_has_the_models_distribution(model: Any) -> None:
    count = 20_000
    tokens = probe_tokens(model, None, Probe(sequences=count, length=2))
    with torch.no_grad():
        after = model(input_ids=torch.arange(256)[:, None]).logits[:, -1].double().softmax(-1)
    expected = torch.bincount(tokens[:, 0], minlength=256).double() @ after
    observed = torch.bincount(tokens[:, 1], minlength=len(expected))
    common = expected > 5
    chi2 = ((observed - expected).square() / expected)[common].sum()
    freedom = int(common.sum())
    assert freedom > 50
    assert abs(float(chi2) - freedom) < 5 * math.sqrt(2 * freedom)


def test_self_probe_of_a_trained_model(trained: Any) -> None:
    tokens = probe_tokens(trained, None, Probe(sequences=4, length=32))
    assert tokens.shape == (4, 32)
    assert len(tokens[:, 0].unique()) == 4
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < 8192
    assert torch.equal(probe_tokens(trained, None, Probe(sequences=4, length=32)), tokens)
    assert not torch.equal(probe_tokens(trained, None, Probe(sequences=4, length=32, seed=1)), tokens)
    with torch.no_grad():
        nll = float(trained(input_ids=tokens, labels=tokens).loss)
    assert 1 < nll < 7  # nats: text that the model finds likely; uniform tokens cost more than 9


def test_own_text_begins_with_any_token_after_the_start(model: Any) -> None:
    assert own_text(model, range(3), 1, 0, start=7).eq(7).all()
    tokens = own_text(model, range(50), 3, 0, start=7)
    assert tokens[:, 0].eq(7).all()
    assert len(tokens[:, 1].unique()) > 30
    assert torch.equal(own_text(model, range(50), 2, 0)[:, 0], tokens[:, 1])


def test_a_model_that_gives_no_probabilities_is_refused(model: Any) -> None:
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(WaterfillError, match="the model gives NaN or infinite logits on the probe"):
        probe_tokens(model, None, Probe(sequences=2, length=4))


@pytest.mark.parametrize("kind", ["self", "random"])
def test_probes_end_where_the_models_positions_do(kind: Any, model: Any) -> None:
    assert probe_tokens(model, None, Probe(kind=kind, sequences=2, length=400)).shape == (2, 128)


def test_random_probe(model: Any) -> None:
    probe = Probe(kind="random", sequences=40, length=100, seed=2)
    tokens = probe_tokens(model, None, probe)
    assert tokens.shape == (40, 100)
    counts = torch.bincount(tokens.flatten(), minlength=256).double()
    assert len(counts) == 256
    chi2 = float((counts - 4000 / 256).square().sum() / (4000 / 256))
    assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255)
    assert torch.equal(probe_tokens(model, None, probe), tokens)
    assert not torch.equal(probe_tokens(model, None, Probe(kind="random", sequences=40, length=100)), tokens)


def test_text_probe_is_spread_over_the_text(trained: Any, ref_llama: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ref_llama)
    text = "\n".join(f"def function_{i}(x): return x + {i * i}  # é" for i in range(400))
    file = tmp_path / "some.txt"
    file.write_text(text, "utf-8")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    available = len(ids) // 50
    tokens = probe_tokens(trained, tokenizer, Probe(kind="text", text=file, sequences=5, length=50))
    places = [round(i * (available - 1) / 4) for i in range(5)]
    assert torch.equal(tokens, torch.stack([ids[50 * place : 50 * place + 50] for place in places]))
    everything = probe_tokens(trained, tokenizer, Probe(kind="text", text=file, sequences=available, length=50))
    assert torch.equal(everything.flatten(), ids[: 50 * available])
    with pytest.raises(WaterfillError, match=rf"some.txt holds {available} windows of 50 tokens, the probe needs 9999"):
        probe_tokens(trained, tokenizer, Probe(kind="text", text=file, sequences=9999, length=50))


@pytest.mark.parametrize("available", [2, 3, 5, 20, 32, 33, 100])
def test_the_first_windows_of_a_text_are_spread_over_it(available: int, model: Any, tmp_path: Path) -> None:
    """However many of them are measured in the end."""
    file = tmp_path / "some.txt"
    file.write_text("anything")
    ids = [number % 256 for number in range(available) for _ in range(4)]
    windows = spread_windows(model, lambda *_, **__: {"input_ids": [*ids, 1]}, Probe("text", length=4, text=file))
    count = min(available, MOST_SEQUENCES)
    places = windows[:, 0].tolist()
    assert windows.tolist() == [[place] * 4 for place in places]
    assert sorted(places) == [round(i * (available - 1) / (count - 1)) for i in range(count)]
    for first in (4, 8, 16, 32):
        if first <= count:
            gaps = [b - a for a, b in pairwise(sorted([*places[:first], available]))]
            assert max(gaps) <= 2 * available / first + 1, first


def test_a_text_of_one_window_says_nothing_of_how_much_texts_differ(model: Any, tmp_path: Path) -> None:
    file = tmp_path / "some.txt"
    file.write_text("anything")
    with pytest.raises(WaterfillError, match=r"some\.txt holds 1 windows of 4 tokens, the probe needs 2"):
        spread_windows(model, lambda *_, **__: {"input_ids": [1] * 7}, Probe("text", length=4, text=file))


def test_text_with_tokens_that_the_model_does_not_know(model: Any, tmp_path: Path) -> None:
    text, known = tmp_path / "text.txt", model.get_input_embeddings().num_embeddings
    text.write_text("anything")
    probe = Probe(kind="text", text=text, sequences=2, length=8)
    with pytest.raises(WaterfillError, match=f"text.txt holds token {known}, but the model knows {known} tokens"):
        probe_tokens(model, lambda *_, **__: {"input_ids": [*range(15), known]}, probe)


def test_text_that_cannot_be_read(model: Any, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name in ("latin.txt", "absent.txt"):
        with pytest.raises(WaterfillError, match=f"cannot read .*{name} as UTF-8 text"):
            probe_tokens(model, None, Probe(kind="text", text=tmp_path / name))


def test_random_tokens_are_such_as_are_read_and_predicted(model: Any) -> None:
    rows = model.get_input_embeddings().num_embeddings
    model.set_input_embeddings(torch.nn.Embedding(8 * rows, 64))
    tokens = probe_tokens(model, None, Probe("random", sequences=4, length=64))
    assert rows - 16 < tokens.max() < rows


def test_a_model_that_cannot_be_continued_cannot_sample(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = type(model).forward

    def nothing(self: Any, *args: Any, **options: Any) -> Any:
        output = forward(self, *args, **options)
        output.logits = output.logits[:, :0]
        return output

    monkeypatch.setattr(type(model), "forward", nothing)
    with pytest.raises(WaterfillError, match=r"LlamaForCausalLM predicts 0 tokens from one .*--probe random"):
        probe_tokens(model, None, Probe("self", sequences=2, length=4))
