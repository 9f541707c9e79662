"""What a config.json of the Llama kind says, as transformers' config classes understand it, without importing them.

    config.json ──read_config──► Config, or `UnsupportedError` in words

The classes have defaults, older names beside newer ones, and take any other field as an attribute that their models may
ask for. Here a field counts only where all of transformers' versions agree on what it means: one that is absent and has
a default that matters, that contradicts another, or that is not known, is a reason to leave the model to transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from waterfill.base.errors import UnsupportedError
from waterfill.base.native import MOST_HEAD_DIM
from waterfill.files.llama_names import LAYER_CLASSES
from waterfill.running.text.defaults import OPTIONS

Fields = Mapping[str, Any]

KINDS = frozenset(LAYER_CLASSES)  # whose layers are those of native/src/layer.cpp
MOST, MOST_LAYERS = 1 << 40, 1 << 12  # of any number, so that all of them are safe to reckon with, and of layers
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_BIASES = ("q_bias", "k_bias", "v_bias", "o_bias")

# Fields that are read below.
_READ = frozenset(
    [
        "architectures",
        "attention_bias",
        "dtype",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "intermediate_size",
        "is_encoder_decoder",
        "layer_types",
        "max_position_embeddings",
        "mlp_bias",
        "model_type",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "partial_rotary_factor",
        "pretraining_tp",
        "rms_norm_eps",
        "rope_interleaved",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "sliding_window",
        "tie_word_embeddings",
        "torch_dtype",
        "use_mrope",
        "use_sliding_window",
        "vocab_size",
    ]
)
# Fields without an effect on what a causal model computes: training, classification, and who wrote the file.
_HARMLESS = frozenset(
    [
        "_attn_implementation_autoset",
        "_name_or_path",
        "attention_dropout",
        "auto_map",
        "finetuning_task",
        "id2label",
        "initializer_range",
        "is_llama_config",
        "label2id",
        "max_window_layers",
        "name_or_path",
        "neftune_noise_alpha",
        "num_labels",
        "problem_type",
        "quantization_config",
        "task_specific_params",
        "tokenizer_class",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
    ]
)
_ROTARY = frozenset(
    [
        "factor",
        "high_freq_factor",
        "low_freq_factor",
        "original_max_position_embeddings",
        "partial_rotary_factor",
        "rope_theta",
        "rope_type",
        "type",
    ]
)


@dataclass(frozen=True)
class Config:
    """Shapes and constants, not yet compared with the tensors. `frequencies` float32 `[head_dim / 2]` are those of the
    rotary positions, in radians per token."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    positions: int  # most tokens of a text
    epsilon: float
    dtype: str | None  # F32, BF16 or F16; None for that of the tensors
    frequencies: npt.NDArray[np.float32]
    tied: bool  # whether the embedding is the head
    vectors: tuple[str, ...]  # those of `spec.OPTIONAL` that layers have


def read_config(found: Fields) -> Config:
    """Raises UnsupportedError for a model that the engine does not run, or cannot be sure of."""
    kind = found.get("model_type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise UnsupportedError(f"its kind is {kind!r}, not one of {', '.join(sorted(KINDS))}")
    if unknown := found.keys() - _READ - _HARMLESS - OPTIONS:
        raise UnsupportedError(f"its config.json sets {min(unknown)}, which is not known here")
    if found.get("architectures") not in (None, [f"{kind.capitalize()}ForCausalLM"]):
        raise UnsupportedError(f"its architecture is {found['architectures']!r}")
    _expect(found, hidden_act={"silu"}, pretraining_tp={None, 1}, mlp_bias={None, False})
    _expect(found, is_encoder_decoder={None, False}, rope_interleaved={None, False}, use_mrope={None, False})
    layers = _integer(found, "num_hidden_layers")
    if layers > MOST_LAYERS:
        raise UnsupportedError(f"its num_hidden_layers is {layers}")
    _check_windows(found, kind, layers)
    heads = _integer(found, "num_attention_heads")
    head_dim = _head_dim(found, kind, heads)
    return Config(
        layers=layers,
        hidden=_integer(found, "hidden_size"),
        heads=heads,
        kv_heads=_kv_heads(found, kind, heads),
        head_dim=head_dim,
        inner=_integer(found, "intermediate_size"),
        vocabulary=_integer(found, "vocab_size"),
        positions=_integer(found, "max_position_embeddings"),
        epsilon=_number(found, "rms_norm_eps"),
        dtype=_dtype(found),
        tied=_flag(found, "tie_word_embeddings"),
        vectors=_vectors(found, kind),
        frequencies=_frequencies(found, head_dim),
    )


def _expect(found: Fields, **allowed: set[Any]) -> None:
    for name, values in allowed.items():
        value = found.get(name)
        if not isinstance(value, str | int | float | None) or value not in values:
            raise UnsupportedError(f"its {name} is {value!r}")


def _integer(found: Fields, name: str) -> int:
    value = found.get(name)
    if type(value) is not int or not 1 <= value <= MOST:
        raise UnsupportedError(f"its {name} is {value!r}")
    return value


def _number(found: Fields, name: str) -> float:
    value = found.get(name)
    if type(value) not in (int, float) or not 0 <= value <= MOST:  # type: ignore[operator]
        raise UnsupportedError(f"its {name} is {value!r}")
    return float(value)  # type: ignore[arg-type]


def _flag(found: Fields, name: str) -> bool:
    """False where it is absent, as every class has it."""
    value = found.get(name, False)
    if not isinstance(value, bool):
        raise UnsupportedError(f"its {name} is {value!r}")
    return value


def _check_windows(found: Fields, kind: str, layers: int) -> None:
    """Every layer attends to all tokens. A window that is stated also limits the cache, whatever the layers say."""
    if kind.startswith("qwen"):  # which has a window unless this is off, and ignores sliding_window then
        _expect(found, use_sliding_window={None, False})
    elif found.get("sliding_window") is not None or found.get("use_sliding_window"):
        raise UnsupportedError(f"its sliding_window is {found.get('sliding_window')!r}")
    elif kind == "mistral" and "sliding_window" not in found:
        raise UnsupportedError("its config.json has no sliding_window")
    if kind == "mistral" and "layer_types" in found:
        raise UnsupportedError("its config.json has layer_types, which models of its kind do not have")
    if found.get("layer_types") not in (None, ["full_attention"] * layers):
        raise UnsupportedError("some of its layers do not attend to everything, or are not of its layer_types")


def _head_dim(found: Fields, kind: str, heads: int) -> int:
    if "head_dim" in found and not (found["head_dim"] is None and kind in ("llama", "mistral")):
        head_dim = found["head_dim"]
    elif kind == "qwen3":
        raise UnsupportedError("its config.json has no head_dim")
    else:
        head_dim = _integer(found, "hidden_size") // heads
    if type(head_dim) is not int or head_dim % 2 or not 2 <= head_dim <= MOST_HEAD_DIM:
        raise UnsupportedError(f"its head_dim is {head_dim!r}")
    return head_dim


def _kv_heads(found: Fields, kind: str, heads: int) -> int:
    null_is_heads = kind == "llama" or (kind.startswith("qwen") and "num_key_value_heads" in found)
    if null_is_heads and found.get("num_key_value_heads") is None:
        return heads
    return _integer(found, "num_key_value_heads")


def _dtype(found: Fields) -> str | None:
    name = found.get("dtype") or found.get("torch_dtype")
    if name is None:
        return None
    if not isinstance(name, str) or name not in _DTYPES:
        raise UnsupportedError(f"its dtype is {name!r}")
    return _DTYPES[name]


def _vectors(found: Fields, kind: str) -> tuple[str, ...]:
    if kind == "qwen2":
        return _BIASES[:3]
    biases = _BIASES if _flag(found, "attention_bias") and kind != "mistral" else ()
    return ("q_norm", "k_norm", *biases) if kind == "qwen3" else biases


def _frequencies(found: Fields, head_dim: int) -> npt.NDArray[np.float32]:
    """Radians per token of each pair of coordinates (RoFormer, arXiv 2104.09864), scaled as Llama 3.1's are, or
    linearly."""
    rotary = _rotary(found)
    base = _number(rotary, "rope_theta")
    if base <= 0 or rotary.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedError("its rotary positions turn only a part of each head")
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain: npt.NDArray[np.float32] = (1 / np.float32(base) ** exponents).astype(np.float32)
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    if kind == "default":
        return plain
    if kind == "linear":
        return plain / np.float32(_positive(rotary, "factor"))
    if kind != "llama3":
        raise UnsupportedError(f"its rotary positions are of type {kind!r}")
    factor, low, high = (_positive(rotary, f"{name}factor") for name in ("", "low_freq_", "high_freq_"))
    context = _positive(rotary, "original_max_position_embeddings")
    if low >= high:
        raise UnsupportedError(f"its low_freq_factor is {low}, its high_freq_factor {high}")
    turns = context * plain / (2 * math.pi)  # of each pair over the context that the model was first trained with
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    scaled: npt.NDArray[np.float32] = ((1 - smooth) * plain / factor + smooth * plain).astype(np.float32)
    return scaled


def _rotary(found: Fields) -> Fields:
    """The parameters of the rotary positions, under their older name or their newer one."""
    names = [name for name in ("rope_parameters", "rope_scaling") if found.get(name)]
    if len(names) > 1 and found["rope_parameters"] != found["rope_scaling"]:
        raise UnsupportedError("its rope_parameters and its rope_scaling say different things")
    rotary = found[names[0]] if names else {}
    if not isinstance(rotary, dict):
        raise UnsupportedError(f"its {names[0]} is {rotary!r}")
    if unknown := rotary.keys() - _ROTARY:
        raise UnsupportedError(f"its {names[0]} sets {min(unknown)}, which is not known here")
    beside = {name: found[name] for name in ("rope_theta", "partial_rotary_factor") if name in found}
    return {**beside, **rotary}


def _positive(found: Fields, name: str) -> float:
    value = _number(found, name)
    if not value:
        raise UnsupportedError(f"its {name} is 0")
    return value
