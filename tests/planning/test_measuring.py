"""Sequences of a probe, measured until they say enough, and never twice."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import models
from tests.support.measuring import KINDS, RANDOM, falling, measured
from waterfill.base.cache import cache_folder
from waterfill.base.errors import UnsupportedError
from waterfill.files.architecture import describe
from waterfill.files.checkpoint import open_checkpoint
from waterfill.files.original import load_original, load_tokenizer
from waterfill.planning import measuring, probe_texts
from waterfill.planning.estimators import ProbePass
from waterfill.planning.probe import MOST_SEQUENCES, Probe, own_text, probe_tokens
from waterfill.planning.sensitivity import Sensitivity, measure, one_pass


class StopHereError(Exception):
    pass


@pytest.fixture(autouse=True)
def one_sequence_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "PASS_TOKENS", 1)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the sequences that are measured, as they are."""
    numbers: list[int] = []

    def counted(*arguments: Any, number: int, **options: Any) -> ProbePass:
        numbers.append(number)
        return one_pass(*arguments, number=number, **options)

    monkeypatch.setattr(measuring, "one_pass", counted)
    return numbers


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.tiny_llama(tmp_path_factory.mktemp("llama"), tokenizer=True, layers=1)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Some hundreds of tokens."""
    file = tmp_path / "text.py"
    file.write_text("\n".join(f"def function_{i}(x): return x + {i * i}" for i in range(60)))
    return file


# -- what is measured -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["llama", "gemma", "gpt2", "mixtral", "deepseek_v3"])
def test_block_by_block_is_what_the_model_in_memory_says(model: str, tmp_path: Path) -> None:
    path = getattr(models, f"tiny_{model}")(tmp_path)
    found = measured(path, probe="random", sequences=3, length=12, seed=5)
    whole = load_original(open_checkpoint(path), torch.float32)
    tokens = probe_tokens(whole, None, Probe(kind="random", sequences=3, length=12, seed=5))
    expected = measure(whole, describe(open_checkpoint(path)).matrices, tokens, seed=5, lead=3)
    assert found.samples is not None
    assert expected.samples is not None
    assert found.nll == pytest.approx(expected.nll, rel=1e-5)
    assert found.tokens == expected.tokens == 3 * (11 - 3)
    assert list(found.tensors) == list(expected.tensors)
    for name, coefficients in expected.tensors.items():
        assert found.tensors[name].tokens == coefficients.tokens, name
        assert found.samples[name].alpha == pytest.approx(expected.samples[name].alpha, rel=1e-3, abs=1e-9), name
        largest = max(map(abs, expected.samples[name].beta))  # it is the square of a sum that may cancel
        assert found.samples[name].beta == pytest.approx(expected.samples[name].beta, rel=1e-2, abs=1e-3 * largest)
        assert found.tensors[name].alpha == pytest.approx(coefficients.alpha, rel=1e-3, abs=1e-9), name


def test_what_every_sequence_says_is_kept_beside_its_mean(path: Path) -> None:
    found = measured(path, sequences=3, **RANDOM)
    assert found.samples is not None
    for name, coefficients in found.tensors.items():
        sample = found.samples[name]
        assert len(sample.alpha) == len(sample.beta) == 3
        assert coefficients.alpha == pytest.approx(sum(sample.alpha) / 3)
        assert coefficients.beta == pytest.approx(sum(sample.beta) / 3)
        spread = math.sqrt(sum((each - coefficients.alpha) ** 2 for each in sample.alpha) / 2)
        assert coefficients.alpha_stderr == pytest.approx(spread / math.sqrt(3))


def test_a_probe_begins_as_a_longer_one_does(path: Path) -> None:
    model = load_original(open_checkpoint(path), torch.float32)
    most = probe_tokens(model, None, Probe(kind="random", length=7))
    assert len(most) == MOST_SEQUENCES
    for sequences in range(2, MOST_SEQUENCES):
        assert torch.equal(probe_tokens(model, None, Probe("random", sequences, 7)), most[:sequences])


# -- how much is measured ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "precision", "count"),
    [
        (falling(0.2), 0.1, 4),  # at once
        (falling(0.21), 0.1, 5),
        (falling(0.4), 0.1, 16),  # by 8: never more than twice as many, as the first ones may be odd
        (falling(0.4), 0.2, 4),
        (falling(0.5), 0.1, 25),
        (falling(9), 0.1, MOST_SEQUENCES),
    ],
)
def test_sequences_are_added_until_they_say_enough(
    error: Any, precision: float, count: int, path: Path, passes: list[int]
) -> None:
    found = measured(path, error=error, precision=precision, **RANDOM)
    assert passes == list(range(count))
    assert found.probe["sequences"] == count
    assert found.tokens == count * 4


def test_as_many_as_are_asked_for(path: Path, passes: list[int], caplog: pytest.LogCaptureFixture) -> None:
    assert measured(path, error=falling(9), sequences=2, **RANDOM).probe["sequences"] == 2
    assert measured(path, error=falling(0), sequences=35, **RANDOM).probe["sequences"] == 35
    assert passes == list(range(35))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_by_default_the_error_is_that_of_an_optimal_allocation(
    path: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def known(found: Sensitivity, matrices: Any) -> float:
        asked.append(([matrix.name for matrix in matrices], found.probe["sequences"]))
        return 0.2 if len(asked) == 1 else 0.09

    monkeypatch.setattr(measuring, "relative_error", known)
    measured(path, **RANDOM)
    names = [matrix.name for matrix in describe(open_checkpoint(path)).matrices]
    assert asked == [(names, 4), (names, 8)]


def test_who_does_not_get_enough_is_told(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "waterfill"):
        measured(path, error=lambda _: 0.334, **RANDOM)
    (said,) = [record.message for record in caplog.records]
    assert said == (
        f"after {MOST_SEQUENCES} sequences the predicted loss is known to ±33 %, not ±10 %; "
        "ask for more with --sequences"
    )


@pytest.mark.parametrize("windows", [2, 3, 6, 50])
def test_a_text_has_no_more_than_it_has(windows: int, path: Path, tmp_path: Path, passes: list[int]) -> None:
    file = tmp_path / "a.txt"
    file.write_text("x = 1\n" * 40)
    tokens = len(load_tokenizer(path)(file.read_text())["input_ids"])
    found = measured(path, text=file, length=tokens // windows, error=lambda _: 1.0)
    assert found.probe["sequences"] == len(passes) == min(windows, MOST_SEQUENCES)


def test_progress_says_how_many_there_are_to_be(path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def progress(what: str, done: int, total: int) -> None:
        if what == measuring.MEASURING:
            seen.append((done, total))

    measured(path, error=falling(0.23), progress=progress, **RANDOM)
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4), (4, 6), (5, 6), (6, 6)]


# -- several sequences a pass -----------------------------------------------------------------------------------------


def test_short_sequences_are_measured_together(path: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "PASS_TOKENS", 20)
    found = measured(path, error=falling(0.4), **RANDOM)
    assert passes == [0, 1, 2, 3, 4, 5], "by four passes, each of three sequences, it is known to .4 / sqrt(12)"
    assert found.probe["sequences"] == 18
    assert found.tokens == 18 * 4
    model = load_original(open_checkpoint(path), torch.float32)
    tokens = probe_tokens(model, None, Probe(kind="random", sequences=18, length=6))
    expected = measure(model, describe(open_checkpoint(path)).matrices, tokens, batch=3, lead=1)
    for name, coefficients in expected.tensors.items():
        assert found.tensors[name].alpha == pytest.approx(coefficients.alpha, rel=1e-3, abs=1e-9)
        assert found.tensors[name].alpha_stderr == pytest.approx(coefficients.alpha_stderr, rel=1e-2, abs=1e-9)
    assert measured(path, error=falling(0.4), **RANDOM) == found
    assert len(passes) == 6


@pytest.mark.parametrize(("sequences", "count"), [(2, 2), (7, 7), (8, 4), (9, 5), (30, 10), (31, 11)])
def test_a_number_of_sequences_is_divided_into_enough_passes(
    sequences: int, count: int, path: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "PASS_TOKENS", 20)
    found = measured(path, sequences=sequences, **RANDOM)
    assert passes == list(range(count))
    assert found.probe["sequences"] == sequences
    assert found.tokens == sequences * 4


# -- what is not measured again ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_broken_off_goes_on_where_it_was(
    kind: str, path: Path, text: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**KINDS[kind], **({"text": text} if kind == "text" else {}), "error": falling(0.23)}
    expected = measured(path, cache=False, **options)
    counted = vars(measuring)["one_pass"]
    passes.clear()

    def breaking(*arguments: Any, **more: Any) -> ProbePass:
        if len(passes) == 3:
            raise StopHereError
        found: ProbePass = counted(*arguments, **more)
        return found

    with monkeypatch.context() as broken:
        broken.setattr(measuring, "one_pass", breaking)
        with pytest.raises(StopHereError):
            measured(path, **options)
    assert passes == [0, 1, 2]
    assert measured(path, **options) == expected
    assert passes == [0, 1, 2, 3, 4, 5]
    assert measured(path, **options) == expected
    assert passes == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("kind", ["random", "self"])
def test_what_is_known_needs_no_model(kind: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = measured(path, sequences=4, **KINDS[kind])
    monkeypatch.setattr(measuring, "load_blockwise", pytest.fail)
    monkeypatch.setattr(probe_texts, "load_checkpoint", pytest.fail)
    assert measured(path, sequences=4, **KINDS[kind]) == expected
    assert measured(path, error=falling(0), **KINDS[kind]) == expected
    assert measured(path, sequences=2, **KINDS[kind]).probe["sequences"] == 2


def test_nothing_is_kept_unless_it_may_be(path: Path, passes: list[int]) -> None:
    for _ in range(2):
        measured(path, sequences=2, length=6, cache=False)
    assert passes == [0, 1, 0, 1]
    assert not list(cache_folder().rglob("*.json"))


def test_what_cannot_be_kept_is_said(
    path: Path, tmp_path: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    expected = measured(path, sequences=2, **RANDOM)
    monkeypatch.setenv("WATERFILL_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, "waterfill"):
        assert measured(path, sequences=2, **RANDOM) == expected
    assert "what a probe said cannot be kept in" in caplog.text


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"alpha": 1}', "\udcff", "[" * 100_000, "absent"])
@pytest.mark.parametrize("kind", ["passes", "text"])
def test_a_damaged_file_is_made_again(kind: str, content: str, path: Path, passes: list[int]) -> None:
    expected = measured(path, sequences=3, length=6)
    (folder,) = cache_folder().glob(f"probes/*/{kind}-*")
    assert sorted(file.name for file in folder.iterdir()) == [f"{number:04d}.json" for number in range(3)]
    file = folder / "0001.json"
    sound = file.read_bytes()
    if content == "absent":
        file.unlink()
    else:
        file.write_bytes(content.encode("utf-8", "surrogateescape"))
    if kind == "text":  # which nobody asks for where its pass is known
        for stored in cache_folder().glob("probes/*/passes-*/0001.json"):
            stored.unlink()
    passes.clear()
    assert measured(path, sequences=3, length=6) == expected
    assert passes == [1]
    assert file.read_bytes() == sound


@pytest.mark.parametrize(
    "changed",
    [{"keep": ["*.q_proj"]}, {"seed": 1}, {"length": 7}, {"probe": "random"}, {"method": "perturb"}, {"text": "text"}],
)
def test_what_is_measured_otherwise_is_measured(
    changed: dict[str, Any], path: Path, text: Path, passes: list[int]
) -> None:
    measured(path, sequences=2, length=6)
    if "text" in changed:
        changed = {"text": text}
    measured(path, **{"sequences": 2, "length": 6, **changed})
    assert passes == [0, 1, 0, 1]
    measured(path, sequences=2, length=6)
    measured(path, **{"sequences": 2, "length": 6, **changed})
    assert passes == [0, 1, 0, 1]


def test_another_text_or_other_windows_of_it_are_measured(path: Path, text: Path, passes: list[int]) -> None:
    measured(path, text=text, sequences=2, length=6)
    measured(path, text=text, sequences=3, length=6)  # they are spread otherwise
    assert passes == [0, 1, 0, 1, 2]
    passes.clear()
    text.write_text(text.read_text() + "\n# more")
    measured(path, text=text, sequences=2, length=6)
    assert passes == [0, 1]
    other = text.with_name("same.txt")
    other.write_text(text.read_text())
    assert measured(path, text=other, sequences=2, length=6).probe["text"] == "same.txt"
    assert passes == [0, 1]


def test_other_weights_are_measured(path: Path, tmp_path: Path, passes: list[int]) -> None:
    measured(path, sequences=2, **RANDOM)
    measured(models.tiny_llama(tmp_path / "other", tokenizer=True, layers=1, seed=1), sequences=2, **RANDOM)
    assert passes == [0, 1, 0, 1]


# -- own text ---------------------------------------------------------------------------------------------------------


class Writing:
    """Writes what the model would, and remembers what it was asked for."""

    def __init__(self, path: Path) -> None:
        self._model = load_original(open_checkpoint(path), torch.float32)
        self.numbers: list[list[int]] = []

    def __call__(
        self, numbers: Sequence[int], length: int, seed: int, progress: Any = None, *, start: int | None = None
    ) -> torch.Tensor:
        self.numbers.append(list(numbers))
        return own_text(self._model, numbers, length, seed, start=start)


def test_own_text_is_written_once(path: Path) -> None:
    write = Writing(path)
    expected = measured(path, write=write, error=falling(0.4), length=6)
    assert write.numbers == [list(range(24))], "some more than are asked for, which cost little"
    assert measured(path, write=write, error=falling(0.4), length=6) == expected
    measured(path, write=write, sequences=20, length=6, keep=["*.q_proj"])
    assert len(write.numbers) == 1
    measured(path, write=write, sequences=26, length=6)
    assert write.numbers[1:] == [[24, 25]]


def test_own_text_is_written_once_where_nothing_is_kept(path: Path) -> None:
    write = Writing(path)
    measured(path, write=write, error=falling(0.4), length=6, cache=False)
    assert write.numbers == [list(range(24))]
    write.numbers.clear()
    measured(path, write=write, sequences=3, length=6, cache=False)
    assert write.numbers == [[0, 1, 2]]


def test_a_large_model_writes_all_that_may_be_asked_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_texts, "HELD_WEIGHTS", 1000)
    write = Writing(path)
    measured(path, write=write, error=falling(0.4), length=6, cache=False)
    assert write.numbers == [list(range(48))]


def test_the_model_writes_where_who_was_asked_cannot(path: Path) -> None:
    def refuse(*_: Any, **__: Any) -> torch.Tensor:
        raise UnsupportedError("no")

    assert measured(path, write=refuse, sequences=2, length=6) == measured(path, sequences=2, length=6)


def test_a_model_that_is_larger_than_memory_writes_block_by_block(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = measured(path, sequences=2, length=6, cache=False)
    monkeypatch.setattr(probe_texts, "fits", lambda _: False)
    monkeypatch.setattr(probe_texts, "load_checkpoint", pytest.fail)
    assert measured(path, sequences=2, length=6, cache=False) == expected


def test_files_are_plain_numbers(path: Path) -> None:
    found = measured(path, sequences=2, length=6)
    assert found.samples is not None
    files = {
        file.parent.name.partition("-")[0]: json.loads(file.read_text()) for file in cache_folder().rglob("0001.json")
    }
    assert set(files) == {"text", "passes"}
    assert len(files["text"]["tokens"]) == 6
    assert files["passes"]["alpha"] == {name: sample.alpha[1] for name, sample in found.samples.items()}
