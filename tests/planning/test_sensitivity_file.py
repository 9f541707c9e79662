"""The file that keeps what was measured: read back as it was, and refused when it is not one."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from waterfill.base.errors import WaterfillError
from waterfill.planning.loss import Coefficients
from waterfill.planning.sensitivity import Sensitivity
from waterfill.planning.trials import Trial


def example() -> Sensitivity:
    tensors = {"a.b": Coefficients(0.1, 2.0, 1e-3, 0.25), "a.c.3": Coefficients(-1e-30, 0.0, 0.0, 0.0)}
    probe = {"kind": "text", "sequences": 4, "length": 8, "seed": 0, "text": "héld-out.txt"}
    return Sensitivity("0123", "fisher", probe, 3.7, 28, tensors)


def test_json_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "sensitivity.json"
    file.write_text(example().to_json(), "utf-8")
    assert Sensitivity.load(file) == example()
    assert Sensitivity.load(file).to_json() == example().to_json()
    assert json.loads(example().to_json())["version"] == 1
    tried = replace(example(), trials=(Trial(0.05, (0.04, 0.07, 0.05)), Trial(0.3, (0.2, 0.5))))
    file.write_text(tried.to_json(), "utf-8")
    assert Sensitivity.load(file) == tried


def changed(**values: Any) -> str:
    return json.dumps(json.loads(example().to_json()) | values)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "Expecting value"),
        ("[]", ""),
        ("3", ""),
        ("null", ""),
        ("{}", "version"),
        ("[" * 100_000, "recursion"),
        ("\udcff", "utf-8"),
        (changed(version=2), "unknown version"),
        (changed(version="1"), "unknown version"),
        (changed(more=1), "more"),
        (changed(tensors=3), ""),
        (changed(tensors={"a": 3}), ""),
        (changed(tensors={"a": {"alpha": 1}}), "beta"),
        (changed(tensors={"a": {"alpha": 1, "beta": 1, "gamma": 1}}), "gamma"),
        (changed(tensors={"a": {"alpha": "1", "beta": 1}}), "real number"),
        (changed(tensors={"a": {"alpha": None, "beta": 1}}), "real number"),
        (changed(tensors={"a": {"alpha": math.nan, "beta": 1}}), "not finite"),
        (changed(nll=math.inf), "not finite"),
        (changed(nll="3"), "real number"),
        (changed(trials=[{"predicted": 0.1, "kl": []}]), "a trial has less than two sequences, or no loss"),
        (changed(trials=[{"predicted": 0.1, "kl": [0.1]}]), "a trial has less than two sequences, or no loss"),
        (changed(trials=[{"predicted": 0.0, "kl": [0.1, 0.2]}]), "a trial has less than two sequences, or no loss"),
        (changed(trials=[{"predicted": 0.1, "kl": [0.1, -0.2]}]), "a trial has less than two sequences, or no loss"),
        (changed(trials=[{"predicted": 1e-310, "kl": [0.1, 0.2]}]), "a trial has less than two sequences, or no loss"),
        (changed(trials=[{"predicted": -0.1, "kl": [0.1, 0.2]}]), "predicted"),
    ],
)
def test_bad_files_are_refused(content: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "sensitivity.json"
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(WaterfillError, match=f"sensitivity.json is not a sensitivity file of this version.*{reason}"):
        Sensitivity.load(file)


def test_absent_files_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(WaterfillError, match="write one with `waterfill plan --save`"):
            Sensitivity.load(path)
