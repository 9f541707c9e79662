"""A Gemma 3's config.json, as in test_config: what the engine reads is what transformers' class makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.running.engine.test_config import (
    ABSENT,
    BASE,
    HEAD_DIM,
    LAYERS,
    LINEAR,
    LLAMA3,
    OTHERS,
    ours,
    stored,
    theirs,
)
from waterfill.running.engine.families.gemma3 import FULL, SLIDING
from waterfill.running.engine.families.llama_spec import EMBEDDING, Spec

TYPES = [SLIDING, FULL]
NEWER = {
    FULL: {"rope_type": "default", "rope_theta": 5000.0},
    SLIDING: {"rope_type": "default", "rope_theta": 300.0},
}
OLDER = {"rope_parameters": ABSENT, "rope_theta": 5000.0, "rope_local_base_freq": 300.0}
GEMMA: dict[str, Any] = BASE | {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "hidden_act": ABSENT,
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": HEAD_DIM,
    "query_pre_attn_scalar": 24,
    "sliding_window": 8,
    "layer_types": TYPES,
    "rope_parameters": NEWER,
    "tie_word_embeddings": True,
}
# As models on the hub have it: what the engine must not leave to transformers.
USUAL: list[dict[str, Any]] = [
    {},
    {**OLDER, "rope_scaling": None, "dtype": ABSENT, "torch_dtype": "bfloat16", "_sliding_window_pattern": 6},
    {**OLDER, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    {**OLDER, "layer_types": ABSENT, "sliding_window_pattern": 2, "cache_implementation": "hybrid"},
    {"tie_word_embeddings": ABSENT, "attention_bias": False, "attn_logit_softcapping": None},
    {"final_logit_softcapping": None, "use_bidirectional_attention": False, "attention_dropout": 0.0},
    {"rope_parameters": {**NEWER, FULL: {**LINEAR, "rope_theta": 5000.0}}},
]
CHANGES: list[dict[str, Any]] = [
    *({name: value} for name in GEMMA if name not in ("model_type", "architectures") for value in (ABSENT, None)),
    *({"layer_types": value} for value in (TYPES[::-1], [FULL] * LAYERS, [SLIDING] * LAYERS, [FULL], [*TYPES, FULL])),
    *({"layer_types": value} for value in ([FULL, "chunked_attention"], [[FULL], {}], "x", [])),
    *({"layer_types": ABSENT, "sliding_window_pattern": value} for value in (1, 2, 3, 0, None, "2")),
    *({"layer_types": ABSENT, "_sliding_window_pattern": value} for value in (1, 2)),
    {"layer_types": ABSENT, "_sliding_window_pattern": 1, "sliding_window_pattern": 2},
    *({"sliding_window": value} for value in (1, 4096, 0, -1, 2.5)),
    {"sliding_window": None, "layer_types": [FULL] * LAYERS},
    *({name: value} for name in ("final_logit_softcapping", "attn_logit_softcapping") for value in (30.0, 0.0)),
    *({"use_bidirectional_attention": value} for value in (True, None, "all")),
    *({"query_pre_attn_scalar": value} for value in (1, 16, 168.0, 0)),
    *({"hidden_activation": value} for value in ("gelu", "silu", "gelu_new")),
    *({"attention_bias": value} for value in (True, None)),
    *({**OLDER, name: value} for name in ("rope_theta", "rope_local_base_freq") for value in (ABSENT, None, 70.0, 7)),
    *({**OLDER, "rope_scaling": value} for value in ({}, {"factor": 8.0}, {"type": "linear", "factor": 8.0}, LINEAR)),
    {**OLDER, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    {**OLDER, "rope_scaling": {**LINEAR, "rope_theta": 70.0}},
    {**OLDER, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    {"rope_scaling": LINEAR},
    {"rope_theta": 70.0, "rope_local_base_freq": 7.0},
    {"rope_parameters": {}, "rope_theta": 70.0, "rope_local_base_freq": 7.0},
    {"rope_parameters": {}, "rope_scaling": {}, "rope_theta": 70.0, "rope_local_base_freq": 7.0},
    {"rope_parameters": {FULL: {"rope_theta": 70.0}}, "rope_local_base_freq": 7.0},
    {"rope_parameters": {FULL: {"rope_theta": 70.0}, SLIDING: None}, "rope_local_base_freq": 7.0},
    {"rope_parameters": {FULL: {}, SLIDING: {}}, "rope_theta": 70.0, "rope_local_base_freq": 7.0},
    {"rope_parameters": {**NEWER, SLIDING: {**LINEAR, "rope_theta": 300.0}}},
    {"rope_parameters": {**NEWER, FULL: {**LINEAR, "type": "default", "rope_theta": 300.0}}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 70.0}},
    {"rope_parameters": {**NEWER, FULL: {**LINEAR, "partial_rotary_factor": 0.5, "rope_theta": 300.0}}},
]


def check_same(spec: Spec, model: Any) -> None:
    """Everything that the engine computes with."""
    config, rotary, layers = model.config, model.model.rotary_emb, model.model.layers
    attention, mlp = layers[-1].self_attn, layers[-1].mlp
    assert spec.layers == len(layers)
    assert (spec.heads, spec.kv_heads) == (config.num_attention_heads, config.num_key_value_heads)
    assert (spec.head_dim, spec.scaling) == (attention.head_dim, attention.scaling)
    assert (spec.vocabulary, spec.hidden) == tuple(model.lm_head.weight.shape)
    assert (spec.inner, spec.positions) == (mlp.gate_proj.out_features, config.max_position_embeddings)
    assert spec.epsilon == layers[0].input_layernorm.eps == model.model.norm.eps == attention.q_norm.eps
    assert spec.embedding_scale == model.model.embed_tokens.scalar_embed_scale
    assert isinstance(mlp.act_fn, type(transformers.activations.ACT2FN["gelu_pytorch_tanh"]))
    for kind, frequencies in zip((FULL, SLIDING), spec.frequencies, strict=True):
        if kind in config.layer_types:
            np.testing.assert_allclose(frequencies, getattr(rotary, f"{kind}_inv_freq").numpy(), rtol=1e-6)
            assert getattr(rotary, f"{kind}_attention_scaling") == 1.0
    assert [each.window for each in spec.attention] == [layer.self_attn.sliding_window or 0 for layer in layers]
    assert [each.table for each in spec.attention] == [int(layer.self_attn.is_sliding) for layer in layers]
    assert all(layer.self_attn.is_causal for layer in layers)
    assert config.attn_logit_softcapping is config.final_logit_softcapping is None
    assert (spec.head == EMBEDDING) == bool(config.tie_word_embeddings)
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    assert config.dtype is None or dtypes[spec.dtype or ""] == config.dtype


def write(path: Path, change: dict[str, Any]) -> None:
    fields = {name: value for name, value in {**GEMMA, **change}.items() if value is not ABSENT}
    (path / "config.json").write_text(json.dumps(fields))


def test_every_field_means_what_it_means_to_transformers(tmp_path: Path) -> None:
    write(tmp_path, {})
    before, read = stored(theirs(tmp_path)), 0
    for change in [*USUAL, *CHANGES, *OTHERS]:
        write(tmp_path, change)
        model = theirs(tmp_path)
        for tensors in [before] if model is None else [before, stored(model)]:
            spec = ours(tmp_path, tensors)
            assert spec is not None or change not in USUAL or tensors is before, change
            if spec is not None:
                read += 1
                assert model is not None, f"{change} is an error to transformers"
                assert tensors.keys() == stored(model).keys(), change
                try:
                    check_same(spec, model)
                except AssertionError as error:
                    raise AssertionError(str(change)) from error
    assert read > 2 * len(USUAL)


def test_every_tensor_has_the_shape_that_the_config_states(tmp_path: Path) -> None:
    write(tmp_path, {})
    tensors = stored(theirs(tmp_path))
    assert ours(tmp_path, tensors) is not None
    for name in tensors:
        assert ours(tmp_path, {other: tensor for other, tensor in tensors.items() if other != name}) is None, name


@pytest.mark.parametrize("kind", ["gemma", "gemma2", "gemma3", "Gemma3_text", None, ["gemma3_text"]])
def test_other_kinds_are_left_to_transformers(tmp_path: Path, kind: object) -> None:
    write(tmp_path, {})
    tensors = stored(theirs(tmp_path))
    write(tmp_path, {"model_type": kind})
    assert ours(tmp_path, tensors) is None
