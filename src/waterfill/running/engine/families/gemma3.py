"""Gemma 3 for text (arXiv 2503.19786): the layers of a Llama, with four norms, GELU, and windows in most of them.

    config.json ──read_config──► Config, for `LlamaModel`, which runs it

A norm is also behind the attention and the feed-forward, before they are added; every norm is of 1 + weight. Layers
with a window have rotary positions of their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from waterfill.base.errors import UnsupportedError
from waterfill.base.native import GELU_TANH
from waterfill.running.engine.config import (
    Attention,
    Config,
    Fields,
    check_fields,
    check_head_dim,
    dtype_of,
    expect,
    flag,
    frequencies,
    integer,
    layer_count,
    number,
    positive,
)

NORMS = {
    "input_norm": "input_layernorm",
    "o_norm": "post_attention_layernorm",
    "post_norm": "pre_feedforward_layernorm",
    "down_norm": "post_feedforward_layernorm",
}
FULL, SLIDING = "full_attention", "sliding_attention"  # tables 0 and 1 of the rotary positions
_BASES = {FULL: "rope_theta", SLIDING: "rope_local_base_freq"}
_READ = frozenset(
    [
        "_sliding_window_pattern",  # what layer_types were made of
        "architectures",
        "attention_bias",
        "attn_logit_softcapping",
        "dtype",
        "final_logit_softcapping",
        "head_dim",
        "hidden_activation",
        "hidden_size",
        "intermediate_size",
        "is_encoder_decoder",
        "layer_types",
        "max_position_embeddings",
        "model_type",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "query_pre_attn_scalar",
        "rms_norm_eps",
        "rope_local_base_freq",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "sliding_window",
        "sliding_window_pattern",
        "tie_word_embeddings",
        "torch_dtype",
        "use_bidirectional_attention",
        "vocab_size",
    ]
)


def read_config(fields: Fields) -> Config:
    """What a config.json says, checked.

    Raises:
        UnsupportedError: the engine does not run such a model, or cannot be sure of it.
    """
    check_fields(fields, _READ, "Gemma3ForCausalLM")
    expect(fields, hidden_activation={"gelu_pytorch_tanh"}, is_encoder_decoder={None, False})
    expect(fields, attn_logit_softcapping={None}, final_logit_softcapping={None})
    expect(fields, use_bidirectional_attention={None, False})
    if flag(fields, "attention_bias"):
        raise UnsupportedError("its attention_bias is True")
    hidden, head_dim = integer(fields, "hidden_size"), check_head_dim(fields.get("head_dim"))
    return Config(
        layers=layer_count(fields),
        hidden=hidden,
        heads=integer(fields, "num_attention_heads"),
        kv_heads=integer(fields, "num_key_value_heads"),
        head_dim=head_dim,
        inner=integer(fields, "intermediate_size"),
        vocabulary=integer(fields, "vocab_size"),
        positions=integer(fields, "max_position_embeddings"),
        epsilon=number(fields, "rms_norm_eps"),
        dtype=dtype_of(fields),
        frequencies=np.stack([frequencies(_rotary(fields, kind), head_dim, kind) for kind in (FULL, SLIDING)]),
        tied=flag(fields, "tie_word_embeddings", absent=True),
        scaling=float(integer(fields, "query_pre_attn_scalar") ** -0.5),
        attention=tuple(_attention(fields, kind) for kind in _layer_types(fields)),
        vectors=("q_norm", "k_norm"),
        norms=NORMS,
        norm_offset=1.0,
        embedding_scale=float(hidden**0.5),
        activation=GELU_TANH,
    )


def _layer_types(fields: Fields) -> list[str]:
    """What each layer attends to: stated, or in older configs every so manieth to everything."""
    layers, types = layer_count(fields), fields.get("layer_types")
    if types is None:
        every = integer(fields, "sliding_window_pattern")
        return [SLIDING if (layer + 1) % every else FULL for layer in range(layers)]
    if not isinstance(types, list) or len(types) != layers or any(kind not in (FULL, SLIDING) for kind in types):
        raise UnsupportedError("its layer_types are not one for each layer, of a window or of everything")
    return types


def _attention(fields: Fields, kind: str) -> Attention:
    return Attention() if kind == FULL else Attention(window=integer(fields, "sliding_window"), table=1)


def _rotary(fields: Fields, kind: str) -> Fields:
    """The parameters of the rotary positions of one kind of layer, under their older names or their newer one."""
    newer, older = fields.get("rope_parameters"), fields.get("rope_scaling")
    if newer is not None and older is not None:
        raise UnsupportedError("it has both rope_parameters and rope_scaling")
    stated: Any = older if kind == FULL else None
    if newer is not None:
        if not isinstance(newer, dict) or newer.keys() - {FULL, SLIDING}:
            raise UnsupportedError("its rope_parameters are not those of its kinds of layers")
        stated = newer.get(kind)
    if not isinstance(stated, dict | None) or "type" in (stated or {}):
        raise UnsupportedError(f"the rotary positions of its {kind} are {stated!r}")
    beside = {"rope_theta": fields[_BASES[kind]]} if _BASES[kind] in fields else {}
    rotary = {**beside, **(stated or {})}
    positive(rotary, "rope_theta")
    return rotary
