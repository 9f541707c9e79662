"""What a config.json says, as transformers' config classes understand it, without importing them.

    config.json ──a family's reading, with what is here──► Config, or `UnsupportedError` in words

The classes have defaults, older names beside newer ones, and take any other field as an attribute that their models may
ask for. Here a field counts only where all of transformers' versions agree on what it means: one that is absent and has
a default that matters, that contradicts another, or that is not known, is a reason to leave the model to transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from waterfill.base.errors import UnsupportedError
from waterfill.base.native import MOST_HEAD_DIM, SILU
from waterfill.files.llama_names import NORMS
from waterfill.running.text.defaults import OPTIONS

Fields = Mapping[str, Any]

MOST, MOST_LAYERS = 1 << 40, 1 << 12  # of any number, so that all of them are safe to reckon with, and of layers
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

# Fields without an effect on what a causal model computes: training, classification, and who wrote the file.
HARMLESS = frozenset(
    [
        "_attn_implementation_autoset",
        "_model_name_or_path",
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
        "unk_token_id",
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
class Attention:
    """Of one layer: each token attends to `window` tokens, itself and those before it, or to all where it is 0; places
    are those of table number `table` of the rotary positions."""

    window: int = 0
    table: int = 0


@dataclass(frozen=True)
class Config:
    """Shapes and constants, not yet compared with the tensors. `frequencies` float32 `[tables, head_dim / 2]` are those
    of the rotary positions, in radians per token."""

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
    scaling: float  # of the scores, before the softmax
    attention: tuple[Attention, ...]  # of each layer
    vectors: tuple[str, ...] = ()  # those of `spec.OPTIONAL` that layers have
    norms: Mapping[str, str] = field(default_factory=lambda: NORMS)  # of `hidden`, by their names in wf_layer
    norm_offset: float = 0.0  # what norms have beside the weights that are stored
    embedding_scale: float = 1.0  # rounded to the model's dtype where it is used
    activation: int = SILU  # of the gate


def check_fields(fields: Fields, read: Set[str], architecture: str) -> None:
    """Nothing that is not known, and a causal model."""
    if unknown := fields.keys() - read - HARMLESS - OPTIONS:
        raise UnsupportedError(f"its config.json sets {min(unknown)}, which is not known here")
    if fields.get("architectures") not in (None, [architecture]):
        raise UnsupportedError(f"its architecture is {fields['architectures']!r}")


def expect(fields: Fields, **allowed: set[Any]) -> None:
    """Each field has one of the values; None is also one that is absent."""
    for name, values in allowed.items():
        value = fields.get(name)
        if not isinstance(value, str | int | float | None) or value not in values:
            raise UnsupportedError(f"its {name} is {value!r}")


def integer(fields: Fields, name: str) -> int:
    """From 1 to `MOST`."""
    value = fields.get(name)
    if type(value) is not int or not 1 <= value <= MOST:
        raise UnsupportedError(f"its {name} is {value!r}")
    return value


def number(fields: Fields, name: str) -> float:
    """From 0 to `MOST`."""
    value = fields.get(name)
    if type(value) not in (int, float) or not 0 <= value <= MOST:  # type: ignore[operator]
        raise UnsupportedError(f"its {name} is {value!r}")
    return float(value)  # type: ignore[arg-type]


def flag(fields: Fields, name: str, *, absent: bool = False) -> bool:
    """`absent` is what every class has where it is."""
    value = fields.get(name, absent)
    if not isinstance(value, bool):
        raise UnsupportedError(f"its {name} is {value!r}")
    return value


def layer_count(fields: Fields) -> int:
    """num_hidden_layers, not more than any model has."""
    layers = integer(fields, "num_hidden_layers")
    if layers > MOST_LAYERS:
        raise UnsupportedError(f"its num_hidden_layers is {layers}")
    return layers


def check_head_dim(head_dim: object) -> int:
    """One that the native layers take."""
    if type(head_dim) is not int or head_dim % 2 or not 2 <= head_dim <= MOST_HEAD_DIM:
        raise UnsupportedError(f"its head_dim is {head_dim!r}")
    return head_dim


def dtype_of(fields: Fields) -> str | None:
    """F32, BF16 or F16; None where it is not stated."""
    name = fields.get("dtype") or fields.get("torch_dtype")
    if name is None:
        return None
    if not isinstance(name, str) or name not in _DTYPES:
        raise UnsupportedError(f"its dtype is {name!r}")
    return _DTYPES[name]


def positive(fields: Fields, name: str) -> float:
    """More than 0, to `MOST`."""
    value = number(fields, name)
    if not value:
        raise UnsupportedError(f"its {name} is 0")
    return value


def frequencies(rotary: Fields, head_dim: int, name: str) -> npt.NDArray[np.float32]:
    """Radians per token of each pair of coordinates (RoFormer, arXiv 2104.09864), scaled as Llama 3.1's are, or
    linearly. `rotary` are the fields of `name`."""
    if unknown := rotary.keys() - _ROTARY:
        raise UnsupportedError(f"its {name} sets {min(unknown)}, which is not known here")
    base = number(rotary, "rope_theta")
    if base <= 0 or rotary.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedError("its rotary positions turn only a part of each head")
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain: npt.NDArray[np.float32] = (1 / np.float32(base) ** exponents).astype(np.float32)
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    if kind == "default":
        return plain
    if kind == "linear":
        return plain / np.float32(positive(rotary, "factor"))
    if kind != "llama3":
        raise UnsupportedError(f"its rotary positions are of type {kind!r}")
    factor, low, high = (positive(rotary, f"{name}factor") for name in ("", "low_freq_", "high_freq_"))
    context = positive(rotary, "original_max_position_embeddings")
    if low >= high:
        raise UnsupportedError(f"its low_freq_factor is {low}, its high_freq_factor {high}")
    turns = context * plain / (2 * math.pi)  # of each pair over the context that the model was first trained with
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    scaled: npt.NDArray[np.float32] = ((1 - smooth) * plain / factor + smooth * plain).astype(np.float32)
    return scaled
