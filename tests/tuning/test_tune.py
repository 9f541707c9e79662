"""`tune`: what is written, that codes stay, that the same seed gives the same bytes, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

import waterfill
from tests.support import models
from tests.support.commands import Command
from tests.support.documented import documented
from waterfill.evaluation.expected import condense
from waterfill.files.artifact import Artifact, open_artifact
from waterfill.tuning.losses import divergence
from waterfill.tuning.rewriting import TUNING_FILE
from waterfill.tuning.texts import lessons
from waterfill.tuning.training import schedule, train

QUICK: dict[str, Any] = {"steps": 6, "batch": 2, "context": 16}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, artifacts of it by grids (`packed`) and by the trellis (`coded`), and a text."""
    root = tmp_path_factory.mktemp("tune")
    model = models.tiny_llama(root / "model", layers=1, tokenizer=True, tied=True)
    for name, codec, bits in (("packed", "higgs-p1-n4", 9), ("coded", "trellis", 2)):
        waterfill.pack(model, root / name, bits=bits, codecs=[codec], alpha="uniform", feedback="none")
    (root / "text").write_text("Once upon a time there was a small model, which forgot most of what it knew. " * 40)
    return root


def tune(root: Path, out: Path, artifact: str = "packed", **options: Any) -> waterfill.Tuned:
    return waterfill.tune(root / artifact, out, text=root / "text", **{**QUICK, **options})


def buffers(artifact: Artifact) -> dict[str, torch.Tensor]:
    return {b.name: artifact.read(b.name) for tensor in artifact.tensors.values() for b in tensor.buffers}


# -------------------------------------------------------------------------------------------------- what is written


def test_scales_change_and_nothing_else(root: Path, tmp_path: Path) -> None:
    tuned = tune(root, tmp_path / "out", teacher=root / "model")
    assert tuned.after < tuned.before
    before, after = (open_artifact(path) for path in (root / "packed", tmp_path / "out"))
    assert before.size_bytes == after.size_bytes == tuned.size_bytes
    old, new = buffers(before), buffers(after)
    assert old.keys() == new.keys()
    for name, buffer in old.items():
        assert torch.equal(new[name], buffer) != name.endswith(".scales"), name
    record = json.loads((tmp_path / "out" / TUNING_FILE).read_text())
    assert (record["what"], record["loss"], record["after"]) == ("scales", "kl", tuned.after)
    assert waterfill.inspect(tmp_path / "out").plan == waterfill.inspect(root / "packed").plan
    measured = [
        waterfill.evaluate(path, root / "model", root / "text", context=16).kl
        for path in (root / "packed", tmp_path / "out")
    ]
    assert measured[1] is not None
    assert measured[0] is not None
    assert measured[1] < measured[0]


@pytest.mark.parametrize("artifact", ["packed", "coded"])
def test_norms_change_and_nothing_else(root: Path, tmp_path: Path, artifact: str) -> None:
    tuned = tune(root, tmp_path / "out", artifact, what="norms", teacher=root / "model")
    assert tuned.after < tuned.before
    old, new = (waterfill.load(path) for path in (root / artifact, tmp_path / "out"))
    weights = dict(new.named_parameters())
    assert {n for n, p in old.named_parameters() if p.numel() and not torch.equal(weights[n], p)} == {
        name for name in weights if "norm" in name
    }
    codes = dict(new.named_buffers())
    assert all(torch.equal(codes[name], buffer) for name, buffer in old.named_buffers())


def test_what_is_measured_is_what_was_written(root: Path, tmp_path: Path) -> None:
    """The loss that was reported is that of the artifact on disk, on the windows that were held out."""
    tuned = tune(root, tmp_path / "out", lr=0.02)
    assert tuned.loss == "nll"
    ids = torch.tensor(
        transformers.AutoTokenizer.from_pretrained(root / "model")((root / "text").read_text())["input_ids"]
    )
    held = lessons(ids, context=16, batch=2, steps=6, hold_out=0.1, seed=0).held
    model = waterfill.load(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        losses = [float(model(input_ids=w.ids[None], labels=w.ids[None]).loss) for w in held]
    assert sum(losses) / len(losses) == pytest.approx(tuned.after, rel=1e-5)


def test_an_adapter_is_peft_s(root: Path, tmp_path: Path) -> None:
    tuned = tune(root, tmp_path / "out", what="lora", rank=4, alpha=8, lr=0.01)
    assert tuned.after < tuned.before
    model = PeftModel.from_pretrained(waterfill.load(root / "packed", dtype=torch.float32), tmp_path / "out")
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.task_type) == (4, 8, "CAUSAL_LM")
    assert tuned.size_bytes == 2 * sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert json.loads((tmp_path / "out" / TUNING_FILE).read_text())["rank"] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize(("what", "file"), [("scales", "model.safetensors"), ("lora", "adapter_model.safetensors")])
def test_the_same_seed_gives_the_same_bytes(root: Path, tmp_path: Path, what: str, file: str) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        tune(root, tmp_path / name, what=what, seed=seed, steps=3, teacher=root / "model")
    a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
    assert a == b != c
    assert (tmp_path / "a" / TUNING_FILE).read_bytes() == (tmp_path / "b" / TUNING_FILE).read_bytes()


class Point:
    """One number that is trained."""

    def __init__(self) -> None:
        self.parameters = [torch.nn.Parameter(torch.zeros(1))]

    def state(self) -> list[torch.Tensor]:
        return [self.parameters[0].detach().round(decimals=1)]


def test_the_best_state_remains_and_training_ends_where_nothing_is_gained() -> None:
    cut = lessons(torch.arange(1000), context=10, batch=1, steps=100, hold_out=0.1, seed=0)

    def loss(best: float) -> Callable[[Any, Any], torch.Tensor]:
        """Of training: far from 5. Of the held-out windows: far from `best`."""
        held = {window.number for window in cut.held}
        return lambda point, some: (point.parameters[0] - (best if some[0].number in held else 5)).square().sum()

    point = Point()
    gained = train(point, point, cut, loss(2.0), rate=0.1)
    assert gained.best_step < gained.steps < 100
    assert gained.after < 0.1 < gained.before == 4
    assert torch.equal(point.parameters[0].detach(), point.state()[0]), "as it would be stored"
    point = Point()
    lost = train(point, point, cut, loss(-1.0), rate=0.1)
    assert (lost.before, lost.after, lost.best_step, lost.steps) == (1, 1, 0, 30), "three looks, every tenth step"
    assert not point.parameters[0].any()


# ------------------------------------------------------------------------------------------------------- the parts


def test_held_out_windows_are_never_trained_on() -> None:
    cut = lessons(torch.arange(1000), context=10, batch=3, steps=50, hold_out=0.12, seed=4)
    assert [int(window.ids[0]) for window in cut.held] == list(range(880, 1000, 10))
    read = [window.number for batch in cut.batches for window in batch]
    assert len(read) == 150
    assert sorted(read[:88]) == list(range(88)), "every other one before any comes again"
    again = lessons(torch.arange(1000), context=10, batch=3, steps=50, hold_out=0.12, seed=5)
    assert read != [window.number for batch in again.batches for window in batch]


def test_the_divergence_of_known_tokens_bounds_the_whole_from_below() -> None:
    teacher, logits = 3 * torch.randn(20, 500), 3 * torch.randn(20, 500).requires_grad_()
    targets = torch.zeros(20, dtype=torch.int64)
    exact = torch.nn.functional.kl_div(
        logits.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    bounds = []
    for kept in (5, 50, 400):
        known = condense(teacher, targets, kept, torch.Generator().manual_seed(0))
        bounds.append(float(divergence(known, logits).detach()))
    assert bounds[0] < bounds[1] < bounds[2] <= float(exact.detach()) + 1e-5
    assert bounds[1] > 0.9 * float(exact.detach())
    same = divergence(condense(teacher, targets, 50, torch.Generator()), teacher)
    assert float(same) == pytest.approx(0, abs=1e-5)


def test_the_rate_rises_and_falls() -> None:
    rates = [schedule(step, 200) for step in range(1, 201)]
    assert max(rates) == rates[9] == 1
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert math.isclose(rates[-1], 0.1)


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"artifact": "coded"}, r"no matrix .* scale per row and group \(they are trellis\)"),
        ({"artifact": "model"}, "is no packed model"),
        ({"init": "loftq"}, "--init loftq is a start of adapters"),
        ({"what": "lora", "init": "apiq"}, "--init apiq needs the original model"),
        ({"what": "lora", "init": "apiq", "teacher": "packed"}, "needs the original model, not packed"),
        ({"context": 64, "hold_out": 0.9}, "too little to train on"),
        ({"context": 4096}, "but the model has 128"),
        ({"lr": 3.0}, "lr is 3.0"),
    ],
)
def test_what_cannot_be_is_one_sentence(root: Path, tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    options = {**options, **({"teacher": root / options["teacher"]} if "teacher" in options else {})}
    if options.get("context") == 64:
        (tmp_path / "short").write_text("Once upon a time. " * 12)
    text = tmp_path / "short" if (tmp_path / "short").exists() else root / "text"
    artifact = root / options.pop("artifact", "packed")
    with pytest.raises(waterfill.WaterfillError, match=sentence):
        waterfill.tune(artifact, tmp_path / "out", text=text, **{**QUICK, **options})
    assert not (tmp_path / "out").exists()


def test_nothing_is_half_written(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PeftModel, "save_pretrained", full)
    with pytest.raises(waterfill.WaterfillError, match=r"cannot write .*No space left"):
        tune(root, tmp_path / "out", what="lora", steps=1)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    for what in ("scales", "lora"):
        with pytest.raises(waterfill.WaterfillError, match="exists already"):
            tune(root, tmp_path / "out", what=what)


def test_the_command(command: Command, root: Path, tmp_path: Path) -> None:
    given = ["--text", root / "text", "--steps", "2", "--batch", "2", "--context", "16", "--lr", "0.01"]
    result = command("tune", root / "packed", tmp_path / "out", *given, "--json")
    assert result.code == 0
    printed = json.loads(result.out)
    assert {key: type(value) for key, value in printed.items()} == {k: type(v) for k, v in documented("tune").items()}
    assert printed["path"] == str(tmp_path / "out")
    again = command("tune", root / "packed", tmp_path / "out", *given, "--overwrite")
    assert f"{printed['before']:.4g} → {printed['after']:.4g}" in again.out
