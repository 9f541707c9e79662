"""Decoder layers that run as one native call per token, in models whose own code stays in charge of everything else.

    prefill, batches, masks, hooks, gradients     the layer's own forward
    one token, a dynamic cache                    kernels.layer, with the cache's tensors grown in place
    one token, and something that is not known    the layer's own forward, and a line in the log that says what it is

A layer's class is exchanged for a subclass, so whatever recognises the model's layers still does. The conditions are
checked at every call; a layer that stops meeting them (an adapter, a mask, an exotic cache) runs as it always did.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from waterfill.base.errors import first_line
from waterfill.base.native import MOST_HEAD_DIM
from waterfill.files.llama_names import LAYER_CLASSES, PROJECTIONS
from waterfill.files.model_calls import LAYER_ARGUMENTS, handed_cache
from waterfill.kernels.cpu import float_activations
from waterfill.kernels.layer import DecoderLayer
from waterfill.kernels.reference import STORED
from waterfill.running.hf.made import make
from waterfill.running.hf.packed import PackedLinear

# The forward of `LAYER_CLASSES` is that of `kernels.layer`; what may differ between them `_reason` looks at.
_ATTENTION, _GATED = (
    {key: name.partition(".")[2] for key, name in PROJECTIONS.items() if name.startswith(part)}
    for part in ("self_attn.", "mlp.")
)
_FIRST_CAPACITY = 256  # positions of a cache that begins to grow in place
_BUFFERS = "_waterfill_buffers"

_log = logging.getLogger("waterfill.kernels")


def fuse(model: nn.Module) -> None:
    """Exchange the class of every decoder layer that `kernels.layer` can run."""
    layers = [
        module
        for module in model.modules()
        if type(module).__name__ in LAYER_CLASSES.values() and type(module).__module__.startswith("transformers.")
    ]
    for module in layers:
        original: Any = type(module)
        module.__class__ = _fused_class(original)
    expected = LAYER_CLASSES.get(getattr(getattr(model, "config", None), "model_type", ""))
    if expected and not layers:
        _say(_unknown(f"has no {expected}"))


@dataclass(frozen=True)
class _Obstacle:
    """Why a layer that is expected to be one native call is not."""

    reason: str
    level: int = logging.INFO


@dataclass(frozen=True)
class _Known:
    """A layer's native form or what is in its way, and the modules (owner, name, module, its exponent if it is packed)
    that were looked at."""

    native: DecoderLayer | _Obstacle
    modules: tuple[tuple[nn.Module, str, nn.Module, int | None], ...]


# By layer. Outside the modules, which are copied and pickled.
_known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()
_obstacles: WeakKeyDictionary[nn.Module, _Obstacle] = WeakKeyDictionary()  # the last one that each layer met


class FusedLayer:
    """Mixed into a decoder layer's class."""

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """One token through the native layer, anything else through the model's own code."""
        try:
            step = None if _is_for_the_model(self, hidden_states, kwargs) else _step(self, hidden_states, kwargs)
        except (AttributeError, KeyError) as error:
            step = _unknown(f"has other names for parts of them ({first_line(error)})")
        if isinstance(step, _Obstacle):
            _obstacles[self] = step
            _say(step)
        if not isinstance(step, tuple):
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        native, entry = step
        used = entry.keys.shape[2]
        keys, values = _buffers(entry)
        out = native(hidden_states, kwargs["position_embeddings"], keys, values, used)
        entry.keys, entry.values = keys[:, :, : used + 1], values[:, :, : used + 1]
        return out

    def _apply(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Weights move or change their dtype: look at the layer again."""
        _known.pop(self, None)
        return super()._apply(*args, **kwargs)  # type: ignore[misc]


@cache
def _say(obstacle: _Obstacle) -> None:
    """In the log, once per process."""
    _log.log(obstacle.level, "decoder layers run one operator at a time, which is slower: %s", obstacle.reason)


def obstacle(model: nn.Module) -> str | None:
    """What has been in the way of a layer of this model, if anything."""
    return next((_obstacles[module].reason for module in model.modules() if module in _obstacles), None)


def _unknown(reason: str) -> _Obstacle:
    """Nothing that the user or the model has chosen, but a transformers that is not known here."""
    return _Obstacle(f"transformers {transformers.__version__} {reason}", logging.WARNING)


def _is_for_the_model(layer: Any, hidden: torch.Tensor, arguments: dict[str, Any]) -> bool:
    """Whether nobody expects a call to be a native one: it is not one token on its way to text, or is watched."""
    attention, mlp = layer._modules["self_attn"], layer._modules["mlp"]
    return bool(
        hidden.shape[:-1] != (1, 1)
        or hidden.device.type != "cpu"
        or arguments.get("attention_mask") is not None
        or arguments.get("output_attentions")
        or layer.training
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or attention._forward_hooks
        or mlp._forward_hooks
        or float_activations()
    )


def _step(layer: Any, hidden: torch.Tensor, arguments: dict[str, Any]) -> tuple[DecoderLayer, Any] | _Obstacle | None:
    """The native layer and its entry of the cache, or what is in the way; None without a cache or its first token."""
    handed, past = handed_cache(arguments)
    if not handed or "position_embeddings" not in arguments:
        return _unknown(f"hands them no {' or '.join(LAYER_ARGUMENTS)} with position_embeddings")
    if past is None:
        return None
    if type(past) is not DynamicCache:
        return _Obstacle(f"their cache is a {type(past).__name__}, not a {DynamicCache.__name__}")
    native = _native(layer)
    if isinstance(native, _Obstacle):
        return native
    place = layer._modules["self_attn"].layer_idx
    entry = past.layers[place] if place < len(past.layers) else None
    if entry is None or not entry.is_initialized:
        return None  # a text of one token so far
    if type(entry) is not DynamicLayer:
        return _Obstacle(f"their cache holds a {type(entry).__name__}, not a {DynamicLayer.__name__}")
    cosine = arguments["position_embeddings"][0]
    dtypes = {hidden.dtype, entry.keys.dtype, cosine.dtype, native.dtype}
    if len(dtypes) != 1:
        return _Obstacle(f"they are handed several dtypes, {', '.join(sorted(map(str, dtypes)))}")
    if entry.keys.shape[0] != 1 or cosine.numel() != native.head_dim or hidden.stride(-1) != 1:
        return _unknown("hands them tensors of other shapes than are known")
    return native, entry


def _native(layer: Any) -> DecoderLayer | _Obstacle:
    """The layer's native form, made again whenever its modules are others than before."""
    known = _known.get(layer)
    if known is None or any(
        owner._modules[name] is not module or _exponent(module) != exponent
        for owner, name, module, exponent in known.modules
    ):
        known = _known[layer] = _look_at(layer)
    return known.native


def _held(entry: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The larger buffers that an entry's keys and values begin, if a native layer wrote to it last."""
    held: tuple[torch.Tensor, torch.Tensor] | None = entry.__dict__.get(_BUFFERS)
    if held is None:
        return None
    same = (
        x.data_ptr() == buffer.data_ptr() and x.stride() == buffer.stride()
        for x, buffer in zip((entry.keys, entry.values), held, strict=True)
    )
    return held if all(same) else None


def was_native(past: Any) -> bool:
    """Whether the last token of every layer in a cache was written by a native one."""
    return bool(past.layers) and all(_held(entry) is not None for entry in past.layers)


def _buffers(entry: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[1, heads, capacity, head_dim]` that begin with the entry's own; they grow by doubling.

    The entry's tensors are views of them afterwards, which every operation of transformers' caches accepts.
    """
    used, held = entry.keys.shape[2], _held(entry)
    if held is not None and used < held[0].shape[2]:
        return held
    capacity = max(_FIRST_CAPACITY, 2 * used)
    keys, values = (x.new_empty(1, x.shape[1], capacity, x.shape[3]) for x in (entry.keys, entry.values))
    keys[:, :, :used], values[:, :, :used] = entry.keys, entry.values
    setattr(entry, _BUFFERS, (keys, values))
    return keys, values


def _look_at(layer: Any) -> _Known:
    """The layer's native form, or why it is not what `kernels.layer` computes."""
    owners = ((layer.self_attn, _ATTENTION), (layer.mlp, _GATED))
    modules = {key: getattr(owner, name) for owner, names in owners for key, name in names.items()}
    places = [(owner, name, getattr(owner, name)) for owner, names in owners for name in names.values()]
    looked_at = tuple((*place, _exponent(place[2])) for place in places)
    reason = _reason(layer, modules)
    return _Known(_Obstacle(reason) if reason else _decoder_layer(layer, modules), looked_at)


def _exponent(module: nn.Module) -> int | None:
    """Of a packed matrix, which scaling it in place changes."""
    return module.exponent if isinstance(module, PackedLinear) else None


def _vectors(layer: Any, modules: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Norms and biases, by their names in `kernels.layer`."""
    attention = layer.self_attn
    vectors = {"input_norm": layer.input_layernorm.weight, "post_norm": layer.post_attention_layernorm.weight}
    vectors |= {
        f"{key}_norm": getattr(attention, f"{key}_norm").weight for key in "qk" if hasattr(attention, f"{key}_norm")
    }
    return vectors | {f"{key}_bias": module.bias for key, module in modules.items() if module.bias is not None}


def _reason(layer: Any, modules: dict[str, Any]) -> str | None:
    """What a layer has that `kernels.layer` does not compute; None if there is no such thing."""
    for key, module in modules.items():
        if type(module) is not PackedLinear:
            return f"the matrix {(_ATTENTION | _GATED)[key]} of one is a {type(module).__name__}, not packed"
    attention, activation, dtype = layer.self_attn, layer.mlp.act_fn, modules["q"].dtype
    layouts = {module.packed.layout for module in modules.values()}
    if len(layouts) != 1 or STORED in layouts:
        return "some of their matrices are not laid out for the native kernels"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"their activations are {dtype}"
    if not isinstance(activation, nn.SiLU) and type(activation).__name__ != "SiLUActivation":
        return f"their activation function is {type(activation).__name__}"
    if getattr(attention, "sliding_window", None) is not None:
        return f"they see a window of {attention.sliding_window} tokens only"
    if attention.head_dim % 2 or attention.head_dim > MOST_HEAD_DIM:
        return f"their heads have {attention.head_dim} dimensions"
    if biased := [name for key, name in _GATED.items() if modules[key].bias is not None]:
        return f"they have biases of {', '.join(biased)}"
    if any(vector.dtype != dtype or not vector.is_contiguous() for vector in _vectors(layer, modules).values()):
        return f"some of their norms and biases are not {dtype}"
    return None


def _decoder_layer(layer: Any, modules: dict[str, Any]) -> DecoderLayer:
    head_dim = layer.self_attn.head_dim
    return DecoderLayer(
        {key: module.packed for key, module in modules.items()},
        {name: vector.detach() for name, vector in _vectors(layer, modules).items()},
        heads=modules["q"].out_features // head_dim,
        kv_heads=modules["k"].out_features // head_dim,
        head_dim=head_dim,
        epsilon=layer.input_layernorm.variance_epsilon,
        scaling=layer.self_attn.scaling,
        dtype=modules["q"].dtype,
    )


@cache
def _fused_class(original: Any) -> Any:
    return make(f"Fused{original.__name__}", (FusedLayer, original), _fused_class, original)
