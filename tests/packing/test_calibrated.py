"""Packing with error feedback, from the command to what is measured: less is lost for the same bytes, as promised."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import waterfill
from tests.support import models
from tests.support.commands import Command
from waterfill import api
from waterfill.base.errors import WaterfillError
from waterfill.codecs import get_codec
from waterfill.files.artifact import open_artifact
from waterfill.planning import calibration
from waterfill.planning.budget import Budget
from waterfill.planning.plan import read_plan
from waterfill.planning.planner import make_plan
from waterfill.studies.report.charts import gap_bits
from waterfill.studies.report.facts import sensitivity_of
from waterfill.studies.report.places import units

PROBE: dict[str, Any] = {"sequences": 4, "length": 64}
CALIBRATED: dict[str, Any] = {**PROBE, "calibrate": "self", "calibration_tokens": 3000}
TEXT = "".join(f"def f{i}(x):\n    return x + {i} * len(str(x)) - {i % 7}\n\n" for i in range(400))


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory, ref_llama: Path) -> Iterator[Path]:
    """Plans and artifacts of 3 bits, with feedback and without."""
    folder = tmp_path_factory.mktemp("calibrated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WATERFILL_CACHE", str(folder / "cache"))
        for name, options in (("plain", PROBE), ("fed", CALIBRATED)):
            waterfill.plan(ref_llama, bits=3, save=folder / f"{name}.json", **options)
            waterfill.pack(ref_llama, folder / name, plan=folder / f"{name}.json")
        yield folder


def plan_of(room: Path, name: str) -> waterfill.Plan:
    return read_plan(room / name)


def test_the_same_bytes_lose_less_and_the_plan_knows(room: Path, ref_llama: Path) -> None:
    plain, fed = (plan_of(room, name) for name in ("plain", "fed"))
    assert fed.size_bytes == pytest.approx(plain.size_bytes, rel=1e-3)
    assert fed.predicted.kl < 0.75 * plain.predicted.kl
    losses = [
        waterfill.evaluate(room / name, ref_llama, argparse.__file__, context=128, max_windows=12)
        for name in ("plain", "fed")
    ]
    kl = [loss.kl for loss in losses]
    assert kl[0] is not None
    assert kl[1] is not None
    assert kl[1] < 0.8 * kl[0]
    assert kl[1] / kl[0] == pytest.approx(fed.predicted.kl / plain.predicted.kl, rel=0.35)


def test_a_plan_says_which_matrices_have_feedback(room: Path) -> None:
    fed = plan_of(room, "fed")
    assert fed.calibration is not None
    assert (fed.calibration.kind, fed.calibration.text, fed.calibration.length) == ("self", None, 160)
    for tensor in fed.tensors:
        assert (tensor.feedback is None) == (not get_codec(tensor.codec).feedback(tensor.shape[1]))
        assert tensor.feedback is None or 0.02 < tensor.feedback < 1
    assert all(tensor.feedback is None for tensor in plan_of(room, "plain").tensors)


def test_a_second_plan_takes_no_moments(room: Path, ref_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATERFILL_CACHE", str(room / "cache"))
    (file,) = (room / "cache").glob("probes/*/left-*/0000.json")
    sound = file.read_bytes()
    file.write_text('{"left": {"model.embed_tokens": {"loss": 2.0}}}')
    assert waterfill.plan(ref_llama, bits=3, **CALIBRATED) == plan_of(room, "fed")
    assert file.read_bytes() == sound, "a damaged one is made again"
    monkeypatch.setattr(calibration, "InputMoments", pytest.fail)
    assert waterfill.plan(ref_llama, bits=3, **CALIBRATED) == plan_of(room, "fed")
    assert waterfill.plan(ref_llama, bits=4, **CALIBRATED).left_by_feedback is not None


def test_noise_is_as_large_as_the_plan_says(room: Path) -> None:
    measured = waterfill.inspect(room / "fed").measured_t2
    for tensor in plan_of(room, "fed").tensors:
        assert measured[tensor.name] == pytest.approx(tensor.t2, rel=0.25)


def test_a_report_says_by_what_and_counts_it(room: Path, tmp_path: Path) -> None:
    plan, artifact = plan_of(room, "fed"), open_artifact(room / "fed")
    measured = {tensor.name: tensor.t2 for tensor in artifact.tensors.values() if tensor.packed}
    gaps = [gap_bits(unit) for unit in units(plan.tensors, measured) if unit.tensors[0].feedback]
    # The encoder's noise: what feedback makes of it costs no bits.
    assert 0.03 < min(gaps) < max(gaps) < 0.12
    made = waterfill.report(room / "fed", output=tmp_path / "fed.html")
    page = made.path.read_text("utf-8")
    assert f"Rounding errors in {len(plan.fed_back)} of the matrices" in page
    assert "by second moments of their inputs on 3,040 tokens of text that the model wrote itself" in page
    assert "--calibrate self --calibration-tokens 3040" in page
    again = make_plan("m", plan, sensitivity_of(room / "fed", plan), Budget(bits=3.0))
    assert again.predicted.kl == pytest.approx(plan.predicted.kl, rel=0.01)  # alpha after feedback
    plain = waterfill.report(room / "plain", output=tmp_path / "plain.html").path.read_text("utf-8")
    assert "Rounding errors in" not in plain
    assert "--feedback none" in plain
    assert "--feedback none" not in page


def test_a_plan_is_carried_out_again_to_the_same_bytes(room: Path, ref_llama: Path, tmp_path: Path) -> None:
    waterfill.pack(ref_llama, tmp_path / "again", plan=room / "fed.json")
    first, second = (open_artifact(path) for path in (room / "fed", tmp_path / "again"))
    for name, tensor in first.tensors.items():
        for buffer in tensor.buffers:
            assert torch.equal(first.read(buffer.name), second.read(buffer.name)), name


def test_calibrated_on_a_text_it_has_to_be_given_again(room: Path, ref_llama: Path, tmp_path: Path) -> None:
    text, other = room / "words.txt", room / "other.txt"
    text.write_text(TEXT * 3)
    other.write_text(TEXT[::-1] * 3)
    options: dict[str, Any] = {**PROBE, "calibrate": text, "calibration_tokens": 2048}
    made = waterfill.plan(ref_llama, bits=3, **options)
    assert made.calibration is not None
    assert (made.calibration.kind, made.calibration.text, made.calibration.sequences) == ("text", "words.txt", 4)
    with pytest.raises(WaterfillError, match=r"calibrated on words\.txt; give that text again \(--calibrate\)"):
        waterfill.pack(ref_llama, tmp_path / "out", plan=made)
    with pytest.raises(
        WaterfillError, match=r"calibrated on other tokens than these; give the text that was words\.txt"
    ):
        waterfill.pack(ref_llama, tmp_path / "out", plan=made, calibrate=other)
    assert not (tmp_path / "out").exists()
    assert waterfill.pack(ref_llama, tmp_path / "out", plan=made, calibrate=text) == made


def test_what_does_not_go_together(room: Path, ref_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(WaterfillError, match="the plan was made without calibration; leave it out"):
        waterfill.pack(ref_llama, tmp_path / "out", plan=room / "plain.json", calibrate="self")
    with pytest.raises(WaterfillError, match=r"missing\.txt"):
        waterfill.plan(ref_llama, bits=3, calibrate=tmp_path / "missing.txt", **PROBE)
    with pytest.raises(WaterfillError, match="calibration_tokens"):
        waterfill.plan(ref_llama, bits=3, calibrate="self", calibration_tokens=0, **PROBE)


@pytest.fixture
def by_default(monkeypatch: pytest.MonkeyPatch, room: Path) -> None:
    """As users have it, with what `room` has measured."""
    monkeypatch.delenv("WATERFILL_FEEDBACK")
    monkeypatch.setenv("WATERFILL_CACHE", str(room / "cache"))


def test_errors_are_fed_back_where_nobody_says(room: Path, ref_llama: Path, by_default: None) -> None:
    fed = plan_of(room, "fed")
    assert waterfill.plan(ref_llama, bits=3, calibration_tokens=3000, **PROBE) == fed
    known = {"sensitivity": room / "fed.sensitivity.json", "calibration_tokens": 3000}
    assert waterfill.plan(ref_llama, bits=3, **known) == fed


def test_and_not_where_somebody_does(
    room: Path, ref_llama: Path, by_default: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = plan_of(room, "plain")
    assert waterfill.plan(ref_llama, bits=3, feedback="none", **PROBE) == plain
    monkeypatch.setenv("WATERFILL_FEEDBACK", "none")
    assert waterfill.plan(ref_llama, bits=3, **PROBE) == plain
    assert waterfill.plan(ref_llama, bits=3, feedback="auto", calibration_tokens=3000, **PROBE) == plan_of(room, "fed")
    monkeypatch.setenv("WATERFILL_FEEDBACK", "sometimes")
    with pytest.raises(WaterfillError, match="WATERFILL_FEEDBACK is 'sometimes'; set it to auto or none"):
        waterfill.plan(ref_llama, bits=3, **PROBE)
    with pytest.raises(WaterfillError, match="--calibrate and --feedback none do not go together"):
        waterfill.plan(ref_llama, bits=3, feedback="none", **CALIBRATED)
    with pytest.raises(WaterfillError, match="calibration tokens are of what is calibrated on"):
        waterfill.plan(ref_llama, bits=3, feedback="none", calibration_tokens=3000, **PROBE)


@pytest.mark.parametrize(
    "options", [{"quick": True}, {"probe": "random", **PROBE}, {"alpha": "uniform"}, {"sensitivity": "table.json"}]
)
def test_nor_where_a_plan_is_rough(
    options: dict[str, Any], ref_llama: Path, by_default: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if "sensitivity" in options:
        options = {"sensitivity": tmp_path / "table.json"}
        options["sensitivity"].write_text('{"tensors": {"model.layers.0.mlp.up_proj": {"alpha": 1.0}}}')
    with caplog.at_level(logging.INFO, logger="waterfill"):
        plan = waterfill.plan(ref_llama, bits=3, **options)
    assert plan.calibration is None
    assert ("a quick plan feeds no errors back" in caplog.text) == ("quick" in options)


def test_a_model_that_writes_no_text_is_planned_without(
    room: Path, ref_llama: Path, by_default: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise WaterfillError("it cannot sample")

    monkeypatch.setattr(api, "calibrate", fail)
    known: dict[str, Any] = {"sensitivity": room / "plain.sensitivity.json"}
    assert waterfill.plan(ref_llama, bits=3, **known) == plan_of(room, "plain")
    assert "rounding errors are not fed back: it cannot sample" in caplog.text
    with pytest.raises(WaterfillError, match="it cannot sample"):
        waterfill.plan(ref_llama, bits=3, calibrate="self", **known)


def test_a_budget_for_every_bit_needs_no_moments(room: Path, ref_llama: Path, tmp_path: Path, by_default: None) -> None:
    """Feedback may be had, and nothing that is chosen gains by it."""
    packed = tmp_path / "packed"
    plan = waterfill.pack(ref_llama, packed, size="1GB", calibration_tokens=3000, **PROBE)
    assert plan.calibration is None
    assert not plan.fed_back
    assert waterfill.inspect(packed).plan == plan


def test_grids_of_fixed_rate_feed_errors_back_too(room: Path, ref_llama: Path, tmp_path: Path) -> None:
    options = {**CALIBRATED, "purpose": "memory", "bits": 3.0}
    plan = waterfill.pack(ref_llama, tmp_path / "memory", **options)
    assert plan.predicted.kl < 0.8 * waterfill.plan(ref_llama, bits=3, purpose="memory", **PROBE).predicted.kl
    assert sum(tensor.feedback is not None for tensor in plan.tensors) > len(plan.tensors) / 2


def test_experts_have_no_feedback_and_are_packed(tmp_path: Path) -> None:
    model = models.tiny_mixtral(tmp_path / "model")
    plan = waterfill.pack(
        model, tmp_path / "packed", bits=4, sequences=2, length=24, calibrate="self", calibration_tokens=200
    )
    assert all(tensor.feedback is None for tensor in plan.tensors if tensor.role == "expert")
    assert waterfill.inspect(tmp_path / "packed").size_bytes == plan.size_bytes


def test_the_command(ref_llama: Path, room: Path, command: Command) -> None:
    options = ("--sequences", "4", "--length", "64", "--calibrate", "self", "--calibration-tokens", "3000")
    shown = command("plan", str(ref_llama), "--bits", "3", *options)
    assert shown.code == 0
    assert "by 3,040 tokens of text from the model itself" in shown.out
    told = json.loads(command("plan", str(ref_llama), "--bits", "3", *options, "--json").out)
    assert told["calibration"]["kind"] == "self"
    assert 0 < told["tensors"][1]["feedback"] < 1
