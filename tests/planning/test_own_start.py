"""What a model's own text begins with: what its tokenizer puts before texts, and nothing that no text has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from waterfill.files.architecture import describe
from waterfill.files.checkpoint import open_checkpoint
from waterfill.planning.measuring import measured_tokens
from waterfill.planning.probe import own_text

START = 0  # of the example model


@pytest.fixture
def model(ref_llama: Path, tmp_path: Path) -> Path:
    """A copy, for the test to change."""
    return Path(shutil.copytree(ref_llama, tmp_path / "model"))


def tokens(path: Path, length: int = 24) -> torch.Tensor:
    checkpoint = open_checkpoint(path)
    return measured_tokens(checkpoint, describe(checkpoint), None, {"sequences": 3, "length": length, "cache": False})


def test_a_start_that_no_text_has_is_left_out(model: Path) -> None:
    whole = own_text(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(), range(3), 24, seed=0)
    assert not whole[:, 0].eq(START).any()
    assert torch.equal(tokens(model), whole)


def test_one_that_the_tokenizer_puts_first_stays(model: Path) -> None:
    file = model / "tokenizer.json"
    content = json.loads(file.read_text())
    first = next(word for word, number in content["model"]["vocab"].items() if number == START)
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": first, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {first: {"id": first, "ids": [START], "tokens": [first]}},
    }
    file.write_text(json.dumps(content))
    assert tokens(model)[:, 0].eq(START).all()


def test_it_stays_where_nobody_knows_how_texts_begin(model: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    assert tokens(model)[:, 0].eq(START).all()
