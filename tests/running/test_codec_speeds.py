"""How fast products are: that what is timed is a product, what is kept and when it is measured again."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.speeds import stated
from waterfill.base import native
from waterfill.base.errors import WaterfillError
from waterfill.planning.speed import CodecSpeed
from waterfill.running import codec_speeds
from waterfill.running.codec_speeds import WIDTH, measure, speeds_file
from waterfill.running.storage_speed import storage_speed
from waterfill.running.streaming import Activations, View

NAMES = ["higgs-p2-n16", "higgs-p1-n64", "bitshift-2.5", "trellis-s64-r2.0000", "trellis-s8-r5.0000", "levels-8"]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What was measured, each time that it was."""
    calls: list[list[str]] = []

    def noted(names: Sequence[str], progress: Any = None) -> tuple[dict[str, CodecSpeed], float]:
        calls.append(list(names))
        return stated(names)

    monkeypatch.setattr(codec_speeds, "measure", noted)
    return calls


@pytest.mark.parametrize("name", NAMES)
def test_what_is_timed_is_one_product_from_either_form(name: str, tmp_path: Path) -> None:
    draw = np.random.default_rng(0).standard_normal((1, WIDTH)).astype(np.float32)
    with Activations(View.of_array(draw)) as x:
        products = codec_speeds._products(name, 2, tmp_path / "matrix")
        results = []
        for data, y in products:
            data.multiply(x, y, np.zeros(2, np.int64))
            results.append(np.array(y.owner))
    read, resident = results
    assert read.any()
    assert np.isfinite(read).all()
    assert np.array_equal(read, resident)
    half = read.shape[1] // 2
    if name.startswith("trellis"):
        assert np.array_equal(read[:, :half], read[:, half:]), "both parts are of the same stream"


def test_every_codec_is_measured_in_both_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec_speeds, "PARTS", 1)
    monkeypatch.setattr(codec_speeds, "ROUNDS", 1)
    steps: list[tuple[str, int, int]] = []
    found, share = measure(NAMES, lambda *step: steps.append(step))
    assert list(found) == NAMES
    assert all(0 < each < 1e-3 for speed in found.values() for each in (speed.resident, speed.streamed))
    assert share > 0
    assert steps[0][:2] == (codec_speeds.MEASURING, 0)
    assert steps[-1] == (codec_speeds.MEASURING, len(NAMES) + 1, len(NAMES) + 1)


def test_what_was_measured_is_kept_and_only_the_rest_is_measured(measured: list[list[str]]) -> None:
    first = codec_speeds.codec_speeds(NAMES[:2])
    again = codec_speeds.codec_speeds(NAMES[:3])
    assert measured == [NAMES[:2], NAMES[2:3]]
    assert (first.isa, first.threads) == (native.isa() or "stored", native.threads())
    assert {name: again.codecs[name] for name in NAMES[:2]} == first.codecs
    codec_speeds.codec_speeds(NAMES[:3], kept=False)
    assert measured[2] == NAMES[:3]


def test_another_machine_instruction_set_or_number_of_threads_is_measured_anew() -> None:
    files = {speeds_file(*key) for key in [("a", "avx2", 2), ("b", "avx2", 2), ("a", "scalar", 2), ("a", "avx2", 1)]}
    assert len(files) == 4


def test_a_damaged_file_is_measured_again(measured: list[list[str]]) -> None:
    speeds = codec_speeds.codec_speeds(NAMES[:1])
    file = speeds_file(speeds.machine, speeds.isa, speeds.threads)
    for content in ("", "[]", '{"codecs": {"higgs-p2-n16": {"resident": -1, "streamed": 1}}}', '{"codecs": 3}'):
        file.write_text(content)
        assert codec_speeds.codec_speeds(NAMES[:1]).codecs == speeds.codecs
    assert len(measured) == 5


def test_what_others_disturbed_is_used_once_and_not_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(codec_speeds, "measure", lambda names, progress: (stated(names)[0], 0.4))
    with caplog.at_level(logging.WARNING):
        speeds = codec_speeds.codec_speeds(NAMES[:1])
    assert "other programs have 60 % of the processors" in caplog.text
    assert not speeds_file(speeds.machine, speeds.isa, speeds.threads).exists()


def test_storage_is_measured_on_files_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("waterfill.running.storage_speed.READING_S", 0.0)
    (tmp_path / "weights").write_bytes(bytes(5_000_000))
    (tmp_path / "empty").touch()
    assert storage_speed([tmp_path / "weights", tmp_path / "empty"]) > 0
    with pytest.raises(WaterfillError, match="say how fast it is, as in --disk"):
        storage_speed([tmp_path / "empty"])
