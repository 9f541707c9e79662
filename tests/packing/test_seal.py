"""Sealing again: settings that were changed on purpose are accepted, weights and what does not fit them never."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import waterfill
from tests.support import models
from tests.support.artifact_samples import directory_bytes
from tests.support.commands import Command
from waterfill.base.errors import ArtifactError, WaterfillError
from waterfill.files.artifact import open_artifact

QUICK: dict[str, Any] = {"probe": "random", "sequences": 2, "length": 8, "codecs": ["higgs-p1-n16"], "bits": 4.5}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sealed")
    models.tiny_llama(root / "model", layers=1, tokenizer=True)
    (root / "model" / "generation_config.json").write_text('{"eos_token_id": 0}')
    waterfill.pack(root / "model", root / "packed", **QUICK)
    return root / "packed"


@pytest.fixture
def artifact(packed: Path, tmp_path: Path) -> Path:
    """To be spoiled."""
    return Path(shutil.copytree(packed, tmp_path / "packed"))


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_settings_are_accepted(artifact: Path, command: Command) -> None:
    edit(artifact / "generation_config.json", eos_token_id=[0, 5])
    (artifact / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with pytest.raises(ArtifactError, match=r"generation_config\.json is refused: .* or seal the artifact again"):
        waterfill.load(artifact)
    weights = (artifact / "model.safetensors").read_bytes()
    result = command("seal", artifact, "--json")
    assert (result.code, [event["stage"] for event in result.events]) == (0, ["checking"] * 2)
    assert result.record == {
        "path": str(artifact), "changed": ["generation_config.json"], "added": ["chat_template.jinja"], "removed": []
    }  # fmt: skip
    open_artifact(artifact, verify=True)
    assert waterfill.load(artifact).generation_config.eos_token_id == [0, 5]
    assert (artifact / "model.safetensors").read_bytes() == weights
    (artifact / "chat_template.jinja").unlink()
    assert command("seal", artifact).out == "removed  chat_template.jinja\n"
    before = directory_bytes(artifact)
    assert command("seal", artifact).out == "nothing has changed\n"
    assert directory_bytes(artifact) == before
    assert sorted(before) == sorted(
        open_artifact(artifact).stated()[0].keys() | {"waterfill.json", "model.safetensors"}
    )


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights": (lambda path: _flip(path / "model.safetensors"), "does not match its digest"),
    "shorter": (lambda path: os.truncate(path / "model.safetensors", 5000), "is refused"),
    "manifest": (lambda path: _flip(path / "waterfill.json"), r"waterfill\.json is refused"),
    "no manifest": (lambda path: (path / "waterfill.json").unlink(), "it is missing"),
    "plan": (lambda path: edit(path / "waterfill-plan.json", bits=1), "says how the weights were packed"),
    "no plan": (lambda path: (path / "waterfill-plan.json").unlink(), "says how the weights were packed"),
    "no config": (lambda path: (path / "config.json").unlink(), "is missing; restore it"),
    "index": (lambda path: (path / "model.safetensors.index.json").write_text("{}"), "index"),
    "no JSON": (lambda path: (path / "tokenizer_config.json").write_text("{"), "is no JSON"),
    "mark": (lambda path: edit(path / "config.json", quantization_config={"verified": True}), "quantization_config"),
    "kind": (lambda path: edit(path / "config.json", model_type="nothing"), "model type 'nothing'"),
    "layers": (lambda path: edit(path / "config.json", num_hidden_layers=2), r"with model\.layers\.1"),
    "width": (lambda path: edit(path / "config.json", hidden_size=128), "has no place for"),
    "vocabulary": (lambda path: edit(path / "config.json", vocab_size=99), "has no place for"),
    "tied": (lambda path: edit(path / "config.json", tie_word_embeddings=True), "has no place for lm_head"),
    "generation": (lambda path: edit(path / "generation_config.json", max_new_tokens=-1), "has choices that"),
    "tokenizer": (lambda path: (path / "tokenizer.json").write_text("{}"), "has no tokenizer"),
    "template": (lambda path: (path / "chat_template.jinja").write_text("{% if"), "is no Jinja"),
    "code": (lambda path: (path / "modeling_x.py").write_text(""), "may hold code"),
    "pickle": (lambda path: (path / "pytorch_model.bin").write_bytes(b""), "may hold code"),
    "other weights": (lambda path: (path / "adapter_model.safetensors").write_bytes(b""), "other weights"),
    "link": (lambda path: (path / "a.json").symlink_to(path / "config.json"), "is a link"),
    "pipe": (lambda path: os.mkfifo(path / "a.json"), "no regular file"),
    "name": (lambda path: (path / "ü.json").write_text("{}"), "not a plain file name"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="links and pipes")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, artifact: Path) -> None:
    spoil, sentence = REFUSED[name]
    spoil(artifact)
    before = (artifact / "waterfill.json").read_bytes() if (artifact / "waterfill.json").exists() else None
    with pytest.raises(WaterfillError, match=sentence) as caught:
        waterfill.seal(artifact)
    assert re.fullmatch(r"[^\n]+", str(caught.value))
    assert before is None or (artifact / "waterfill.json").read_bytes() == before


@pytest.mark.parametrize(
    ("build", "options", "size"),
    [
        (models.tiny_llama, {"tied": True}, {"intermediate_size": 256}),
        (models.tiny_gpt2, {}, {"n_layer": 1}),
        (models.tiny_mixtral, {}, {"num_local_experts": 3}),
        (models.tiny_gpt_oss, {}, {"num_local_experts": 5}),
        (models.tiny_deepseek_v3, {}, {"kv_lora_rank": 16}),
    ],
)
def test_weights_of_every_kind_fit_their_config(
    build: Callable[..., Path], options: dict[str, Any], size: dict[str, Any], tmp_path: Path
) -> None:
    """Tied heads, transposed matrices, experts in one parameter, buffers: what was packed is accepted, no other."""
    model, out = build(tmp_path / "model", **options), tmp_path / "packed"
    waterfill.pack(model, out, **QUICK)
    edit(out / "config.json", initializer_range=0.5)
    assert waterfill.seal(out).changed == ("config.json",)
    waterfill.load(out)
    edit(out / "config.json", **size)
    with pytest.raises(WaterfillError, match="restore what it says of the model's size"):
        waterfill.seal(out)


def test_lossless_artifacts_too(llama: Path, tmp_path: Path) -> None:
    waterfill.pack(llama, tmp_path / "packed", lossless=True)
    edit(tmp_path / "packed" / "config.json", rms_norm_eps=1e-3)
    assert waterfill.seal(tmp_path / "packed").changed == ("config.json",)
    assert waterfill.load(tmp_path / "packed").config.rms_norm_eps == 1e-3
