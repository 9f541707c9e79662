"""Tensors that are no weights: persistent buffers of whole numbers and flags come through as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaModel

import waterfill
from tests.support.models import tiny_llama
from waterfill.base.errors import CheckpointError
from waterfill.files.architecture import describe
from waterfill.files.artifact import open_artifact
from waterfill.files.checkpoint import open_checkpoint

BUFFERS: dict[str, tuple[torch.dtype, Any]] = {
    "flags": (torch.bool, [True, False, True]),
    "steps": (torch.int64, 7),
    "bytes": (torch.uint8, [1, 2, 3, 4, 5]),
    "experts_of": (torch.int32, [[5, 1, 0], [2, 2, 4]]),
}


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny Llama whose class has BUFFERS, for as long as the test runs."""
    build = LlamaModel.__init__

    def build_with_buffers(self: Any, config: Any) -> None:
        build(self, config)
        for name, (dtype, values) in BUFFERS.items():
            self.register_buffer(name, torch.tensor(values, dtype=dtype))

    monkeypatch.setattr(LlamaModel, "__init__", build_with_buffers)
    return tiny_llama(tmp_path / "model", layers=1)


def test_buffers_of_any_kept_dtype_come_through(checkpoint: Path, tmp_path: Path) -> None:
    plan = waterfill.pack(checkpoint, tmp_path / "out", bits=4, codecs=["higgs-p1-n4"], sequences=2, length=8)
    kept = {tensor.name: tensor for tensor in plan.kept}
    stored = open_artifact(tmp_path / "out")
    assert stored.size_bytes == plan.size_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    written, loaded = load_file(tmp_path / "out" / "model.safetensors"), waterfill.load(tmp_path / "out").state_dict()
    for name, (dtype, values) in BUFFERS.items():
        expected = torch.tensor(values, dtype=dtype)
        for found in (written[f"model.{name}"], loaded[f"model.{name}"], stored.read(f"model.{name}")):
            assert found.dtype == dtype
            assert torch.equal(found, expected)
        assert kept[f"model.{name}"].size_bytes == expected.nbytes
    assert waterfill.inspect(tmp_path / "out").plan == plan


def test_buffers_of_another_dtype_are_refused_by_name(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"model.steps": tensors["model.steps"].to(torch.int16)}, file, {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"'model\.steps' has dtype I16, which is none of F32, .*, I64, .*, BOOL;"
    ):
        describe(open_checkpoint(checkpoint))
