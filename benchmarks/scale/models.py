"""Models of any size as planning sees them: names, shapes and dtypes, without weights.

    Dense, Experts: a config's sizes ──► simulate ──► Shapes, an Inventory

Names, shapes and order are those that transformers gives the same config (`tests/planning/test_simulated.py`), but for
experts: gate and up are matrices of their own here, as in checkpoints, where transformers has one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TypeAlias

from waterfill.files.architecture import Role

DTYPE = "BF16"


@dataclass(frozen=True)
class Dense:
    """A model of the Llama kind, untied."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head: int  # width of one
    mlp: int
    vocabulary: int


@dataclass(frozen=True)
class Experts:
    """A mixture of the DeepSeek-V3 kind, untied: low-rank attention, the first layer dense, one shared expert."""

    layers: int
    hidden: int
    heads: int
    query_rank: int
    key_rank: int
    head: int  # width of a key without positions, and of a value
    rotary: int  # width of a key with positions
    mlp: int  # of the dense layer
    expert: int
    experts: int
    active: int  # experts per token
    vocabulary: int


Config: TypeAlias = Dense | Experts

LLAMA_405B = Dense(126, 16384, 128, 8, 128, 53248, 128256)
KIMI_1T = Experts(61, 7168, 64, 1536, 512, 128, 64, 18432, 2048, 384, 8, 163840)


@dataclass(frozen=True)
class SimulatedMatrix:
    """A matrix `[out, in]` that nothing holds."""

    name: str
    shape: tuple[int, int]
    role: Role = "linear"
    dtype: str = DTYPE

    @property
    def parameter(self) -> str:
        return self.name.rpartition(".")[0] if self.role == "expert" else f"{self.name}.weight"

    @property
    def stored_shape(self) -> tuple[int, int]:
        return self.shape


@dataclass(frozen=True)
class SimulatedKept:
    """A tensor that stays as it is."""

    name: str
    shape: tuple[int, ...]
    dtype: str = DTYPE


@dataclass(frozen=True)
class Shapes:
    """An `Inventory` of tensors that nothing holds."""

    matrices: tuple[SimulatedMatrix, ...]
    kept: tuple[SimulatedKept, ...]

    @property
    def weights(self) -> int:
        """Number of weights in all matrices."""
        return sum(math.prod(matrix.shape) for matrix in self.matrices)


def simulate(config: Config) -> Shapes:
    """The inventory of a model of these sizes, in execution order."""
    tensors = [
        SimulatedMatrix("model.embed_tokens", (config.vocabulary, config.hidden), "embedding"),
        *chain.from_iterable(_layer(config, f"model.layers.{i}", first=i == 0) for i in range(config.layers)),
        SimulatedKept("model.norm.weight", (config.hidden,)),
        SimulatedMatrix("lm_head", (config.vocabulary, config.hidden), "head"),
    ]
    matrices = tuple(tensor for tensor in tensors if isinstance(tensor, SimulatedMatrix))
    return Shapes(matrices, tuple(tensor for tensor in tensors if isinstance(tensor, SimulatedKept)))


Tensors: TypeAlias = Iterator[SimulatedMatrix | SimulatedKept]


def _layer(config: Config, prefix: str, *, first: bool) -> Tensors:
    yield from _dense(config, prefix) if isinstance(config, Dense) else _sparse(config, prefix, first)
    for name in ("input", "post_attention"):
        yield SimulatedKept(f"{prefix}.{name}_layernorm.weight", (config.hidden,))


def _dense(c: Dense, prefix: str) -> Tensors:
    queries, keys = c.heads * c.head, c.kv_heads * c.head
    shapes = {"q": (queries, c.hidden), "k": (keys, c.hidden), "v": (keys, c.hidden), "o": (c.hidden, queries)}
    for name, shape in shapes.items():
        yield SimulatedMatrix(f"{prefix}.self_attn.{name}_proj", shape)
    yield from _mlp(f"{prefix}.mlp", c.hidden, c.mlp)


def _sparse(c: Experts, prefix: str, first: bool) -> Tensors:
    yield from _low_rank_attention(c, f"{prefix}.self_attn")
    if first:
        yield from _mlp(f"{prefix}.mlp", c.hidden, c.mlp)
        return
    yield SimulatedKept(f"{prefix}.mlp.gate.weight", (c.experts, c.hidden))
    yield SimulatedKept(f"{prefix}.mlp.gate.e_score_correction_bias", (c.experts,), "F32")
    for name, shape in _mlp_shapes(c.hidden, c.expert).items():
        for i in range(c.experts):
            yield SimulatedMatrix(f"{prefix}.mlp.experts.{name}.{i}", shape, "expert")
    yield from _mlp(f"{prefix}.mlp.shared_experts", c.hidden, c.expert)


def _low_rank_attention(c: Experts, prefix: str) -> Tensors:
    yield SimulatedMatrix(f"{prefix}.q_a_proj", (c.query_rank, c.hidden))
    yield SimulatedKept(f"{prefix}.q_a_layernorm.weight", (c.query_rank,))
    yield SimulatedMatrix(f"{prefix}.q_b_proj", (c.heads * (c.head + c.rotary), c.query_rank))
    yield SimulatedMatrix(f"{prefix}.kv_a_proj_with_mqa", (c.key_rank + c.rotary, c.hidden))
    yield SimulatedKept(f"{prefix}.kv_a_layernorm.weight", (c.key_rank,))
    yield SimulatedMatrix(f"{prefix}.kv_b_proj", (2 * c.heads * c.head, c.key_rank))
    yield SimulatedMatrix(f"{prefix}.o_proj", (c.hidden, c.heads * c.head))


def _mlp_shapes(hidden: int, width: int) -> dict[str, tuple[int, int]]:
    return {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}


def _mlp(prefix: str, hidden: int, width: int) -> Tensors:
    for name, shape in _mlp_shapes(hidden, width).items():
        yield SimulatedMatrix(f"{prefix}.{name}", shape)
