"""What a model is, from its config.json and the names and shapes of its tensors.

    artifact ──read_spec──► Spec, or `UnsupportedError` in words, for whoever then falls back to transformers

Nothing is guessed: a field (`config`) or a tensor that is not known here is a reason not to run the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from waterfill.base.dtypes import WEIGHT_DTYPES
from waterfill.base.errors import UnsupportedError
from waterfill.base.reading import CONFIG_BYTES, read_text
from waterfill.files.artifact import Artifact, StoredTensor
from waterfill.files.llama_names import EMBEDDING as EMBEDDING
from waterfill.files.llama_names import FINAL_NORM as FINAL_NORM
from waterfill.files.llama_names import HEAD as HEAD
from waterfill.files.llama_names import NORMS as NORMS
from waterfill.files.llama_names import PROJECTIONS as PROJECTIONS
from waterfill.running.engine.config import Config, Fields
from waterfill.running.engine.families import FAMILIES

OPTIONAL = {  # vectors that some of the kind have
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    **{f"{key}_bias": f"{PROJECTIONS[key]}.bias" for key in "qkvo"},
}
MOST_NUMBER = 1e30  # of a setting that is not a size


class Spec(Config):
    """A config that its tensors agree with."""

    @property
    def head(self) -> str:
        """The tensor that makes logits: its own, or the embedding."""
        return EMBEDDING if self.tied else HEAD

    @property
    def rounded_scale(self) -> np.float32:
        """`embedding_scale` as the model's dtype has it."""
        return rounded(self.embedding_scale, self.dtype)

    def rotary(self, positions: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """(cosine, sine) of positions `[count]`, float32 `[tables, count, head_dim]`, half against half."""
        angles = positions.astype(np.float32)[:, None] * self.frequencies[:, None]
        twice = np.concatenate([angles, angles], axis=2)
        return np.cos(twice), np.sin(twice)


def read_spec(artifact: Artifact) -> Spec:
    """Raises UnsupportedError for a model that the engine does not run."""
    tensors = artifact.tensors
    spec = Spec(**vars(config_of(read_json(artifact.path / "config.json"))))
    _check_names(tensors, spec)
    _check_shapes(tensors, spec)
    return replace(spec, dtype=spec.dtype or tensors[EMBEDDING].dtype)


def config_of(found: Fields) -> Config:
    """What the fields of a config.json say of a model. Raises UnsupportedError where the engine does not run it."""
    kind = found.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UnsupportedError(f"its kind is {kind!r}, not one of {', '.join(sorted(FAMILIES))}")
    return FAMILIES[kind](found)


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object. Raises UnsupportedError where there is none."""
    try:
        found = json.loads(read_text(path, CONFIG_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedError(f"{path.name} cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise UnsupportedError(f"{path.name} is not an object")
    return found


def rounded(value: float, dtype: str | None) -> np.float32:
    """To the nearest number of F32, F16 or BF16, ties to even."""
    if dtype == "F16":
        return np.float32(np.float16(value))
    bits = np.array(value, np.float32).view(np.uint32)
    if dtype == "BF16":
        bits = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.float32(bits.view(np.float32))


def _check_names(tensors: Mapping[str, StoredTensor], spec: Spec) -> None:
    """Exactly the tensors that the engine knows; packed ones are called like modules, kept ones like parameters."""
    if spec.layers > len(tensors):
        raise UnsupportedError(f"it has {len(tensors)} tensors, which cannot be those of {spec.layers} layers")
    parts = [f"model.layers.{layer}." for layer in range(spec.layers)]
    matrices = {EMBEDDING, spec.head, *(part + name for part in parts for name in PROJECTIONS.values())}
    kept = {FINAL_NORM, *(f"{part}{name}.weight" for part in parts for name in spec.norms.values())}
    kept |= {part + OPTIONAL[key] for part in parts for key in spec.vectors}
    for name in sorted(matrices):
        if f"{name}.weight" in tensors:
            raise UnsupportedError(f"{name} was kept as it is")
    if strange := (matrices | kept) ^ set(tensors):
        raise UnsupportedError(f"it has or lacks the tensor {min(strange)}")
    for name in sorted(kept):
        if tensors[name].packed or tensors[name].dtype not in WEIGHT_DTYPES:
            raise UnsupportedError(f"{name} is packed, or not of floating point")


def _check_shapes(tensors: Mapping[str, StoredTensor], spec: Spec) -> None:
    """All layers alike, and as config.json says."""
    hidden, inner, vocabulary = spec.hidden, spec.inner, spec.vocabulary
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    if spec.heads % spec.kv_heads:
        raise UnsupportedError(f"its {spec.heads} heads do not share {spec.kv_heads} heads of keys evenly")
    shapes = {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}
    shapes |= {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    lengths = {"q_norm": spec.head_dim, "k_norm": spec.head_dim, **{f"{key}_bias": shapes[key][0] for key in "qkvo"}}
    expected: dict[str, tuple[int, ...]] = {EMBEDDING: (vocabulary, hidden), spec.head: (vocabulary, hidden)}
    expected[FINAL_NORM] = (hidden,)
    for part in (f"model.layers.{layer}." for layer in range(spec.layers)):
        expected |= {part + name: shapes[key] for key, name in PROJECTIONS.items()}
        expected |= {f"{part}{name}.weight": (hidden,) for name in spec.norms.values()}
        expected |= {part + OPTIONAL[key]: (lengths[key],) for key in spec.vectors}
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise UnsupportedError(f"its {name} is {list(tensors[name].shape)}, and not {list(shape)}")
