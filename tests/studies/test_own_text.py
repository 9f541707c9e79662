"""A model's own text as the native engine writes it: whose it is, what it depends on, and what is left behind."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import waterfill
from tests.support.models import tiny_gemma, tiny_gpt2, tiny_llama
from waterfill.base.cache import cache_folder
from waterfill.base.errors import UnsupportedError, WaterfillError
from waterfill.files.architecture import describe
from waterfill.files.checkpoint import open_checkpoint
from waterfill.planning.probe import own_text
from waterfill.running.engine.families.llama import LlamaModel
from waterfill.running.engine.opening import open_model
from waterfill.studies import own_text as module
from waterfill.studies.own_text import OwnText


def opened(path: Path, *keep: str, **options: Any) -> OwnText:
    checkpoint = open_checkpoint(path)
    return OwnText(checkpoint, describe(checkpoint, keep), **options)


@pytest.fixture(scope="module")
def trained(ref_llama: Path) -> Iterator[OwnText]:
    with opened(ref_llama) as text:
        yield text


def left_behind() -> list[Path]:
    return list(cache_folder().glob("own-text-*")) if cache_folder().exists() else []


# -- what a sequence depends on ---------------------------------------------------------------------------------------


def test_a_sequence_depends_on_the_seed_and_its_number(trained: OwnText, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is drawn beside it, in whichever order and batch."""
    tokens = trained.sample(range(5), 24, seed=3)
    assert tokens.shape == (5, 24)
    assert tokens.dtype == torch.int64
    assert torch.equal(trained.sample([4, 1], 24, seed=3), tokens[[4, 1]])
    assert torch.equal(trained.sample(range(5), 9, seed=3), tokens[:, :9])
    monkeypatch.setattr(module, "TOGETHER", 2)
    assert torch.equal(trained.sample(range(5), 24, seed=3), tokens)
    assert not torch.equal(trained.sample(range(5), 24, seed=4), tokens)
    assert len({tuple(row) for row in tokens.tolist()}) == 5


def test_progress_is_called(ref_llama: Path) -> None:
    seen: list[tuple[int, int]] = []
    packed: list[tuple[str, int, int]] = []
    with opened(ref_llama, progress=lambda *step: packed.append(step)) as text:
        text.sample(range(3), 5, 0, lambda done, total: seen.append((done, total)))
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert {what for what, _, _ in packed} == {"packing it to sample from"}
    assert packed[-1][1] == packed[-1][2] > 0


def drawn_with(seed: int, count: int, length: int) -> torch.Tensor:
    """What decides the tokens of each behind the first one, `[count, length]`."""
    generators = [np.random.default_rng([seed, number]) for number in range(count)]
    for generator in generators:
        generator.integers(8192)  # the first one
    return torch.tensor(np.array([generator.random(length) for generator in generators]))


def ends(probabilities: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each token lies among the sums of probabilities `[count, length, vocabulary]`: from, to."""
    sums = torch.nn.functional.pad(probabilities.cumsum(-1), (1, 0))
    return sums.gather(2, tokens[..., None])[..., 0], sums.gather(2, tokens[..., None] + 1)[..., 0]


# -- whose text it is -------------------------------------------------------------------------------------------------


def test_text_of_the_codes_is_text_of_the_model(trained: OwnText, ref_llama: Path) -> None:
    """The original finds it as likely as what it samples itself, and draws nearly the same by the same numbers."""
    model = AutoModelForCausalLM.from_pretrained(ref_llama, dtype=torch.float32).eval()
    texts = [trained.sample(range(48), 96, seed=0), own_text(model, range(48), 96, seed=0)]
    draws = drawn_with(0, 48, 95)
    mean, off = [], []
    for tokens in texts:
        with torch.no_grad():
            log_p = model(input_ids=tokens[:, :-1]).logits.double().log_softmax(-1)
        mean.append(float(-log_p.gather(2, tokens[:, 1:, None]).mean()))
        below, above = ends(log_p.exp(), tokens[:, 1:])
        off.append(torch.maximum(below - draws, draws - above).clamp_min(0))
    assert mean[0] == pytest.approx(mean[1], rel=0.05)
    assert off[1].max() < 1e-5
    assert off[0].max() < 0.03
    assert (off[0] == 0).float().mean() > 0.5
    assert torch.equal(texts[0][:, 0], texts[1][:, 0])


def test_tokens_are_where_draws_lie_in_the_codes_own_probabilities(
    ref_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers computes them from the very codes that the engine has."""
    monkeypatch.setattr(module, "open_model", lambda path, **options: open_model(path, streamed=True, **options))
    with opened(ref_llama) as text:
        tokens = text.sample(range(8), 24, seed=1)
        (folder,) = left_behind()
        with torch.no_grad():
            logits = waterfill.load(folder / "packed", dtype=torch.float32)(input_ids=tokens[:, :-1]).logits
    draws = drawn_with(1, 8, 23)
    below, above = ends(logits.double().softmax(-1), tokens[:, 1:])
    assert (draws - below).min() > -0.015  # activations are rounded
    assert (above - draws).min() > -0.015
    assert ((below <= draws) & (draws <= above)).float().mean() > 0.5


def test_texts_begin_with_any_token_after_what_is_before_all(trained: OwnText) -> None:
    first = trained.sample(range(40), 2, seed=0)[:, 0]
    assert len(first.unique()) > 30
    texts = trained.sample(range(40), 2, seed=0, start=7)
    assert texts[:, 0].eq(7).all()
    assert torch.equal(texts[:, 1], first)


def test_what_the_user_keeps_is_packed_all_the_same(ref_llama: Path, trained: OwnText) -> None:
    with opened(ref_llama, "*.0.mlp.down_proj", "*embed_tokens*") as text:
        assert torch.equal(text.sample(range(2), 8, seed=0), trained.sample(range(2), 8, seed=0))


def test_logits_that_are_none_are_refused(ref_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaModel, "forward", lambda *_: [np.full((1, 8192), np.nan, np.float32)] * 2)
    with opened(ref_llama) as text, pytest.raises(WaterfillError, match="the model gives NaN or infinite logits"):
        text.sample(range(2), 4, seed=0)


# -- who writes where the engine cannot -------------------------------------------------------------------------------


def refused(text: OwnText, caplog: pytest.LogCaptureFixture) -> str:
    """The one line that says why."""
    with caplog.at_level(logging.INFO, logger="waterfill"):
        for _ in range(2):
            with pytest.raises(UnsupportedError):
                text.sample(range(2), 4, seed=0)
    (line,) = [record.getMessage() for record in caplog.records if record.name == module.__name__]
    assert "writes its own text by transformers, slower: " in line
    return line


def test_a_family_that_the_engine_does_not_know(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tiny_gpt2(tmp_path / "model")
    with opened(path) as text:
        assert "its kind is 'gpt2', not one of" in refused(text, caplog)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        tokens = own_text(model, range(3), 8, seed=2, writer=text.sample)
    assert torch.equal(tokens, own_text(model, range(3), 8, seed=2))
    assert not left_behind(), "it was not packed"


def test_a_checkpoint_whose_matrices_are_too_small(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tiny_llama(tmp_path / "model", hidden=16)
    with opened(path) as text:
        refused(text, caplog)
        assert not left_behind()


def test_a_cache_that_cannot_be_written(
    ref_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WATERFILL_CACHE", str(tmp_path / "file"))
    with opened(ref_llama) as text:
        assert str(tmp_path / "file") in refused(text, caplog)


def test_sensitivities_of_both_ways(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`waterfill.sensitivity` measures on the engine's text, and on transformers' for another family."""
    for build, by_engine in ((tiny_llama, True), (tiny_gemma, False)):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="waterfill"):
            measured = waterfill.sensitivity(build(tmp_path / build.__name__), sequences=2, length=8)
        assert measured.probe["kind"] == "self"
        assert measured.tokens == 10
        assert by_engine == (not [record for record in caplog.records if record.name == module.__name__])
        assert not left_behind()


def test_a_large_model_is_in_memory_only_while_it_writes(
    ref_llama: Path, trained: OwnText, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HELD_WEIGHTS", 1000)
    tokens = trained.sample(range(2, 4), 6, seed=0)
    packed: list[str] = []
    with opened(ref_llama, progress=lambda what, *_: packed.append(what)) as text:
        text.sample(range(2), 6, seed=0)
        assert text._model is None
        assert not left_behind()
        packed.clear()
        assert torch.equal(text.sample(range(2, 4), 6, seed=0), tokens)
        assert packed, "it was packed again"


# -- what is left behind ----------------------------------------------------------------------------------------------


def test_files_are_gone_as_soon_as_the_model_is_in_memory(ref_llama: Path) -> None:
    with opened(ref_llama) as text:
        text.sample(range(1), 2, seed=0)
        assert not left_behind()


def test_files_of_a_streamed_model_are_gone_at_the_end(
    ref_llama: Path, trained: OwnText, monkeypatch: pytest.MonkeyPatch, no_reader_left: None
) -> None:
    tokens = trained.sample(range(2), 6, seed=0)  # opens it in memory, where no test has before
    monkeypatch.setattr(module, "open_model", lambda path, **options: open_model(path, streamed=True, **options))
    with opened(ref_llama) as text:
        assert torch.equal(text.sample(range(2), 6, seed=0), tokens)
        assert left_behind()
    assert not left_behind()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("place", ["packing", "opening", "sampling"])
def test_files_are_gone_after_an_error(
    error: type[BaseException], place: str, ref_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        assert place == "sampling" or left_behind()
        raise error

    if place == "opening":
        monkeypatch.setattr(module, "open_model", fail)
    progress = {"progress": fail} if place == "packing" else {}
    with pytest.raises(error), opened(ref_llama, **progress) as text:
        text.sample(range(2), 8, 0, fail)
    assert not left_behind()
