"""What a model of the Llama kind is, from its config.json and the names and shapes of its tensors.

    artifact ──read_spec──► Spec, or `UnsupportedError` in words, for whoever then falls back to transformers

Nothing is guessed: a field that config.json leaves to a class of transformers, a rotary scheme, a tensor or an
activation that is not known here is a reason not to run the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from waterfill.artifact import RAW, Artifact, StoredTensor
from waterfill.codecs import LOSSLESS
from waterfill.errors import UnsupportedError
from waterfill.files import CONFIG_BYTES, read_text
from waterfill.native import MOST_HEAD_DIM

KINDS = frozenset({"llama", "mistral", "qwen2", "qwen3"})  # whose layers are those of native/src/layer.cpp
PROJECTIONS = {  # in the order of wf_layer
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
NORMS = {"input_norm": "input_layernorm", "post_norm": "post_attention_layernorm"}
OPTIONAL = {  # vectors that some of the kind have
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    **{f"{key}_bias": f"{PROJECTIONS[key]}.bias" for key in "qkvo"},
}
MOST_NUMBER = 1e30  # of a setting that is not a size
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens", "model.norm.weight", "lm_head"


@dataclass(frozen=True)
class Spec:
    """Shapes and constants. `frequencies` float32 `[head_dim / 2]` are those of the rotary positions, in radians per
    token."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    positions: int  # most tokens of a text
    epsilon: float
    dtype: str  # of the checkpoint: F32, BF16 or F16
    frequencies: npt.NDArray[np.float32]
    head: str  # the tensor that makes logits: its own, or the embedding
    vectors: tuple[str, ...]  # those of OPTIONAL that layers have

    @property
    def scaling(self) -> float:
        return float(self.head_dim**-0.5)

    def rotary(self, start: int, count: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """(cosine, sine) of positions from `start` on, float32 `[count, head_dim]`, half against half."""
        angles = np.arange(start, start + count, dtype=np.float32)[:, None] * self.frequencies
        twice = np.concatenate([angles, angles], axis=1)
        return np.cos(twice), np.sin(twice)


def read_spec(artifact: Artifact) -> Spec:
    """Raises UnsupportedError for a model that the engine does not run."""
    config = read_json(artifact.path / "config.json")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise UnsupportedError(f"its kind is {kind!r}, not one of {', '.join(sorted(KINDS))}")
    if config.get("architectures") not in (None, [f"{_class(kind)}ForCausalLM"]):
        raise UnsupportedError(f"its architecture is {config['architectures']!r}")
    _expect(config, hidden_act={"silu"}, pretraining_tp={None, 1}, use_sliding_window={None, False})
    if kind == "mistral":
        _expect(config, sliding_window={None})
    kinds = config.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise UnsupportedError("some of its layers do not attend to everything")
    tensors, layers = artifact.tensors, _integer(config, "num_hidden_layers")
    vectors = tuple(key for key, name in OPTIONAL.items() if f"model.layers.0.{name}" in tensors)
    head = HEAD if {HEAD, f"{HEAD}.weight"} & set(tensors) else EMBEDDING
    _check_names(tensors, layers, vectors, head)
    if head == EMBEDDING and config.get("tie_word_embeddings") is not True:
        raise UnsupportedError("it has no output head of its own, and does not say that it is the embedding")
    shape = {key: tensors[f"model.layers.0.{name}"].shape for key, name in PROJECTIONS.items()}
    hidden, heads = _integer(config, "hidden_size"), _integer(config, "num_attention_heads")
    if not (head_dim := config.get("head_dim")):
        if kind == "qwen3":
            raise UnsupportedError("its config.json has no head_dim")
        head_dim = hidden // heads
    if not isinstance(head_dim, int) or head_dim % 2 or not 2 <= head_dim <= MOST_HEAD_DIM:
        raise UnsupportedError(f"its head_dim is {head_dim!r}")
    kv_heads, rest = divmod(shape["k"][0], head_dim)
    if rest or not kv_heads or shape["q"][0] != heads * head_dim or heads % kv_heads:
        raise UnsupportedError(
            f"its heads do not fit its matrices: {heads} of {head_dim}, {shape['k'][0]} rows of keys"
        )
    _check_shapes(tensors, layers, shape, hidden, head)
    _check_vectors(tensors, layers, vectors, shape, head_dim)
    return Spec(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        inner=shape["gate"][0],
        vocabulary=tensors[head].shape[0],
        positions=_integer(config, "max_position_embeddings"),
        epsilon=_number(config, "rms_norm_eps"),
        dtype=tensors[EMBEDDING].dtype,
        frequencies=_frequencies(config, head_dim),
        head=head,
        vectors=vectors,
    )


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object. Raises UnsupportedError where there is none."""
    try:
        found = json.loads(read_text(path, CONFIG_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedError(f"{path.name} cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise UnsupportedError(f"{path.name} is not an object")
    return found


def _class(kind: str) -> str:
    return kind[0].upper() + kind[1:]


def _expect(config: Mapping[str, Any], **allowed: set[Any]) -> None:
    for name, values in allowed.items():
        found = config.get(name)
        if not isinstance(found, str | int | float | None) or found not in values:
            raise UnsupportedError(f"its {name} is {found!r}")


def _integer(config: Mapping[str, Any], name: str) -> int:
    found = config.get(name)
    if type(found) is not int or found < 1:
        raise UnsupportedError(f"its {name} is {found!r}")
    return found


def _number(config: Mapping[str, Any], name: str) -> float:
    found = config.get(name)
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found <= MOST_NUMBER:
        raise UnsupportedError(f"its {name} is {found!r}")
    return float(found)


def _check_names(tensors: Mapping[str, StoredTensor], layers: int, vectors: tuple[str, ...], head: str) -> None:
    """Exactly the tensors that the engine knows; packed ones are called like modules, kept ones like parameters."""
    if layers > len(tensors):
        raise UnsupportedError(f"it has {len(tensors)} tensors, which cannot be those of {layers} layers")
    parts = [f"model.layers.{layer}." for layer in range(layers)]
    matrices = {EMBEDDING, head, *(part + name for part in parts for name in PROJECTIONS.values())}
    kept = {FINAL_NORM, *(f"{part}{name}.weight" for part in parts for name in NORMS.values())}
    kept |= {part + OPTIONAL[key] for part in parts for key in vectors}
    for name in sorted(matrices):
        if f"{name}.weight" in tensors:
            raise UnsupportedError(f"{name} was kept as it is")
    if strange := (matrices | kept) ^ set(tensors):
        raise UnsupportedError(f"it has or lacks the tensor {min(strange)}")
    for name in sorted(kept):
        if tensors[name].codec not in (RAW, LOSSLESS) or tensors[name].dtype not in ("F32", "BF16", "F16"):
            raise UnsupportedError(f"{name} is packed, or not of floating point")


def _check_shapes(
    tensors: Mapping[str, StoredTensor], layers: int, shape: Mapping[str, tuple[int, ...]], hidden: int, head: str
) -> None:
    """All layers alike, and matrices that follow one another."""
    (q, _), (kv, _), (inner, _) = shape["q"], shape["k"], shape["gate"]
    vocabulary = tensors[head].shape[0]
    for name in (EMBEDDING, head):
        if tensors[name].shape != (vocabulary, hidden):
            raise UnsupportedError(f"its {name} is of another shape than {[vocabulary, hidden]}")
    expected = {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}
    expected |= {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    for layer in range(layers):
        for key, name in PROJECTIONS.items():
            if tensors[f"model.layers.{layer}.{name}"].shape != expected[key]:
                raise UnsupportedError(f"layer {layer} has a {name} of another shape than {list(expected[key])}")


def _check_vectors(
    tensors: Mapping[str, StoredTensor],
    layers: int,
    vectors: tuple[str, ...],
    shape: Mapping[str, tuple[int, ...]],
    head_dim: int,
) -> None:
    """Norms and biases, of the sizes that the layers read."""
    hidden = shape["o"][0]
    expected = {f"{name}.weight": hidden for name in NORMS.values()}
    expected |= {OPTIONAL[key]: head_dim if key.endswith("norm") else shape[key[0]][0] for key in vectors}
    every = {f"model.layers.{layer}.{name}": size for layer in range(layers) for name, size in expected.items()}
    for name, size in {FINAL_NORM: hidden, **every}.items():
        if tensors[name].shape != (size,):
            raise UnsupportedError(f"its {name} is of another shape than {[size]}")


def _frequencies(config: Mapping[str, Any], head_dim: int) -> npt.NDArray[np.float32]:
    """Radians per token of each pair of coordinates (RoFormer, arXiv 2104.09864), scaled as Llama 3.1's are, or
    linearly."""
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rotary, dict):
        raise UnsupportedError(f"its rotary positions are {rotary!r}")
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    base = _number({**config, **rotary}, "rope_theta")
    if base <= 0 or rotary.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedError("its rotary positions turn only a part of each head")
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain: npt.NDArray[np.float32] = (1 / np.float32(base) ** exponents).astype(np.float32)
    if kind == "default":
        return plain
    if kind == "linear":
        return plain / np.float32(_number(rotary, "factor"))
    if kind != "llama3":
        raise UnsupportedError(f"its rotary positions are of type {kind!r}")
    factor, low, high = (_number(rotary, f"{name}factor") for name in ("", "low_freq_", "high_freq_"))
    context = _number(rotary, "original_max_position_embeddings")
    turns = context * plain / (2 * math.pi)  # of each pair over the context that the model was first trained with
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    scaled: npt.NDArray[np.float32] = ((1 - smooth) * plain / factor + smooth * plain).astype(np.float32)
    return scaled
