"""Random models of packed decoder layers, and texts read by them token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from waterfill.base import native
from waterfill.codecs import Higgs, get_codec
from waterfill.files.model_calls import cache_argument, read_on
from waterfill.running.hf.fused import fuse
from waterfill.running.hf.packed import PackedMatrix, pack_linear

needs_layers = pytest.mark.skipif(native.isa() is None, reason="the native library was not built, or is switched off")
SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "llama with biases": lambda: LlamaConfig(**SHAPE, attention_bias=True),
    "llama, one head of keys": lambda: LlamaConfig(**{**SHAPE, "num_key_value_heads": 1}),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=24),
}
CODECS = ("higgs-p1-n16", "higgs-p2-n64", "higgs-p1-n256", "higgs-p4-n256")
PROMPT, TOKENS = 5, 9


def packed_model(config: Any, dtype: torch.dtype = torch.float32, fuse_layers: bool = True) -> Any:
    """A random model whose linear layers are packed, each with another codec, and arranged."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms are ones and biases zeros, which would hide mistakes
                parameter.copy_(torch.rand_like(parameter) + (0.5 if "norm" in name else -0.5))
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for i, module in enumerate(linears):
        pack(module, get_codec(CODECS[i % len(CODECS)]))
    for module in model.modules():
        if isinstance(module, PackedMatrix):
            module.arrange()
    if fuse_layers:
        fuse(model)
    return model.to(dtype)


def pack(module: nn.Linear, codec: Any) -> None:
    assert isinstance(codec, Higgs)
    weight = module.weight.detach().clone()
    encoded = codec.encode(weight, exponent=0)
    packed = pack_linear(module)
    packed.attach(codec, (weight.shape[0], weight.shape[1]), 0, torch.float32)
    packed.scales, packed.codes = encoded.buffers["scales"], encoded.buffers["codes"]


@torch.inference_mode()
def decode(model: Any, cache: Any = None, tokens: int = TOKENS, **given: Any) -> tuple[torch.Tensor, Any]:
    """Logits `[tokens, vocabulary]` of tokens that follow a prompt one by one, and the cache."""
    ids = torch.arange(PROMPT + tokens).unsqueeze(0) * 31 % SHAPE["vocab_size"]
    _, cache = read_on(model, ids[:, :PROMPT], cache)
    steps = [step(model, ids[:, i : i + 1], cache, **given).logits for i in range(PROMPT, PROMPT + tokens)]
    return torch.cat([logits[0] for logits in steps]).float(), cache


def step(model: Any, ids: Any, cache: Any, **given: Any) -> Any:
    return model(ids, **{str(cache_argument(type(model))): cache}, **given)


def close(found: torch.Tensor, expected: torch.Tensor, share: float = 0.02) -> bool:
    return bool((found - expected).abs().max() <= share * expected.abs().max())
