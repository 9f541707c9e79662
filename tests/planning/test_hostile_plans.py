"""Plan and sensitivity files with any one field changed: refused before anything is written, or harmless."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import waterfill
from tests.support.commands import Command
from tests.support.models import tiny_llama
from tests.support.plans import plan_for, sensitivity_of
from waterfill.base.errors import WaterfillError
from waterfill.cli.show import plan as show
from waterfill.files.architecture import Architecture, describe
from waterfill.files.checkpoint import Checkpoint, open_checkpoint
from waterfill.planning.budget import Budget
from waterfill.planning.plan import Plan
from waterfill.planning.planner import Request, make_plan
from waterfill.planning.sensitivity import Sensitivity
from waterfill.studies.report.facts import planned_with

DEEP: Any = "end"
for _ in range(200):
    DEEP = [DEEP]
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, "", "raw", "\ud800", "no-such-name", "a" * 100_000, [], {}, [None], {"": None}, DEEP),
    *(-1, 0, 1, 3, 2**31, 10**30, 10**400, -0.5, 0.5, 1e300, -1e300, math.nan, math.inf, -math.inf),
)


def places(value: Any) -> Iterator[tuple[str | int, ...]]:
    """Of every field; of an array's elements the first and the last."""
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    for key, item in items if isinstance(value, dict) else items[:1] + items[1:][-1:]:
        yield (key,)
        if isinstance(item, dict | list):
            yield from ((key, *rest) for rest in places(item))


def changed(record: Any, place: tuple[str | int, ...], value: Any) -> str:
    record = copy.deepcopy(record)
    inner = record
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return json.dumps(record)


def mutations(record: Any) -> Iterator[tuple[str, str]]:
    """(what was changed, the file)"""
    for place in places(record):
        for value in HOSTILE:
            yield f"{place} = {str(value)[:40]!r}", changed(record, place, value)
    for key in ("tensors", "kept"):
        if isinstance(record.get(key), list):
            yield f"{key} twice", json.dumps(record | {key: record[key] * 2})
            yield f"{key} backwards", json.dumps(record | {key: record[key][::-1]})
            yield f"{key} cut", json.dumps(record | {key: record[key][1:]})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(tiny_llama(tmp_path_factory.mktemp("model"), layers=1))


@pytest.fixture(scope="module")
def architecture(model: Checkpoint) -> Architecture:
    return describe(model)


def load(cls: type[Any], text: str, file: Path) -> Any:
    """The object, or None where it is refused in one sentence that is fit to be shown."""
    file.write_text(text)
    try:
        return cls.load(file)
    except WaterfillError as error:
        sentence = str(error)
    assert file.name in sentence
    assert sentence.isprintable()
    assert len(sentence) < 1000
    return None


def use(plan: Plan) -> None:
    """What is done with the plan of an artifact."""
    Console(file=io.StringIO()).print(show.plan_view(plan))
    json.loads(json.dumps(show.plan_record(plan), allow_nan=False))
    planned_with(plan).encode()


@pytest.mark.parametrize("kind", ["coded", "lossless"])
def test_a_plan_with_any_field_changed(kind: str, model: Checkpoint, tmp_path: Path) -> None:
    if kind == "coded":
        plan = plan_for(model.path, ("trellis",), budget=Budget(bits=4.0))
    else:
        plan = waterfill.plan(model.path, lossless=True)
    record, out = json.loads(plan.to_json()), tmp_path / "out"
    refused = 0
    for what, text in mutations(record):
        found = load(Plan, text, tmp_path / "plan.json")
        if found is None:
            refused += 1
            continue
        use(found)
        assert math.isfinite(found.predicted.kl), what
        if (found.specs(), found.keep, found.shard_bytes) == (plan.specs(), plan.keep, plan.shard_bytes):
            assert all(0 <= tensor.rho <= 1 for tensor in found.tensors), what
            continue  # the bytes are the same but for the gain
        try:
            waterfill.pack(model.path, out, plan=found)
        except WaterfillError:
            assert list(tmp_path.iterdir()) == [tmp_path / "plan.json"], what
        else:  # a limit of shards that makes no difference, say
            assert waterfill.inspect(out).plan == found, what
            shutil.rmtree(out)
    assert refused > 500
    waterfill.pack(model.path, out, plan=plan)  # as it was it is right


def test_sensitivities_with_any_field_changed(model: Checkpoint, architecture: Architecture, tmp_path: Path) -> None:
    measured = sensitivity_of(architecture, fingerprint=model.fingerprint)
    accepted = []
    for what, text in mutations(json.loads(measured.to_json())):
        found = load(Sensitivity, text, tmp_path / "sensitivity.json")
        if found is not None:
            accepted.append((what, found))
    request = Request(codecs=("higgs-p1-n4", "higgs-p1-n16"))
    for what, found in accepted[::12]:
        try:
            plan = make_plan("m", architecture, found, Budget(bits=3.0), request)
        except WaterfillError:
            continue  # a matrix is absent
        (tmp_path / "plan.json").write_text(plan.to_json())
        assert Plan.load(tmp_path / "plan.json") == plan, what
        use(plan)
    assert len(accepted) > 20


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [
        (("bits",), None, "bits is null, expected a real number"),
        (("tensors", 0, "alpha"), None, r"tensors\[0\].alpha is null, expected a real number"),
        (("tensors", 0, "alpha"), -1, r"tensors\[0\].alpha is -1.0, expected a number from -0.01 to 1e\+12"),
        (("tensors", 0, "rho"), 1e300, r"tensors\[0\].rho is 1e\+300, expected a number from 0 to 1"),
        (("tensors", 0, "shape"), [], r"tensors\[0\].shape is an array of 0, expected 2 of them"),
        (("tensors", 0, "codec"), "trellis-s64-r3.0000", "size_bytes of '.*' is .*, where its codec takes"),
        (("tensors", 0, "name"), 5, r"tensors\[0\].name is 5, expected a string"),
        (("tensors", 0, "name"), "other", "the plan has 'other' .* where the model has 'model.embed_tokens'"),
        (("kept", 0, "dtype"), "F8", "dtype of '.*' is 'F8', expected F32 or F16"),
        (("budget",), {"bits": 3.0, "size_bytes": 5}, "budget is none: a plan needs exactly one"),
        (("keep",), ["*.nothing"], "matches no tensor"),
    ],
)
def test_the_command_refuses_before_it_writes(
    place: tuple[str | int, ...], value: Any, sentence: str, model: Checkpoint, command: Command, tmp_path: Path
) -> None:
    plan = plan_for(model.path, ("trellis",), budget=Budget(bits=4.0))
    (tmp_path / "plan.json").write_text(changed(json.loads(plan.to_json()), place, value))
    result = command("pack", model.path, tmp_path / "out", "--plan", tmp_path / "plan.json", "--json")
    assert result.code == 2
    assert re.search(sentence, result.record["error"])
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_only_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for reader in (Plan.load, Sensitivity.load):
        for path in (tmp_path / "pipe", Path("/dev/zero")):
            with pytest.raises(WaterfillError, match="it is not a regular file"):
                reader(path)
