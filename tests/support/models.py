"""Tiny random checkpoints of several families, written by transformers itself, for tests that need a real model.

Each builder writes a complete checkpoint into `path` and returns it. Weights depend on the arguments only. They are
larger than transformers' own initial values, so that the models' predictions are far from uniform.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

REF_LLAMA = Path(__file__).resolve().parents[2] / "examples" / "ref-llama"
TOKENIZER_VOCAB = 8192


def tiny_llama(path: Path, **options: Any) -> Path:
    """Untied by default; `tied=True` shares embedding and head."""
    return _build(path, LlamaForCausalLM, LlamaConfig, **options)


def tiny_qwen2(path: Path, **options: Any) -> Path:
    """Biases on q, k and v."""
    return _build(path, Qwen2ForCausalLM, Qwen2Config, **options)


def tiny_gemma(path: Path, **options: Any) -> Path:
    """Tied head; an embedding class of its own that scales what it looks up."""
    return _build(path, GemmaForCausalLM, GemmaConfig, **{"tied": True, "head_dim": 16, **options})


def tiny_mixtral(path: Path, experts: int = 4, **options: Any) -> Path:
    """Experts are one 2-D tensor each on disk (w1, w2, w3), fused 3-D parameters in the model."""
    return _build(path, MixtralForCausalLM, MixtralConfig, num_local_experts=experts, **options)


def tiny_granite_moe(path: Path, experts: int = 4, **options: Any) -> Path:
    """Experts are 3-D `[expert, out, in]` on disk, under other names than in the model; tied head."""
    return _build(path, GraniteMoeForCausalLM, GraniteMoeConfig, num_local_experts=experts, **{"tied": True, **options})


def tiny_gpt_oss(path: Path, experts: int = 4, **options: Any) -> Path:
    """Experts are 3-D `[expert, in, out]` on disk, with biases; router weights are plain parameters; sinks."""
    return _build(
        path,
        GptOssForCausalLM,
        GptOssConfig,
        num_local_experts=experts,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **{"head_dim": 16, "sliding_window": 8, **options},
    )


def tiny_deepseek_v3(path: Path, experts: int = 4, **options: Any) -> Path:
    """Low-rank attention; one dense layer, then experts as in Mixtral beside shared ones; a buffer in the router."""
    return _build(
        path,
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        n_routed_experts=experts,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        moe_intermediate_size=48,
        q_lora_rank=48,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        **{"kv_heads": 4, **options},
    )


def tiny_gpt2(
    path: Path,
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    vocab: int = 256,
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 1,
    tokenizer: bool = False,
    seed: int = 0,
) -> Path:
    """`Conv1D` weights `[in, out]`, biases, learned positions, tied head."""
    config = GPT2Config(
        n_embd=hidden,
        n_layer=layers,
        n_head=heads,
        n_positions=128,
        vocab_size=TOKENIZER_VOCAB if tokenizer else vocab,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _save(path, GPT2LMHeadModel, config, dtype, shards, tokenizer, seed)


def _build(
    path: Path,
    model_class: type[PreTrainedModel],
    config_class: type[Any],
    *,
    hidden: int = 64,
    intermediate: int = 172,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 256,
    tied: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 1,
    tokenizer: bool = False,
    seed: int = 0,
    **more: Any,
) -> Path:
    config = config_class(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=TOKENIZER_VOCAB if tokenizer else vocab,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        **more,
    )
    return _save(path, model_class, config, dtype, shards, tokenizer, seed)


def _save(
    path: Path,
    model_class: type[PreTrainedModel],
    config: Any,
    dtype: torch.dtype,
    shards: int,
    tokenizer: bool,
    seed: int,
) -> Path:
    config.dtype = dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                fan_in = parameter.shape[-1] if parameter.ndim > 1 else 100
                parameter.add_(torch.randn_like(parameter), alpha=fan_in**-0.5)
    model.save_pretrained(path)
    if shards > 1:
        _split(path, shards)
    if tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(REF_LLAMA / name, path / name)
    return path


def _split(path: Path, shards: int) -> None:
    """Replace the single weight file by exactly `shards` files with an index."""
    tensors = load_file(path / "model.safetensors")
    weight_map = {
        name: f"model-{1 + position * shards // len(tensors):05}-of-{shards:05}.safetensors"
        for position, name in enumerate(tensors)
    }
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, path / file, {"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "model.safetensors").unlink()
