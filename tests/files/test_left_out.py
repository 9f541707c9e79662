"""What a checkpoint's directory holds beside the model of its config.json: named, and left out."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations import peft
from transformers.utils import find_adapter_config_file

import waterfill
from tests.support.commands import Command
from tests.support.plans import QUICK
from waterfill.base.errors import CheckpointError, WaterfillError
from waterfill.evaluation.subjects import CheckpointSubject
from waterfill.files.checkpoint import open_checkpoint
from waterfill.files.original import load_checkpoint
from waterfill.planning.plan import Unused

# -- tensors -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def larger(llama: Path) -> Path:
    """A checkpoint of two layers whose config.json calls for one, with a table that old versions stored."""
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    return llama


@pytest.mark.parametrize("options", [{"lossless": True}, {"bits": 4.0, "probe": "random", **QUICK}])
def test_tensors_without_a_place_are_named(
    options: dict[str, Any], larger: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = waterfill.pack(larger, tmp_path / "out", **options)
    stored = load_file(larger / "model.safetensors")
    table = "model.layers.0.self_attn.rotary_emb.inv_freq"
    assert set(plan.unused) == {
        Unused(name, tensor.nbytes, name == table)
        for name, tensor in stored.items()
        if name == table or ".layers.1." in name
    }
    assert len(plan.unused) == 10
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "waterfill.api"]
    assert "9 tensors of" in warning
    assert "such as model.layers.1." in warning
    assert waterfill.inspect(tmp_path / "out").plan == plan
    caplog.clear()
    waterfill.pack(larger, tmp_path / "again", plan=plan)
    assert "9 tensors of" in caplog.text


def test_the_commands_say_so(larger: Path, command: Command) -> None:
    shown = command("plan", larger, "--lossless")
    assert re.search(r"left out\s+10 tensors of the checkpoint, .* such as model.layers.1", shown.out)
    assert "the model of config.json has no place for them" in " ".join(shown.out.split())
    record = command("plan", larger, "--lossless", "--json").record
    assert len(record["unused"]) == 10
    assert set(record["unused"][0]) == {"name", "size_bytes", "expected"}


def test_what_transformers_does_without_is_no_warning(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    caplog.set_level(logging.INFO)
    plan = waterfill.plan(llama, lossless=True)
    assert [tensor.expected for tensor in plan.unused] == [True]
    assert "left out" not in caplog.text


# -- adapters ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted(llama: Path) -> Path:
    """A model beside which a trainer has left an adapter."""
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"]}
    (llama / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "other/model"}))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    weights = {name.format("A"): torch.ones(4, 64), name.format("B"): torch.ones(64, 4)}
    save_file(weights, llama / "adapter_model.safetensors", {"format": "pt"})
    return llama


@pytest.fixture(params=[False, True], ids=["without peft", "with peft"])
def _peft(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers as where peft is installed; adding an adapter fails, as peft itself need not be here."""
    for module in ("transformers.models.auto.auto_factory", "transformers.integrations.peft"):
        monkeypatch.setattr(f"{module}.is_peft_available", lambda: request.param)


@pytest.mark.usefixtures("_peft")
def test_an_adapter_beside_the_weights_is_left_out(
    adapted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if peft.is_peft_available() and find_adapter_config_file(str(adapted), subfolder=os.devnull) is not None:
        with pytest.raises(WaterfillError, match="would add the adapter beside the model"):  # before 5.24
            load_checkpoint(open_checkpoint(adapted))
        return
    waterfill.pack(adapted, tmp_path / "out", bits=4.0, probe="random", **QUICK)
    assert f"the adapter in {adapted} (adapter_config.json) is left out" in caplog.text
    assert not list((tmp_path / "out").glob("adapter*"))
    ids = torch.arange(9)[None]
    with torch.inference_mode():
        measured = load_checkpoint(open_checkpoint(adapted))(input_ids=ids).logits
        run = CheckpointSubject(adapted, None).load_to_run()(input_ids=ids).logits
        (tmp_path / "out" / "adapter_config.json").write_bytes((adapted / "adapter_config.json").read_bytes())
        caplog.clear()
        packed = waterfill.load(tmp_path / "out")(input_ids=ids).logits
        assert "is left out" in caplog.text
        (adapted / "adapter_config.json").unlink()
        alone = {
            d: transformers.AutoModelForCausalLM.from_pretrained(adapted, dtype=d) for d in (torch.float32, "auto")
        }
        (tmp_path / "out" / "adapter_config.json").unlink()
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
        assert torch.equal(measured, alone[torch.float32](input_ids=ids).logits)
        assert torch.equal(run, alone["auto"](input_ids=ids).logits)
        assert torch.equal(packed, again(input_ids=ids).logits)


def test_an_adapter_alone_is_no_model(adapted: Path) -> None:
    (adapted / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json; give the directory of the adapter's model"):
        open_checkpoint(adapted)


def test_models_are_loaded_in_one_place() -> None:
    """Every other place would add adapters again."""
    sources = Path(waterfill.__file__).parent.rglob("*.py")
    calling = [
        file.name for file in sources if "transformers.AutoModelForCausalLM.from_pretrained(" in file.read_text()
    ]
    assert calling == ["original.py"]
