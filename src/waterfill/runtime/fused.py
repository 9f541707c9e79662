"""Decoder layers that run as one native call per token, in models whose own code stays in charge of everything else.

    prefill, batches, masks, hooks, other caches   the layer's own forward
    one token, a dynamic cache                     kernels.layer, with the cache's tensors grown in place

A layer's class is exchanged for a subclass, so whatever recognises the model's layers still does. The conditions are
checked at every call; a layer that stops meeting them (an adapter, a mask, an exotic cache) runs as it always did.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from waterfill.kernels.layer import DecoderLayer
from waterfill.kernels.native import float_activations
from waterfill.kernels.reference import STORED
from waterfill.native import MOST_HEAD_DIM
from waterfill.runtime.made import make
from waterfill.runtime.packed import PackedLinear

# Classes whose forward is that of `kernels.layer`; what may differ between them is looked at in `_look_at`.
LLAMA_KIND = frozenset({"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"})
_PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
_GATED = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
_FIRST_CAPACITY = 256  # positions of a cache that begins to grow in place
_ROOM = "_waterfill_room"


def fuse(model: nn.Module) -> None:
    """Exchange the class of every decoder layer that `kernels.layer` can run."""
    for module in model.modules():
        if type(module).__name__ in LLAMA_KIND and type(module).__module__.startswith("transformers."):
            original: Any = type(module)
            module.__class__ = _fused_class(original)


@dataclass(frozen=True)
class _Known:
    """A layer's native form, and the modules (owner, name, module, its exponent) that it was made from."""

    native: DecoderLayer
    modules: tuple[tuple[nn.Module, str, PackedLinear, int], ...]


# By layer; None for one that does not fit. Outside the modules, which are copied and pickled.
_known: WeakKeyDictionary[nn.Module, _Known | None] = WeakKeyDictionary()


class FusedLayer:
    """Mixed into a decoder layer's class."""

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """One token through the native layer, anything else through the model's own code."""
        native = None if args else _usable(self, hidden_states, kwargs)
        if native is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        entry = kwargs["past_key_values"].layers[self._modules["self_attn"].layer_idx]
        used = entry.keys.shape[2]
        keys, values = _buffers(entry)
        out = native(hidden_states, kwargs["position_embeddings"], keys, values, used)
        entry.keys, entry.values = keys[:, :, : used + 1], values[:, :, : used + 1]
        return out

    def _apply(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Weights move or change their dtype: look at the layer again."""
        _known.pop(self, None)
        return super()._apply(*args, **kwargs)  # type: ignore[misc]


def _usable(layer: Any, hidden: torch.Tensor, given: dict[str, Any]) -> DecoderLayer | None:
    """The native layer, if it computes what this call asks for."""
    past: Any = given.get("past_key_values")
    attention, mlp = layer._modules["self_attn"], layer._modules["mlp"]
    if (
        hidden.shape[:-1] != (1, 1)
        or hidden.stride(-1) != 1
        or hidden.device.type != "cpu"
        or type(past) is not DynamicCache
        or attention.layer_idx >= len(past.layers)
        or given.get("attention_mask") is not None
        or given.get("output_attentions")
        or layer.training
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or attention._forward_hooks
        or mlp._forward_hooks
        or float_activations()
    ):
        return None
    if layer not in _known:
        _known[layer] = _look_at(layer)
    known = _known[layer]
    if known is None or any(
        owner._modules[name] is not module or module.exponent != exponent
        for owner, name, module, exponent in known.modules
    ):
        return None
    native, entry, cosine = known.native, past.layers[attention.layer_idx], given["position_embeddings"][0]
    if type(entry) is not DynamicLayer or not entry.is_initialized or entry.keys.shape[0] != 1:
        return None
    if {hidden.dtype, entry.keys.dtype, cosine.dtype} != {native.dtype} or cosine.numel() != native.head_dim:
        return None
    return native


def _buffers(entry: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[1, heads, capacity, head_dim]` that begin with the entry's own; they grow by doubling.

    The entry's tensors are views of them afterwards, which every operation of transformers' caches accepts.
    """
    used = entry.keys.shape[2]
    held = entry.__dict__.get(_ROOM)
    current = (entry.keys, entry.values)
    if held is not None and used < held[0].shape[2]:
        same = (
            x.data_ptr() == room.data_ptr() and x.stride() == room.stride()
            for x, room in zip(current, held, strict=True)
        )
        if all(same):
            return held  # type: ignore[no-any-return]
    capacity = max(_FIRST_CAPACITY, 2 * used)
    held = tuple(x.new_empty(1, x.shape[1], capacity, x.shape[3]) for x in current)
    for x, room in zip(current, held, strict=True):
        room[:, :, :used] = x
    setattr(entry, _ROOM, held)
    return held


def _look_at(layer: Any) -> _Known | None:
    """The layer's native form; None where the layer is not what `kernels.layer` computes."""
    attention, mlp = layer.self_attn, layer.mlp
    modules = {key: getattr(attention, name) for key, name in _PROJECTIONS.items()}
    modules |= {key: getattr(mlp, name) for key, name in _GATED.items()}
    if not all(type(module) is PackedLinear for module in modules.values()):
        return None
    matrices = {key: module.packed for key, module in modules.items()}
    layouts = {packed.layout for packed in matrices.values()}
    first, head_dim = modules["q"], attention.head_dim
    silu = isinstance(mlp.act_fn, nn.SiLU) or type(mlp.act_fn).__name__ == "SiLUActivation"
    if (
        len(layouts) != 1
        or STORED in layouts
        or first.dtype not in (torch.float32, torch.bfloat16)
        or not silu
        or getattr(attention, "sliding_window", None) is not None
        or head_dim % 2
        or head_dim > MOST_HEAD_DIM
        or any(modules[key].bias is not None for key in _GATED)
    ):
        return None
    vectors = {"input_norm": layer.input_layernorm.weight, "post_norm": layer.post_attention_layernorm.weight}
    vectors |= {
        f"{key}_norm": getattr(attention, f"{key}_norm").weight for key in "qk" if hasattr(attention, f"{key}_norm")
    }
    vectors |= {f"{key}_bias": modules[key].bias for key in "qkvo" if modules[key].bias is not None}
    if any(vector.dtype != first.dtype or not vector.is_contiguous() for vector in vectors.values()):
        return None
    native = DecoderLayer(
        matrices,
        {name: vector.detach() for name, vector in vectors.items()},
        heads=modules["q"].out_features // head_dim,
        kv_heads=modules["k"].out_features // head_dim,
        head_dim=head_dim,
        epsilon=layer.input_layernorm.variance_epsilon,
        scaling=attention.scaling,
        dtype=first.dtype,
    )
    places = [(attention, name) for name in _PROJECTIONS.values()] + [(mlp, name) for name in _GATED.values()]
    made_from = ((owner, name, getattr(owner, name)) for owner, name in places)
    return _Known(native, tuple((owner, name, module, module.exponent) for owner, name, module in made_from))


@cache
def _fused_class(original: Any) -> Any:
    return make(f"Fused{original.__name__}", (FusedLayer, original), _fused_class, original)
