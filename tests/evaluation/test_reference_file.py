"""A reference in one file: what is measured by it, what it refuses, and its way through the command."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import waterfill
from tests.support.commands import Command
from tests.support.measure_samples import CONTEXT, VOCABULARY, random_ids, tiny_llama
from waterfill.base.errors import WaterfillError
from waterfill.evaluation import convention, divergence, reference_file
from waterfill.evaluation.divergences import scored
from waterfill.evaluation.perplexities import measure_perplexity
from waterfill.evaluation.reference_file import META, ReferenceFile, ReferenceRecorder

IDS = random_ids(9 * CONTEXT)
WAYS: dict[str, dict[str, Any]] = {
    "gptq": {},
    "strided": {"stride": 5},
    "exl3": {"stride": 5},
    "llama.cpp": {"bos": 3},
    "decode": {},
}


def written(path: Path, name: str = "gptq") -> Path:
    how, recorder = convention(name, context=CONTEXT, **WAYS[name]), ReferenceRecorder()
    measure_perplexity(tiny_llama(1), IDS, how, see=recorder.add)
    recorder.write(path, IDS, how, "of-these-weights")
    return path


@pytest.mark.parametrize("name", list(WAYS))
def test_what_is_measured_by_it_is_what_is_measured_beside_the_reference(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = divergence(tiny_llama(1), tiny_llama(2), IDS, context=CONTEXT, convention=name, **WAYS[name])
    for kept in (64, 8):
        monkeypatch.setattr(reference_file, "KEPT", kept)
        file = ReferenceFile(written(tmp_path / "reference", name))
        assert (file.kept, file.fingerprint, file.vocabulary) == (min(kept, 60), "of-these-weights", VOCABULARY)
        assert torch.equal(file.ids, IDS)
        known = scored(file, tiny_llama(2), file.ids, file.how).divergence
        assert (known.ppl, known.top1_agreement, known.tokens) == (live.ppl, live.top1_agreement, live.tokens)
        assert known.ppl_reference == pytest.approx(live.ppl_reference, rel=1e-6)
        form = known.reference
        assert form.kl_low <= live.kl * (1 + 1e-9)
        assert live.kl <= form.kl_high * (1 + 1e-9)
        assert abs(known.kl - live.kl) < 4 * form.kl_sampling_stderr + 1e-9 * live.kl
        assert (known.convention, known.stride, known.bos) == (live.convention, live.stride, live.bos)


def test_the_reference_does_not_differ_from_itself(tmp_path: Path) -> None:
    file = ReferenceFile(written(tmp_path / "reference"))
    itself = scored(file, tiny_llama(1), file.ids, file.how).divergence
    assert abs(itself.kl) < 1e-6
    assert itself.top1_agreement == 1


def test_some_windows_of_it(tmp_path: Path) -> None:
    file = ReferenceFile(written(tmp_path / "reference"))
    first = scored(file, tiny_llama(2), file.how.first_windows(file.ids, 2), file.how).divergence
    live = divergence(tiny_llama(1), tiny_llama(2), IDS[: 2 * CONTEXT], context=CONTEXT)
    assert (first.windows, first.ppl) == (2, live.ppl)


# -- what is refused --------------------------------------------------------------------------------------------------


def changed(path: Path, tensors: dict[str, Any] | None = None, **meta: Any) -> Path:
    """The file with other tensors (None: without), or other metadata."""
    with safe_open(path, "pt") as file:
        described = json.loads(file.metadata()[META]) | meta
    held = load_file(path) | (tensors or {})
    held = {name: tensor for name, tensor in held.items() if tensor is not None}
    save_file(held, path, {META: json.dumps(described)})
    return path


@pytest.mark.parametrize(
    ("tensors", "meta", "sentence"),
    [
        ({}, {"version": 2}, r"is no reference of this version \(version 2\); write one with `waterfill eval --save-r"),
        ({}, {"vocabulary": 60}, "its text has tokens beyond its vocabulary of 60"),
        ({}, {"vocabulary": "many"}, "vocabulary is .many., expected a whole number"),
        ({}, {"more": 1}, "more"),
        ({}, {"convention": "mine"}, "'mine' is no convention"),
        ({}, {"context": 1000}, "1000"),
        ({}, {"context": 8}, "is damaged: .* expected"),
        ({"tokens": None}, {}, "its tensors are not "),
        ({"another": torch.zeros(3)}, {}, "its tensors are not "),
        ({"tokens": torch.zeros(3, 3)}, {}, "its tokens are no list of 32-bit numbers"),
        ({"tokens": IDS.int() - 100}, {}, "its text has tokens beyond its vocabulary"),
        ({"top-k.rest": torch.zeros(5)}, {}, r"is damaged: rest is F32 \[5\], expected \[135\]"),
        ({"top-k.rest": torch.zeros(135, dtype=torch.int32)}, {}, "is damaged: rest is I32"),
        ({"top-k.logits": torch.zeros(135, 61)}, {}, "61 likeliest tokens of 61 are known"),
        ({"top-k.logits": torch.zeros(135)}, {}, "0 likeliest tokens of 61 are known"),
    ],
)
def test_files_that_are_no_references_are_refused(
    tensors: dict[str, Any], meta: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    path = changed(written(tmp_path / "reference"), tensors, **meta)
    with pytest.raises(WaterfillError, match=sentence):
        ReferenceFile(path)


def test_predictions_of_tokens_that_there_are_not_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "reference")
    for name, value in (("top", -1), ("sampled", VOCABULARY), ("tokens", 1 << 30)):
        tensor = load_file(path)[f"top-k.{name}"].clone()
        tensor[-1] = value
        damaged = changed(Path(shutil.copy(path, tmp_path / name)), {f"top-k.{name}": tensor})
        file = ReferenceFile(damaged)
        with pytest.raises(WaterfillError, match=f"{name} is damaged: window 8 has tokens beyond its vocabulary of 61"):
            scored(file, tiny_llama(2), file.ids, file.how)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_damaged_files_are_refused_or_measured_by(tmp_path: Path, data: st.DataObject) -> None:
    """Cut off anywhere, or with any byte changed: a sentence, or a number."""
    path = tmp_path / "reference"
    content = bytearray(path.read_bytes() if path.exists() else written(path).read_bytes())
    head = 8 + int.from_bytes(content[:8], "little")
    place = data.draw(st.one_of(st.integers(0, head), st.integers(0, len(content) - 1)))
    if data.draw(st.booleans()):
        del content[place:]
    else:
        content[place] ^= data.draw(st.integers(1, 255))
    damaged = tmp_path / "damaged"
    damaged.write_bytes(content)
    try:
        file = ReferenceFile(damaged)
        loss = scored(file, tiny_llama(2), file.ids, file.how).divergence
        said = f"{damaged} {loss.kl} {loss.ppl_reference}"
    except WaterfillError as error:
        said = str(error)
    assert str(damaged) in said
    assert not re.search("nan|inf", said.replace(str(damaged), ""))


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(WaterfillError, match="is no reference of this version"):
        ReferenceFile(tmp_path / "absent")
    (tmp_path / "text").write_text("no reference")
    with pytest.raises(WaterfillError, match="is no reference of this version"):
        ReferenceFile(tmp_path / "text")


# -- the command ------------------------------------------------------------------------------------------------------


def test_a_packed_model_is_measured_without_its_original(
    command: Command, work: Path, ref_llama: Path, tmp_path: Path
) -> None:
    def figures(*arguments: Any) -> dict[str, Any]:
        result = command("eval", *arguments, "--json")
        assert result.code == 0, result.err
        found = json.loads(result.out)
        assert isinstance(found, dict)
        return found

    how = ["--text", work / "text.py", "--context", "64", "--windows", "9"]
    alone = figures(ref_llama, *how)
    saved = figures(ref_llama, *how, "--save-reference", tmp_path / "ref.reference")
    assert saved == alone
    beside = figures(work / "packed", "--against", ref_llama, *how)
    known = figures(work / "packed", "--reference", tmp_path / "ref.reference")
    assert known["reference"]["form"] == "top-k"
    for key in ("ppl", "top1_agreement", "tokens", "windows", "context", "predicted_kl", "size_bytes"):
        assert known[key] == beside[key]
    error = known["reference"]["kl_sampling_stderr"]
    assert known["kl"] == pytest.approx(beside["kl"], abs=4 * error)
    assert error < 0.05 * known["kl"]
    assert known["ppl_reference"] == pytest.approx(beside["ppl_reference"], rel=1e-5)
    fewer = figures(work / "packed", "--reference", tmp_path / "ref.reference", "--windows", "2")
    assert fewer["windows"] == 2


def test_another_models_predictions_are_named(
    work: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, ref_llama: Path
) -> None:
    waterfill.evaluate(
        ref_llama, text=work / "text.py", context=64, max_windows=2, save_reference=tmp_path / "ref.reference"
    )
    path = changed(tmp_path / "ref.reference", fingerprint="another")
    with caplog.at_level(logging.WARNING, "waterfill"):
        waterfill.evaluate(work / "packed", reference=path)
    assert "was packed from other weights than those whose predictions are in" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--reference", "FILE", "--text", "TEXT"], "has its text in it; leave out the other one"),
        (["--reference", "FILE", "--against", "MODEL"], "are given to measure against; leave out one of them"),
        (["--reference", "FILE", "--context", "32"], "says how its text is cut; leave out context and stride"),
        (["--save-reference", "new", "--text", "TEXT", "--against", "MODEL"], "predictions are saved alone, on a text"),
        (["--save-reference", "new", "--reference", "FILE"], "predictions are saved alone, on a text"),
        (["--save-reference", "absent/", "--text", "TEXT"], "cannot write "),
    ],
)
def test_what_does_not_go_together(
    arguments: list[str], sentence: str, command: Command, work: Path, ref_llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "absent").mkdir()
    names = {"FILE": str(written(tmp_path / "file")), "TEXT": f"{work}/text.py", "MODEL": str(ref_llama)}
    names |= {"new": str(tmp_path / "new"), "absent/": str(tmp_path / "absent")}
    result = command("eval", ref_llama, *[names.get(part, part) for part in arguments])
    assert (result.code, result.out) == (2, "")
    assert re.search(sentence, result.err), result.err
    assert not (tmp_path / "new").exists()
