"""A random Llama and random tokens to measure it on."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

CONTEXT = 16
VOCABULARY = 61


def tiny_llama(seed: int, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    """A random Llama whose predictions are far from uniform, so that errors in the scores show."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


def random_ids(tokens: int) -> Tensor:
    return torch.randint(VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(7))
