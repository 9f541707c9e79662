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


def read_config(found: Fields) -> Config:
    """Raises UnsupportedError for a model that the engine does not run, or cannot be sure of."""
    check_fields(found, _READ, "Gemma3ForCausalLM")
    expect(found, hidden_activation={"gelu_pytorch_tanh"}, is_encoder_decoder={None, False})
    expect(found, attn_logit_softcapping={None}, final_logit_softcapping={None})
    expect(found, use_bidirectional_attention={None, False})
    if flag(found, "attention_bias"):
        raise UnsupportedError("its attention_bias is True")
    hidden, head_dim = integer(found, "hidden_size"), check_head_dim(found.get("head_dim"))
    return Config(
        layers=layer_count(found),
        hidden=hidden,
        heads=integer(found, "num_attention_heads"),
        kv_heads=integer(found, "num_key_value_heads"),
        head_dim=head_dim,
        inner=integer(found, "intermediate_size"),
        vocabulary=integer(found, "vocab_size"),
        positions=integer(found, "max_position_embeddings"),
        epsilon=number(found, "rms_norm_eps"),
        dtype=dtype_of(found),
        frequencies=np.stack([frequencies(_rotary(found, kind), head_dim, kind) for kind in (FULL, SLIDING)]),
        tied=flag(found, "tie_word_embeddings", absent=True),
        scaling=float(integer(found, "query_pre_attn_scalar") ** -0.5),
        attention=tuple(_attention(found, kind) for kind in _layer_types(found)),
        vectors=("q_norm", "k_norm"),
        norms=NORMS,
        norm_offset=1.0,
        embedding_scale=float(hidden**0.5),
        activation=GELU_TANH,
    )


def _layer_types(found: Fields) -> list[str]:
    """What each layer attends to: stated, or in older configs every so manieth to everything."""
    layers, types = layer_count(found), found.get("layer_types")
    if types is None:
        every = integer(found, "sliding_window_pattern")
        return [SLIDING if (layer + 1) % every else FULL for layer in range(layers)]
    if not isinstance(types, list) or len(types) != layers or any(kind not in (FULL, SLIDING) for kind in types):
        raise UnsupportedError("its layer_types are not one for each layer, of a window or of everything")
    return types


def _attention(found: Fields, kind: str) -> Attention:
    return Attention() if kind == FULL else Attention(window=integer(found, "sliding_window"), table=1)


def _rotary(found: Fields, kind: str) -> Fields:
    """The parameters of the rotary positions of one kind of layer, under their older names or their newer one."""
    newer, older = found.get("rope_parameters"), found.get("rope_scaling")
    if newer is not None and older is not None:
        raise UnsupportedError("it has both rope_parameters and rope_scaling")
    stated: Any = older if kind == FULL else None
    if newer is not None:
        if not isinstance(newer, dict) or newer.keys() - {FULL, SLIDING}:
            raise UnsupportedError("its rope_parameters are not those of its kinds of layers")
        stated = newer.get(kind)
    if not isinstance(stated, dict | None) or "type" in (stated or {}):
        raise UnsupportedError(f"the rotary positions of its {kind} are {stated!r}")
    beside = {"rope_theta": found[_BASES[kind]]} if _BASES[kind] in found else {}
    rotary = {**beside, **(stated or {})}
    positive(rotary, "rope_theta")
    return rotary
