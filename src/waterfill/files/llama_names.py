"""What models of the Llama kind call their parts, in checkpoints and in GGUF files.

The kind is a decoder layer: RMS norms, q, k, v and o, a gated feed-forward with gate, up and down.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

LAYER_CLASSES: Mapping[str, str] = {  # transformers', by model type
    "llama": "LlamaDecoderLayer",
    "mistral": "MistralDecoderLayer",
    "qwen2": "Qwen2DecoderLayer",
    "qwen3": "Qwen3DecoderLayer",
}
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens", "model.norm.weight", "lm_head"
PROJECTIONS: Mapping[str, str] = {  # the matrices of a layer, in the order of wf_layer
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
NORMS: Mapping[str, str] = {"input_norm": "input_layernorm", "post_norm": "post_attention_layernorm"}
GGUF_PROJECTIONS: Mapping[str, str] = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up",
    "down": "ffn_down",
}  # fmt: skip
GGUF_NORMS: Mapping[str, str] = {"input_norm": "attn_norm", "post_norm": "ffn_norm"}
_OUTSIDE = {EMBEDDING: "token_embd", FINAL_NORM.removesuffix(".weight"): "output_norm", HEAD: "output"}
_INSIDE = {PROJECTIONS[key]: name for key, name in GGUF_PROJECTIONS.items()}
_INSIDE |= {NORMS[key]: name for key, name in GGUF_NORMS.items()}


def gguf_name(name: str) -> str | None:
    """What a weight is called in a GGUF file: "model.layers.3.mlp.up_proj" -> "blk.3.ffn_up.weight", with or without
    ".weight" at its end; None for one that the kind does not have."""
    stem = name.removesuffix(".weight")
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.weight"
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    return f"blk.{layer[1]}.{_INSIDE[layer[2]]}.weight" if layer and layer[2] in _INSIDE else None
