"""Names of the Llama kind in checkpoints and in GGUF files."""

from __future__ import annotations

import pytest
import transformers

from waterfill.files.llama_names import LAYER_CLASSES, gguf_name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.embed_tokens", "token_embd.weight"),
        ("model.norm.weight", "output_norm.weight"),
        ("lm_head.weight", "output.weight"),
        ("model.layers.11.self_attn.o_proj", "blk.11.attn_output.weight"),
        ("model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight"),
        ("model.layers.0.self_attn.q_norm", None),
        ("transformer.h.0.mlp.c_fc", None),
        ("model.layers.x.mlp.up_proj", None),
    ],
)
def test_names_in_gguf_files(name: str, expected: str | None) -> None:
    assert gguf_name(name) == expected


def test_layers_are_what_transformers_makes() -> None:
    for kind, layer in LAYER_CLASSES.items():
        config = transformers.AutoConfig.for_model(
            kind, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8
        )
        model = transformers.AutoModelForCausalLM.from_config(config)
        assert [type(module).__name__ for module in model.model.layers] == [layer]
