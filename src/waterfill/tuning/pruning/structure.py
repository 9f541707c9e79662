"""What belongs together in a checkpoint of the Llama kind: rows and columns that can only be left out at once.

    part          rows of                               columns of
    KV group h    q (its n_rep heads), k, v; biases     o
    channel c     gate, up; biases                      down

With grouped queries, query heads n_rep h … n_rep h + n_rep - 1 share key/value head h, as transformers' `repeat_kv` has
it. All parts of a kind have the same width, so that a model with fewer of them is of the same class (LLM-Pruner, arXiv
2305.11627, §3.1, finds these groups by tracing; here they are known by name).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from waterfill.base.errors import CheckpointError
from waterfill.files.checkpoint import CONFIG, Checkpoint
from waterfill.files.llama_names import PROJECTIONS
from waterfill.files.skeleton import ModelTensor, build_skeleton, locate

Kind = Literal["heads", "channels"]
KINDS: tuple[Kind, ...] = ("heads", "channels")
FAMILIES = ("gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "qwen2", "qwen3")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


@dataclass(frozen=True)
class Sizes:
    """Of a model, the same in every layer."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    channels: int

    @property
    def repeats(self) -> int:
        """Query heads of a KV group."""
        return self.heads // self.kv_heads

    def parts(self, kind: Kind) -> int:
        """How many there are in a layer."""
        return self.kv_heads if kind == "heads" else self.channels


@dataclass(frozen=True)
class Member:
    """A tensor that parts of a layer have rows (`axis` 0) or columns (1) of, `width` neighbouring ones each."""

    tensor: ModelTensor
    layer: int
    kind: Kind
    axis: int
    width: int

    @property
    def parts(self) -> int:
        return self.tensor.shape[self.axis] // self.width

    @property
    def last(self) -> bool:
        """Whether its products are what the layer adds to the hidden state: those of o and down."""
        return self.axis == 1

    def places(self, parts: Sequence[int]) -> torch.Tensor:
        """Numbers of the rows or columns of some parts, int64."""
        return (torch.tensor(parts, dtype=torch.int64)[:, None] * self.width + torch.arange(self.width)).flatten()


@dataclass(frozen=True)
class Structure:
    """Every tensor of a checkpoint, in execution order, and which of them parts are made of."""

    sizes: Sizes
    tensors: tuple[ModelTensor, ...]
    members: dict[str, Member]  # by the tensor's name
    config: Any  # transformers'

    @cached_property
    def group_counts(self) -> tuple[int, ...]:
        """How many KV groups a layer may keep: of some families, numbers of heads have to divide the hidden size."""
        return tuple(count for count in range(1, self.sizes.kv_heads + 1) if self._is_config(count))

    def _is_config(self, kv_heads: int) -> bool:
        heads = {"num_attention_heads": kv_heads * self.sizes.repeats, "num_key_value_heads": kv_heads}
        try:
            type(self.config)(**{**self.config.to_dict(), **heads, "head_dim": self.sizes.head_dim})
        except Exception:  # each config class validates in its own way
            return False
        return True

    @cached_property
    def outputs(self) -> dict[str, int]:
        """Weights and biases that make what a layer adds to the hidden state, o's and down's, and their layers."""
        found = {}
        for tensor in self.tensors:
            parsed = _LAYER.fullmatch(tensor.name)
            if parsed and parsed[2] in (PROJECTIONS["o"], PROJECTIONS["down"]):
                found[tensor.name] = int(parsed[1])
        return found

    def layer_weights(self, kv_heads: int, channels: int) -> int:
        """Weights of one decoder layer with so many parts: projections, biases and norms."""
        kept = {"heads": kv_heads, "channels": channels}
        total = 0
        for tensor in self.tensors:
            if layer_of(tensor.name) == 0:
                member, count = self.members.get(tensor.name), math.prod(tensor.shape)
                total += count if member is None else count // member.parts * kept[member.kind]
        return total


def layer_of(name: str) -> int | None:
    """Number of the decoder layer that a tensor belongs to; None for one outside of them."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return None if layer is None else int(layer[1])


def structure_of(checkpoint: Checkpoint) -> Structure:
    """What can be left out of a checkpoint.

    Raises:
        CheckpointError: it is of a family whose parts are not known, or its tensors are not the family's.
    """
    file, model_type = checkpoint.path / CONFIG, checkpoint.config.get("model_type")
    if model_type not in FAMILIES:
        raise CheckpointError(
            f"{file} has the model type {model_type!r}, of which it is not known what can be left out together; give "
            f"a model of {', '.join(FAMILIES)}"
        )
    model = build_skeleton(checkpoint)
    tensors, config = locate(model, checkpoint)[0], model.config
    heads = config.num_attention_heads
    sizes = Sizes(
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        channels=config.intermediate_size,
    )
    members = {}
    for tensor in tensors:
        if len(tensor.sources) != 1 or len(tensor.sources[0]) != 1 or not tensor.sources[0][0].whole:
            raise CheckpointError(
                f"{checkpoint.path} stores {tensor.name!r} in several pieces, or together with others; store it in "
                "transformers' own layout, with save_pretrained(…, save_original_format=False)"
            )
        if (member := _member(tensor, sizes)) is not None:
            members[tensor.name] = member
    return Structure(sizes, tensors, members, config)


def _member(tensor: ModelTensor, sizes: Sizes) -> Member | None:
    found = _LAYER.fullmatch(tensor.name)
    key = next((key for key, name in PROJECTIONS.items() if found and name == found[2]), None)
    if found is None or key is None:
        return None
    kind: Kind = "heads" if key in "qkvo" else "channels"
    width = {"q": sizes.repeats * sizes.head_dim, "o": sizes.repeats * sizes.head_dim}.get(
        key, sizes.head_dim if kind == "heads" else 1
    )
    axis = int(key in ("o", "down"))
    if axis == 1 and found[3] == "bias":  # of the hidden state
        return None
    return Member(tensor, int(found[1]), kind, axis, width)
