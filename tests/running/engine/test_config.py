"""The engine reads in a config.json what transformers' config class makes of it, or leaves the model to that."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from waterfill.base.errors import UnsupportedError
from waterfill.files.artifact import RAW, TensorSpec
from waterfill.running.engine.families.llama_spec import EMBEDDING, OPTIONAL, PROJECTIONS, Spec, read_spec

ABSENT = object()
LAYERS, HEADS, HEAD_DIM = 2, 4, 16
BASE: dict[str, Any] = {
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "hidden_size": HEADS * HEAD_DIM,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": HEADS,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "tie_word_embeddings": False,
    "vocab_size": 96,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": HEAD_DIM},
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 4.0}

ROTARY: list[dict[str, Any]] = [
    {"rope_parameters": ABSENT, "rope_theta": 7000.0},
    {"rope_parameters": ABSENT},
    {"rope_parameters": None},
    {"rope_parameters": None, "rope_theta": 7000},
    {"rope_parameters": {}, "rope_theta": 7000.0},
    {"rope_theta": 7000.0},
    {"rope_theta": None},
    {"rope_parameters": {"rope_type": "default"}, "rope_theta": 7000.0},
    {"rope_parameters": {"rope_type": "default"}},
    {"rope_parameters": {"rope_theta": 7000.0}},
    {"rope_parameters": {"rope_theta": None}, "rope_theta": 7000.0},
    {"rope_scaling": None},
    {"rope_scaling": {}},
    {"rope_scaling": LINEAR},
    {"rope_scaling": LINEAR, "rope_parameters": ABSENT, "rope_theta": 7000.0},
    {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": ABSENT, "rope_theta": 7000.0},
    {"rope_scaling": {"type": "linear", "factor": 2, "rope_type": "default"}, "rope_parameters": ABSENT,
     "rope_theta": 7000.0},
    {"rope_scaling": LINEAR, "rope_parameters": LINEAR, "rope_theta": 7000.0},
    {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_parameters": ABSENT, "rope_theta": 7000.0},
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 7000.0, **LLAMA3}},
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 7000.0, **LLAMA3},
     "original_max_position_embeddings": 32},
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 7000.0, **LLAMA3,
                         "original_max_position_embeddings": None}},
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 7000.0, "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0}},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 7000.0}},
    {"rope_parameters": {**LINEAR, "rope_theta": 7000.0, "attention_factor": 2.0}},
    {"rope_parameters": {"rope_type": "yarn", "rope_theta": 7000.0, "factor": 2.0}},
    {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 7000.0, "factor": 2.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 7000.0, "partial_rotary_factor": 0.5}},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7000.0}, "partial_rotary_factor": 0.5},
    {"partial_rotary_factor": 1.0},
    {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 7000.0}}},
    {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 7000.0}},
     "layer_types": ["full_attention"] * LAYERS},
]  # fmt: skip
OTHERS: list[dict[str, Any]] = [
    *({name: value} for name in BASE if name != "rope_parameters" for value in (ABSENT, None)),
    *({"head_dim": value} for value in (ABSENT, None, HEAD_DIM, 8, 0, float(HEAD_DIM))),
    *({"num_key_value_heads": value} for value in (2, 3)),
    *({"hidden_act": value} for value in ("gelu", "swish", "relu")),
    *({"attention_bias": value} for value in (True, False, None)),
    *({"mlp_bias": value} for value in (True, False)),
    *({"tie_word_embeddings": value} for value in (True, 1)),
    *({"sliding_window": value} for value in (ABSENT, None, 8)),
    {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
    {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": LAYERS},
    {"use_sliding_window": True, "sliding_window": None},
    {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0},
    *({"layer_types": value} for value in (None, [], ["full_attention"], ["full_attention"] * LAYERS)),
    {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8, "use_sliding_window": True},
    {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8},
    {"layer_types": [["full_attention"], {}]},
    *({"pretraining_tp": value} for value in (1, 2)),
    *({"pad_token_id": value} for value in (None, 0, 95, -1)),
    {"dtype": ABSENT, "torch_dtype": "float16"},
    {"torch_dtype": "float16"},
    {"dtype": None, "torch_dtype": None},
    *({"dtype": value} for value in ("float32", "float64", "auto")),
    *({"is_causal": value} for value in (True, False)),
    {"attention_chunk_size": 8},
    {"per_layer_config": {"0": {"num_key_value_heads": 2}}},
    {"tie_last_hidden_states": True},
    {"an_attribute_of_next_year": 1},
    {"architectures": None},
    {"architectures": ["LlamaForSequenceClassification"]},
    {"initializer_range": 0.5, "use_cache": False, "attention_dropout": 0.1, "temperature": 0.5},
]  # fmt: skip
# As models on the hub have it: what the engine must not leave to transformers.
USUAL: list[dict[str, Any]] = [
    {},
    {"rope_parameters": ABSENT, "rope_theta": 7000.0, "rope_scaling": None, "dtype": ABSENT, "torch_dtype": "float16"},
    {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": ABSENT, "rope_theta": 7000.0},
    {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_parameters": ABSENT, "rope_theta": 7000.0},
    {"head_dim": HEAD_DIM, "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "pad_token_id": None},
    {"use_sliding_window": False, "max_window_layers": 1, "initializer_range": 0.02},
    {"tie_word_embeddings": True, "use_cache": True, "transformers_version": "4.40.0", "attention_dropout": 0.0},
    {"tie_word_embeddings": ABSENT, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": [2, 3]},
    {"unk_token_id": 3, "_model_name_or_path": "A model"},
]


def config_of(kind: str, change: dict[str, Any]) -> dict[str, Any]:
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    whole = {"model_type": kind, "architectures": [f"{names[kind]}ForCausalLM"], **BASE, **KINDS[kind], **change}
    return {name: value for name, value in whole.items() if value is not ABSENT}


def theirs(path: Path) -> Any:
    """transformers' model of a config.json, without weights; None where it has none."""
    try:
        config = transformers.AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        model.model.rotary_emb = type(model.model.rotary_emb)(config)  # with numbers
    except Exception:  # each class refuses in its own way
        return None
    return model


def stored(model: Any) -> dict[str, Any]:
    """The tensors that an artifact of a model has, by name: what the engine looks at of them."""
    head = [] if model.config.tie_word_embeddings else ["lm_head"]
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight" or head}
    packed = {EMBEDDING, *head, *(f"model.layers.{n}.{name}" for n in range(LAYERS) for name in PROJECTIONS.values())}
    found = {}
    for name, tensor in state.items():
        stem = name.removesuffix(".weight")
        named, codec = (stem, "higgs-p1-n16") if stem in packed else (name, RAW)
        found[named] = TensorSpec(named, codec, tuple(tensor.shape), "BF16", buffers=())
    return found


def ours(path: Path, tensors: dict[str, Any]) -> Spec | None:
    try:
        return read_spec(SimpleNamespace(path=path, tensors=tensors))  # type: ignore[arg-type]
    except UnsupportedError:
        return None


def check_same(spec: Spec, model: Any, tensors: dict[str, Any], case: str) -> None:
    """Everything that the engine computes with."""
    assert model is not None, f"{case} is an error to transformers"
    assert tensors.keys() == stored(model).keys(), case
    try:
        _check_same(spec, model)
    except AssertionError as error:
        raise AssertionError(case) from error


def _check_same(spec: Spec, model: Any) -> None:
    config, rotary, layer = model.config, model.model.rotary_emb, model.model.layers[-1]
    assert spec.layers == len(model.model.layers)
    assert (spec.heads, spec.kv_heads) == (config.num_attention_heads, config.num_key_value_heads)
    assert (spec.head_dim, spec.scaling) == (layer.self_attn.head_dim, layer.self_attn.scaling)
    assert (spec.vocabulary, spec.hidden) == tuple(model.lm_head.weight.shape)
    assert (spec.inner, spec.positions) == (layer.mlp.gate_proj.out_features, config.max_position_embeddings)
    assert spec.epsilon == layer.input_layernorm.variance_epsilon == model.model.norm.variance_epsilon
    np.testing.assert_allclose(spec.frequencies, rotary.inv_freq.numpy()[None], rtol=1e-6)
    assert rotary.attention_scaling == 1.0
    assert isinstance(layer.mlp.act_fn, type(transformers.activations.ACT2FN["silu"]))
    assert (spec.head == EMBEDDING) == bool(config.tie_word_embeddings)
    names = {name for name, _ in model.model.layers[0].named_parameters()}
    assert set(spec.vectors) == {key for key, name in OPTIONAL.items() if name in names}
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    assert config.dtype is None or dtypes[spec.dtype] == config.dtype
    cache = transformers.DynamicCache(config=config)
    assert not any(cache.is_sliding), "every layer remembers everything"
    assert set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    assert getattr(config, "is_causal", True)
    assert not set(vars(config)) & {"attention_chunk_size", "per_layer_config"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_means_what_it_means_to_transformers(tmp_path: Path, kind: str) -> None:
    """Also that of an artifact whose tensors are those of the model before the change."""
    (tmp_path / "config.json").write_text(json.dumps(config_of(kind, {})))
    before = stored(theirs(tmp_path))
    for change in [*USUAL, *ROTARY, *OTHERS]:
        (tmp_path / "config.json").write_text(json.dumps(config_of(kind, change)))
        model = theirs(tmp_path)
        for tensors in [before] if model is None else [before, stored(model)]:
            spec = ours(tmp_path, tensors)
            assert spec is not None or change not in USUAL or tensors is before, change
            if spec is not None:
                check_same(spec, model, tensors, f"{kind} with {change}")


def test_numbers_of_no_sense_are_refused_before_anything_is_made_of_them(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of("llama", {})))
    tensors = stored(theirs(tmp_path))
    for name in ("num_hidden_layers", "num_attention_heads", "head_dim", "vocab_size", "rms_norm_eps", "rope_theta"):
        for value in (10**9, 10**400, -1, True, "2", [2], float("inf")):
            change = {"rope_parameters": {"rope_theta": value}} if name == "rope_theta" else {name: value}
            (tmp_path / "config.json").write_text(json.dumps(config_of("llama", change)))
            if value != 10**9 or name not in ("rms_norm_eps", "rope_theta"):
                assert ours(tmp_path, tensors) is None, change
    for name in BASE.keys() | {"model_type", "architectures", "dtype", "layer_types", "sliding_window", "head_dim"}:
        for value in ([], [1], {}, {"a": 1}, "x", float("nan")):
            (tmp_path / "config.json").write_text(json.dumps(config_of("llama", {"rope_theta": 7000.0, name: value})))
            if name != "rope_parameters" or value not in ([], {}):
                assert ours(tmp_path, tensors) is None or (name, value) in (("dtype", []), ("dtype", {})), (name, value)
    (tmp_path / "config.json").write_text("[" * 100_000)
    assert ours(tmp_path, tensors) is None


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_has_the_shape_that_the_config_states(tmp_path: Path, kind: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of(kind, {})))
    tensors = stored(theirs(tmp_path))
    assert ours(tmp_path, tensors) is not None
    for name, tensor in tensors.items():
        for shape in {(*tensor.shape[:-1], tensor.shape[-1] + 1), (tensor.shape[0] - 1, *tensor.shape[1:]), (3,)}:
            wrong = replace(tensor, shape=shape)
            assert ours(tmp_path, {**tensors, name: wrong}) is None, name
