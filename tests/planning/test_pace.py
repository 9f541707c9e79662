"""The dtype that a machine measures in, and what it says of the time beforehand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.models import tiny_llama
from waterfill.files.architecture import Matrix, describe
from waterfill.files.checkpoint import open_checkpoint
from waterfill.planning import pace
from waterfill.planning.pace import SMALL_WEIGHTS, Forecast, fast_dtype, forecast, speed


@pytest.fixture
def matrix(tmp_path: Path) -> Matrix:
    return describe(open_checkpoint(tiny_llama(tmp_path / "model", dtype=torch.bfloat16))).matrices[0]


@pytest.mark.parametrize(
    ("stored", "weights", "times_as_fast", "dtype"),
    [
        ("BF16", SMALL_WEIGHTS, 2.0, torch.bfloat16),
        ("BF16", SMALL_WEIGHTS, 1.4, torch.float32),
        ("BF16", SMALL_WEIGHTS, 0.2, torch.float32),
        ("BF16", SMALL_WEIGHTS // 2, 2.0, torch.float32),
        ("F16", SMALL_WEIGHTS, 2.0, torch.float32),
    ],
)
def test_bfloat16_is_for_large_models_on_machines_that_are_fast_in_it(
    matrix: Matrix,
    monkeypatch: pytest.MonkeyPatch,
    stored: str,
    weights: int,
    times_as_fast: float,
    dtype: torch.dtype,
) -> None:
    speeds = {torch.float32: 1e9, torch.bfloat16: 1e9 * times_as_fast}
    monkeypatch.setattr(pace, "speed", speeds.__getitem__)
    assert fast_dtype([replace(matrix, dtype=stored, shape=(weights // 1024, 1024))]) == dtype


def test_a_model_of_several_dtypes_is_measured_in_the_widest(matrix: Matrix, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "speed", {torch.float32: 1.0, torch.bfloat16: 9.0}.__getitem__)
    large = replace(matrix, dtype="BF16", shape=(SMALL_WEIGHTS, 1024))
    assert fast_dtype([large]) == torch.bfloat16
    assert fast_dtype([large, replace(large, dtype="F32")]) == torch.float32


def ahead(matrix: Matrix, sequences: int, sampled: int) -> Forecast:
    size = {"length": 512, "vocabulary": 1000, "layers": 2, "dtype": torch.float32}
    return forecast([matrix], passes=sequences, sequences=sequences, sampled=sampled, **size)


def test_time_grows_with_what_is_to_be_done(matrix: Matrix, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "speed", lambda _: 1e9)
    one, two, sampled = ahead(matrix, 1, 0), ahead(matrix, 2, 0), ahead(matrix, 2, 2)
    assert (one.tokens, two.tokens) == (512, 1024)
    assert two.seconds == pytest.approx(2 * one.seconds)
    weights = matrix.shape[0] * matrix.shape[1]
    assert sampled.seconds - two.seconds == pytest.approx(pace.PER_OWN_TOKEN * weights * 1024 / 1e9)
    assert two.peak_bytes > 0


def test_speed_is_one_of_a_machine() -> None:
    assert speed(torch.float32) > 1e6
