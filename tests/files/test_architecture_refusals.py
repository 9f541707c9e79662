"""What an architecture refuses, and says of checkpoints that do not fit their model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import waterfill.files.skeleton
from tests.support.checkpoints import described, edit_config, edit_tensors, failure
from tests.support.models import (
    tiny_llama,
    tiny_mixtral,
)
from waterfill.base.errors import CheckpointError
from waterfill.codecs import lossless
from waterfill.files.architecture import Kept, Matrix, read_kept, read_rows
from waterfill.packing.kept import coded_bytes


def test_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path, tied=True)
    edit_tensors(path, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    message = failure(path)
    assert f"{path / 'model.safetensors'}: tensor 'lm_head.weight' differs from 'model.embed_tokens.weight'" in message
    edit_config(path, tie_word_embeddings=False)  # what the message says to do
    assert not described(path)[1].tied_head


# -- what can be wrong ------------------------------------------------------------------------------------------------


def test_missing_parameter(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path)
    edit_tensors(path, lambda tensors: {name: tensors[name] for name in tensors if "layers.1.mlp.up" not in name})
    message = failure(path)
    assert f"{path} lacks 1 tensors of the model, such as 'model.layers.1.mlp.up_proj.weight'" in message


@pytest.mark.parametrize("missing", ["experts.3.w1", "experts.1.w3", "experts.0.w2", "w1"])
def test_missing_expert(tmp_path: Path, missing: str) -> None:
    path = tiny_mixtral(tmp_path)
    edit_tensors(path, lambda tensors: {name: tensors[name] for name in tensors if f"{missing}.weight" not in name})
    message = failure(path)
    assert str(path / "model.safetensors") in message
    assert "experts" in message
    assert "config.json calls for" in message


def test_wrong_shape(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path)
    edit_tensors(path, lambda tensors: tensors | {"model.layers.1.mlp.up_proj.weight": torch.zeros(170, 64)})
    message = failure(path)
    assert f"{path / 'model.safetensors'}: tensor 'model.layers.1.mlp.up_proj.weight' of shape [170, 64]" in message
    assert "[172, 64]" in message


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.float64, "F64")]
)
def test_unsupported_dtype(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    path = tiny_llama(tmp_path)
    tensor = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(path, lambda tensors: tensors | {tensor: tensors[tensor].to(dtype)})
    assert (
        f"{path / 'model.safetensors'}: tensor {tensor!r} has dtype {name}, which is none of F32, F16, BF16"
        in failure(path)
    )


def test_experts_of_different_dtypes(tmp_path: Path) -> None:
    path = tiny_mixtral(tmp_path)
    tensor = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    edit_tensors(path, lambda tensors: tensors | {tensor: tensors[tensor].half()})
    assert f"tensor {tensor!r} has dtype F16, but" in failure(path)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_or_inf_is_refused_when_it_is_read(tmp_path: Path, bad: float) -> None:
    path = tiny_mixtral(tmp_path)
    tensor, norm = "model.layers.1.block_sparse_moe.experts.2.w3.weight", "model.norm.weight"

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[tensor][100, 7] = bad
        tensors[norm][3] = bad
        return tensors

    edit_tensors(path, spoil)
    checkpoint, architecture = described(path)
    matrix = next(m for m in architecture.matrices if m.name == "model.layers.1.mlp.experts.gate_up_proj.2")
    read_rows(checkpoint, matrix, 0, 172 + 100)
    where = rf"{path / 'model.safetensors'}: tensor '{tensor}' holds 1 NaN or Inf"
    with pytest.raises(CheckpointError, match=where):
        read_rows(checkpoint, matrix, 172 + 90, 172 + 110)
    with pytest.raises(CheckpointError, match=f"tensor '{norm}' holds 1 NaN or Inf"):
        read_kept(checkpoint, next(kept for kept in architecture.kept if kept.name == norm))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "describes a ViTModel; give a causal language"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "describes a LlamaForSequenceClassification"),
        ({"model_type": "home_made", "auto_map": {"AutoConfig": "x.C"}}, "model type 'home_made', which transformers"),
        ({"model_type": None}, "model type None"),
        ({"hidden_size": "wide"}, "not a valid llama config"),
        ({"hidden_act": "no such"}, "cannot build this llama model"),
    ],
)
def test_not_a_causal_language_model(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    path = tiny_llama(tmp_path)
    edit_config(path, **changes)
    message = failure(path)
    assert str(path / "config.json") in message
    assert expected in message


def test_conversions_that_mix_rows_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.core_model_loading import Interleave, WeightConverter

    converter = WeightConverter(r"mlp\.up_proj", "mlp.up_proj", [Interleave(dim=0)])
    monkeypatch.setattr(waterfill.files.skeleton, "get_model_conversion_mapping", lambda model: [converter])
    path = tiny_llama(tmp_path)
    message = failure(path)
    assert f"{path / 'model.safetensors'}: 'model.layers.0.mlp.up_proj.weight' is made from tensor" in message
    assert "Interleave(dim=0)" in message


@pytest.mark.parametrize(
    ("joined", "parts"),
    [("mlp.gate_up_proj", ["mlp.gate_proj", "mlp.up_proj"]), ("self_attn.qkv", [f"self_attn.{x}_proj" for x in "qkv"])],
)
@pytest.mark.parametrize("keep", [(), ("*",)])
def test_rows_may_be_cut_from_one_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, joined: str, parts: list[str], keep: Sequence[str]
) -> None:
    from transformers.core_model_loading import Chunk, WeightConverter

    class Split(Chunk):
        """Into parts as long as the parameters are."""

    operation = Chunk(dim=0) if len(parts) == 2 else Split(dim=0)
    converter = WeightConverter(f"{joined}.weight", [f"{part}.weight" for part in parts], [operation])
    path = tiny_llama(tmp_path)
    original = load_file(path / "model.safetensors")

    def join(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for layer in ("model.layers.0.", "model.layers.1."):
            rows = [tensors.pop(f"{layer}{part}.weight") for part in parts]
            tensors[f"{layer}{joined}.weight"] = torch.cat(rows)
        return tensors

    edit_tensors(path, join)
    monkeypatch.setattr(waterfill.files.skeleton, "get_model_conversion_mapping", lambda model: [converter])
    checkpoint, architecture = described(path, keep=keep)
    for matrix in architecture.matrices:
        assert torch.equal(read_rows(checkpoint, matrix, 0, matrix.shape[0]), original[matrix.parameter]), matrix.name
        assert torch.equal(read_rows(checkpoint, matrix, 3, 30), original[matrix.parameter][3:30]), matrix.name
    for kept in architecture.kept:
        assert torch.equal(read_kept(checkpoint, kept), original[kept.name])
    for tensor in architecture.tensors:
        size_bytes = coded_bytes(checkpoint, tensor)
        name = tensor.parameter if isinstance(tensor, Matrix) else tensor.name
        assert size_bytes == lossless.buffer_bytes(len(stream) for stream in lossless.encode_streams([original[name]]))


def test_names_are_unique(tmp_path: Path) -> None:
    _, architecture = described(tiny_mixtral(tmp_path))
    names = [tensor.name for tensor in architecture.tensors]
    assert len(set(names)) == len(names)
    assert all(isinstance(tensor, Matrix | Kept) for tensor in architecture.tensors)
