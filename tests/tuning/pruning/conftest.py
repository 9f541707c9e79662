"""Tiny random models of every family that can be pruned, and what zeroing parts of them by hand gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.support.tiny_configs import tiny_config

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, CHANNELS, LAYERS = 48, 6, 3, 16, 96, 3
Family = Callable[..., Path]


@pytest.fixture
def family(tmp_path: Path) -> Family:
    """Makes a float32 checkpoint of a model type, with grouped queries and weights far from its initial values."""

    def make(model_type: str, **options: Any) -> Path:
        config = tiny_config(model_type)
        sizes = {
            "hidden_size": HIDDEN,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "intermediate_size": CHANNELS,
            "num_hidden_layers": LAYERS,
        }
        fields = config.to_dict() | sizes | options
        if isinstance(kinds := fields.get("layer_types"), list):
            fields["layer_types"] = (kinds * LAYERS)[:LAYERS]
        model = transformers.AutoModelForCausalLM.from_config(type(config).from_dict(fields)).float()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(3)
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.save_pretrained(tmp_path / model_type)
        return tmp_path / model_type

    return make


def loaded(path: Path) -> Any:
    """transformers' model, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    """Of tokens that are always the same."""
    ids = torch.randint(250, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=ids, use_cache=False).logits)


@torch.no_grad()
def zeroed(
    path: Path, heads: Mapping[int, Sequence[int]], channels: Mapping[int, Sequence[int]], layers: Sequence[int] = ()
) -> Any:
    """The model with zeros for these query heads with the key/value head that transformers pairs them with, these
    channels, by layer, and all that these layers add."""
    model = loaded(path)
    for number, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        repeats = attention.num_key_value_groups
        for head in heads.get(number, ()):
            for module, one in (
                (attention.q_proj, head),
                (attention.k_proj, head // repeats),
                (attention.v_proj, head // repeats),
            ):
                _zero_rows(module, range(one * HEAD_DIM, (one + 1) * HEAD_DIM))
            attention.o_proj.weight[:, head * HEAD_DIM : (head + 1) * HEAD_DIM] = 0
        for channel in channels.get(number, ()):
            _zero_rows(mlp.gate_proj, [channel])
            _zero_rows(mlp.up_proj, [channel])
            mlp.down_proj.weight[:, channel] = 0
        if number in layers:
            for module in (attention.o_proj, mlp.down_proj):
                _zero_rows(module, range(HIDDEN))
    return model


def _zero_rows(module: Any, rows: Sequence[int]) -> None:
    module.weight[list(rows)] = 0
    if module.bias is not None:
        module.bias[list(rows)] = 0
