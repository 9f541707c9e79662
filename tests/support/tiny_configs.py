"""A config of any causal family that transformers knows, with its class's own defaults in everything but size.

    config class ──defaults──► sizes cut to LIMITS ──► one layer of every kind ──► ids within the vocabulary ──► config

Padding tokens, windows, tied heads, activations, routing and kinds of layers are what a config.json without these
fields would have. Where cut sizes no longer fit together, `FITTING` says what a family needs.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import CONFIG_MAPPING

VOCABULARY = 320
SPECIAL = 256  # special tokens that would lie outside lie from here on; other ids are free of them
LAYERS = 2  # at least, and one of every kind

# Of the fields whose whole name matches; the first that does counts.
LIMITS: tuple[tuple[str, int], ...] = (
    (r"(task_)?type_vocab_size", 4),
    (r".*vocab(_size.*)?", VOCABULARY),
    (r".*(key_value_heads|kv_heads|kv_n_heads|num_key_heads)", 2),
    (r"(n_mamba|mamba_n|mamba_num)_heads", 8),
    (r".*(heads|n_head|heads_per_layer)", 4),
    (r"conf_num_hidden_layers|num_(en|de)coder_layers|encoder_layers", LAYERS),
    (r"mamba_d_ssm|attention_hidden_size", 128),
    (r"qk_head_dim|attention_head_dim|hidden_size_per_layer_input|.*_rank", 32),
    (r".*(head_?dim|head_size|d_head|dim_head)|rotary_dim", 16),
    (r".*(intermediate_size|ffn_dim|mlp_dim|d_inner|d_?ff|dim_ff|feed_forward_size|ffn_hidden_size)", 96),
    (r".*(hidden_size|d_model|n_embd|emb_dim|embed_dim|embedding_dim|embedding_size|proj_dim|lru_width).*", 64),
    (r".*(num_experts|num_local_experts|n_routed_experts|zero_expert_num)", 4),
    (r".*(experts?_per_tok(en)?|moe_topk|moe_k|topk_group|n_group|num_expert_group)", 2),
    (r".*(state_size|d_state|time_step_rank|chunk_size)", 16),
    (r".*(position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|_positions|context_length)", 128),
    (r".*(sliding_window|window_size|local_attention|index_topk)", 8),
)
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "depth", "num_blocks")
NUMBERS = (  # lists of the numbers of layers
    r".*_layer_(ids|idxs)|full_attn_idxs|moe_layers|mlp_only_layers|cross_attention_layers|intermediate_layers_indices"
    r"|global_attn_indexes"
)
TOKENS = r".*_token_(id|index)|.*_token_ids|mask_index|unk_index|.*suppress_tokens"

_HYBRID = ["linear_attention", "full_attention"]
_INDEXER = {"n_heads": 2, "kv_heads": 1, "head_dim": 16, "budget": 8, "compress_ratio": 2}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# By family, and by field (of a sub-config: `sub_config.field`): where sizes do not fit together once they are cut, or
# where a class's defaults make no model.
FITTING: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp", "full_attention", "mlp"],
        **{f"n_{part}_layers": 2 for part in ("input", "recurrent", "output")},
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {
        "text_config.head_dim": 32,
        "vision_config.adapter_in_dim": 64,
        "vision_config.adapter_out_dim": 64,
        "audio_config.adapter_input_size": 64,
        "audio_config.adapter_out_dim": 64,
    },
    "dots3_note_text": {"head_dim": 32},
    "falcon_h1": {"mamba_d_head": 16},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.95, 0.0],
    },
    "gemma4_unified_assistant": {"text_config.num_kv_shared_layers": 2},
    "granitemoehybrid": {"layer_types": _HYBRID},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {f"text_config.indexer_{name}": value for name, value in _INDEXER.items()},
    "qwen4_exp_text": {f"indexer_{name}": value for name, value in _INDEXER.items()},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 48]},
    "rwkv": {"attention_hidden_size": 64},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "chunk_size": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
    },
}

Fields = dict[str, Any]


def tiny_config(model_type: str) -> Any:
    """The config of a model of a few hundred thousand weights; errors are those of its class."""
    config = CONFIG_MAPPING[model_type]()
    fields = _shrunk(config.to_dict())
    for name, value in FITTING.get(model_type, {}).items():
        *path, last = name.split(".")
        owner = fields
        for step in path:
            owner = owner[step]
        owner[last] = value
    return type(config).from_dict(fields)


def _shrunk(fields: Fields) -> Fields:
    """The fields of a config, and of those within it, with smaller sizes."""
    fields = _with_fewer_layers(fields)
    heads = {value for name, value in fields.items() if name.endswith("heads") and "key_value" not in name}
    small: Fields = {}
    for name, value in fields.items():
        if isinstance(value, dict) and "model_type" in value:
            small[name] = _shrunk(value)
        elif re.fullmatch(TOKENS, name):
            small[name] = _within(value)
        elif name in COUNTS:
            small[name] = value
        else:
            limit = next((limit for pattern, limit in LIMITS if re.fullmatch(pattern, name)), None)
            if limit == 2 and name.endswith("heads") and value in heads:
                limit = 4  # as many keys and values as queries, still
            small[name] = value if limit is None else _at_most(value, limit)
    return small


def _at_most(value: Any, limit: int) -> Any:
    if isinstance(value, list | tuple):
        return [_at_most(each, limit) for each in value]
    return min(value, limit) if isinstance(value, int) and not isinstance(value, bool) else value


def _within(ids: Any) -> Any:
    """Token ids within the vocabulary, different ones where they were different."""
    if isinstance(ids, list | tuple):
        return [_within(each) for each in ids]
    return ids if not isinstance(ids, int) or ids < VOCABULARY else SPECIAL + ids % (VOCABULARY - SPECIAL)


def _with_fewer_layers(fields: Fields) -> Fields:
    """With the first layer of every kind, and at least `LAYERS`; lists by layer follow."""
    fields = dict(fields)
    own = {int(number): _shrunk(of_layer) for number, of_layer in (fields.get("per_layer_config") or {}).items()}
    for name in COUNTS:
        count = fields.get(name)
        if not isinstance(count, int) or count <= LAYERS:
            continue
        numbers = [key for key, value in fields.items() if value and re.fullmatch(NUMBERS, key)]
        lists = [key for key, value in fields.items() if _is_list(value) and len(value) == count and key not in numbers]
        kinds = [
            (*(str(fields[key][i]) for key in lists), *(i in fields[key] for key in numbers), str(own.get(i)))
            for i in range(count)
        ]
        first = {kinds.index(kind) for kind in kinds}
        others = [i for i in range(count) if i not in first]
        kept = sorted([*first, *others[: max(0, LAYERS - len(first))]])
        fields |= {key: [fields[key][i] for i in kept] for key in lists}
        fields |= {key: [new for new, old in enumerate(kept) if old in fields[key]] for key in numbers}
        if own:
            fields["per_layer_config"] = {new: own[old] for new, old in enumerate(kept) if old in own}
        fields[name] = len(kept)
    return fields


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)
