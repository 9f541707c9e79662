"""Plans that are tried as they are made: on how many sequences, and never twice."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import models
from tests.support.measuring import RANDOM, measured
from waterfill.base.cache import cache_folder
from waterfill.planning import measuring
from waterfill.planning.disturbance import Disturbance, Losses, Noise, losses
from waterfill.planning.probe import MOST_SEQUENCES
from waterfill.planning.sensitivity import Sensitivity
from waterfill.planning.spread import MOST

POWER = 0.05


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.tiny_llama(tmp_path_factory.mktemp("llama"), tokenizer=True, layers=1)


@pytest.fixture(autouse=True)
def two_sequences_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "TRIAL_TOKENS", 12)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Sequences of each part that is tried, and by how much noise, as they are."""
    calls: list[tuple[int, int]] = []

    def counted(model: Any, matrices: Any, part: Any, noises: Sequence[Any], seed: int, **options: Any) -> Losses:
        calls.append((len(part), len(noises)))
        return losses(model, matrices, part, noises, seed, **options)

    monkeypatch.setattr(measuring, "losses", counted)
    return calls


def losing(monkeypatch: pytest.MonkeyPatch, values: Sequence[float]) -> None:
    """Have sequences lose these, one after the other, over and over."""
    given = iter(values * 1000)

    def lost(model: Any, matrices: Any, part: Any, noises: Sequence[Any], *_: Any, **__: Any) -> Losses:
        return ((*(next(given) for _ in part),),) * len(noises)

    monkeypatch.setattr(measuring, "losses", lost)


def noise(found: Sensitivity, power: float = POWER) -> Disturbance:
    return Disturbance({name: Noise(1.0, power) for name in found.tensors})


def weak(found: Sensitivity) -> Disturbance:
    return noise(found, 1e-6)


def test_a_plan_is_tried_on_some_of_the_sequences_that_even_noise_is(path: Path, tried: list[tuple[int, int]]) -> None:
    found = measured(path, planned=noise, sequences=12, **RANDOM)
    even, plan = found.trials
    assert even.predicted == pytest.approx(measuring.EVEN_KL, rel=1e-6)
    assert plan.predicted == noise(found).predicted(found)
    assert (len(even.kl), len(plan.kl)) == (12, 4)
    assert tried == [(2, 2)] * 2 + [(2, 1)] * 4
    for trial in (even, plan):
        assert trial.mean == pytest.approx(trial.predicted, rel=0.5), "the linearity theorem"
    assert found.probe["sequences"] == 12
    assert found.samples == measured(path, sequences=12, **RANDOM).samples


def test_another_plan_is_tried_beside_what_is_known_of_even_noise(path: Path, tried: list[tuple[int, int]]) -> None:
    first = measured(path, planned=noise, sequences=12, **RANDOM)
    tried.clear()
    other = measured(path, planned=weak, sequences=12, **RANDOM)
    assert tried == [(2, 1)] * 2
    assert other.trials[0] == first.trials[0]
    assert other == measured(path, planned=weak, sequences=12, cache=False, **RANDOM), "whatever was kept"


def test_in_rough_arithmetic_little_noise_is_not_tried(
    path: Path, tried: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "fast_dtype", lambda _: torch.bfloat16)
    (trial,) = measured(path, planned=weak, sequences=4, **RANDOM).trials
    assert trial.predicted == pytest.approx(measuring.EVEN_KL)
    assert trial.mean == pytest.approx(trial.predicted, rel=0.5)
    assert len(measured(path, planned=noise, sequences=4, **RANDOM).trials) == 2
    assert tried == [(2, 1)] * 2 + [(2, 1)], "even noise was tried before"


def test_few_passes_are_enough_to_plan_by(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "PASS_TOKENS", 12)
    found = measured(path, planned=weak, **RANDOM)
    assert found.probe["sequences"] == 2 * measuring.ALLOTTING


@pytest.mark.parametrize(
    ("values", "precision", "count"),
    [((1.0,), 0.1, 24), ((0.8, 1.2), 0.1, 24), ((0.7, 1.3), 0.1, 42), ((0.2, 1.8), 0.1, 48), ((0.2, 1.8), 0.5, 24)],
)
def test_sequences_are_added_until_the_loss_is_known(
    values: tuple[float, ...], precision: float, count: int, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    losing(monkeypatch, values)
    with caplog.at_level(logging.WARNING, "waterfill"):
        trial, plan = measured(path, planned=weak, precision=precision, **RANDOM).trials
    assert (len(trial.kl), len(plan.kl)) == (count, 2 * math.ceil(count / 6))
    said = [record.message for record in caplog.records]
    assert len(said) == (count == MOST_SEQUENCES)
    assert all("the predicted loss is known to ±23 %, not ±10 %" in message for message in said)


def test_one_text_out_of_all_proportion_does_not_say_everything(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losing(monkeypatch, (1.0, 1.0, 1.0, 1.0, 50.0, 1.0))
    trial, plan = measured(path, planned=weak, sequences=6, **RANDOM).trials
    assert trial.kl == (1, 1, 1, 1, MOST, 1)
    assert plan.kl == (1, 1)


@pytest.mark.parametrize("kind", ["random", "self"])
def test_nothing_is_tried_twice(
    kind: str, path: Path, tried: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"length": 6, "probe": kind, "planned": noise}
    expected = measured(path, sequences=6, **options)
    assert len(tried) == 3
    assert measured(path, sequences=6, **options) == expected
    assert len(tried) == 3
    with monkeypatch.context() as without:
        without.setattr(measuring, "load_blockwise", pytest.fail)
        assert measured(path, sequences=6, **options) == expected


def test_what_was_broken_off_goes_on(path: Path, tried: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = measured(path, sequences=6, cache=False, planned=noise, **RANDOM)
    counted = measuring.losses

    def breaking(*arguments: Any, **options: Any) -> Losses:
        if len(tried) == 5:
            raise KeyboardInterrupt
        return counted(*arguments, **options)

    with monkeypatch.context() as broken:
        broken.setattr(measuring, "losses", breaking)
        with pytest.raises(KeyboardInterrupt):
            measured(path, sequences=6, planned=noise, **RANDOM)
    assert measured(path, sequences=6, planned=noise, **RANDOM) == expected
    assert len(tried) == 3 + 2 + 1


@pytest.mark.parametrize("content", ["", "{}", '{"kl": [1.0]}', '{"kl": [1.0, NaN]}', '{"kl": 3}'])
def test_a_damaged_file_is_made_again(content: str, path: Path, tried: list[tuple[int, int]]) -> None:
    expected = measured(path, sequences=4, planned=noise, **RANDOM)
    for folder in cache_folder().glob("probes/*/trials-*"):
        (folder / "0001.json").write_text(content)
    tried.clear()
    assert measured(path, sequences=4, planned=noise, **RANDOM) == expected
    assert tried == [(2, 1)]


def test_nothing_is_tried_of_what_loses_nothing_or_is_disturbed_where_it_is(
    path: Path, tried: list[tuple[int, int]]
) -> None:
    assert measured(path, planned=lambda _: Disturbance({}), sequences=2, **RANDOM).trials == ()
    assert measured(path, planned=noise, sequences=2, method="perturb", **RANDOM).trials == ()
    assert tried == []


def test_progress_says_how_many_parts_there_are(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    def progress(what: str, done: int, total: int) -> None:
        if what == measuring.TRYING:
            seen.append((done, total))

    monkeypatch.setattr(measuring, "TRIAL_TOKENS", 72)
    losing(monkeypatch, (0.5, 1.5))
    measured(path, planned=weak, progress=progress, **RANDOM)
    assert seen == [(0, 2), (1, 2), (2, 2), (2, 4), (3, 4), (4, 4)]
