"""Modules that hold packed weights: they replace a model's own, in place, and multiply through the kernels.

A packed module owns the two buffers of its tensor, `scales` and `codes`, under the names that the artifact gives them
(`<module>.scales`), so that any safetensors loader fills them. It has no `.weight`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import torch
from torch import nn

from waterfill import kernels
from waterfill.codecs import Higgs


class PackedMatrix(nn.Module):
    """A matrix `[out, in]` in packed form. `dtype` is that of the activations it works with."""

    scales: torch.Tensor  # float16 [out, groups]
    codes: torch.Tensor  # uint8 [bytes]

    def attach(self, codec: Higgs, shape: tuple[int, int], exponent: int, dtype: torch.dtype) -> None:
        """Declare the matrix and make room for its buffers, on the meta device until they are loaded."""
        self.codec, self.shape, self.exponent, self.dtype = codec, shape, exponent, dtype
        layout = codec.layout(shape)
        self.register_buffer("scales", torch.empty(layout["scales"].shape, dtype=torch.float16, device="meta"))
        self.register_buffer("codes", torch.empty(layout["codes"].shape, dtype=torch.uint8, device="meta"))

    @property
    def packed(self) -> kernels.Packed:
        return kernels.Packed(self.codec, self.scales, self.codes, self.exponent, self.shape)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """`model.to(dtype)` changes the activations' dtype; stored scales are not activations and keep their bits."""
        self.scales = self.scales.view(torch.int16)
        try:
            super()._apply(fn, recurse)
        finally:
            self.scales = self.scales.view(torch.float16)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def extra_repr(self) -> str:
        return f"out_features={self.shape[0]}, in_features={self.shape[1]}, codec={self.codec.name}"


class PackedLinear(PackedMatrix):
    """`nn.Linear` (or Conv1D) from codes."""

    bias: nn.Parameter | None

    @property
    def in_features(self) -> int:
        return self.shape[1]

    @property
    def out_features(self) -> int:
        return self.shape[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = kernels.matmul(x, self.packed)
        return y if self.bias is None else y + self.bias


class PackedEmbedding(PackedMatrix):
    """`nn.Embedding` from codes: decodes the rows that are asked for."""

    @property
    def num_embeddings(self) -> int:
        return self.shape[0]

    @property
    def embedding_dim(self) -> int:
        return self.shape[1]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return kernels.rows(self.packed, ids).to(self.dtype)


class TiedHead(nn.Module):
    """Output head that multiplies with the packed embedding."""

    def __init__(self, embedding: PackedEmbedding, bias: nn.Parameter | None) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple, so that its buffers are not registered twice
        self.bias = bias
        self.out_features, self.in_features = embedding.shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = kernels.matmul(x, self._embedding[0].packed)
        return y if self.bias is None else y + self.bias


class PackedExperts(nn.ModuleList):
    """The experts of one fused 3-D parameter: indexing decodes one expert's matrix, as the model's code expects."""

    def __init__(self, count: int, transposed: bool, dtype: torch.dtype) -> None:
        super().__init__([PackedMatrix() for _ in range(count)])
        self.transposed, self.dtype = transposed, dtype

    def expert(self, index: int) -> PackedMatrix:
        return cast(PackedMatrix, self._modules[str(index)])

    def __getitem__(self, index: Any) -> Any:
        """float `[out, in]`, or `[in, out]` where the model keeps it so."""
        expert = self.expert(int(index))
        weight = kernels.dense(expert.packed).to(expert.dtype)
        return weight.T if self.transposed else weight


def pack_linear(module: nn.Module) -> PackedLinear:
    """Turn an `nn.Linear` or Conv1D (or a subclass) into a packed one; its bias stays. Call `attach` next."""
    bias = module._parameters.get("bias")
    return _replace_weight(module, PackedLinear, bias=bias)


def pack_embedding(module: nn.Embedding) -> PackedEmbedding:
    """Turn an `nn.Embedding` (or a subclass that scales its result) into a packed one. Call `attach` next."""
    return _replace_weight(module, PackedEmbedding)


def _replace_weight(module: nn.Module, packed_class: type[Any], **parameters: Any) -> Any:
    del module._parameters["weight"]
    for name in ("in_features", "out_features", "num_embeddings", "embedding_dim"):
        module.__dict__.pop(name, None)  # properties of the packed classes
    module.__class__ = _packed_subclass(type(module), packed_class)
    for name, value in parameters.items():
        module.register_parameter(name, value)
    return module


@lru_cache(maxsize=256)
def _packed_subclass(original: type[nn.Module], packed_class: type[nn.Module]) -> type[nn.Module]:
    """The packed class; for a subclass with a forward of its own, one whose `super().forward` is the packed one."""
    plain = next(base for base in original.__mro__ if base in _PLAIN or base is nn.Module)
    if original is plain or "forward" not in _own_names(original, plain):
        return packed_class
    slot = type(f"{packed_class.__name__}Slot", (packed_class, plain), {})
    return type(f"Packed{original.__name__}", (original, slot), {})


def _own_names(original: type[nn.Module], plain: type[nn.Module]) -> set[str]:
    """Names defined between a class and the plain one that it derives from."""
    between = original.__mro__[: original.__mro__.index(plain)]
    return {name for cls in between for name in vars(cls)}


def _plain_classes() -> tuple[type[nn.Module], ...]:
    from transformers.pytorch_utils import Conv1D

    return nn.Linear, nn.Embedding, Conv1D


_PLAIN = _plain_classes()
