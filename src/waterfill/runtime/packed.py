"""Modules that hold packed weights: they replace a model's own, in place, and multiply through the kernels.

A packed module owns the buffers of its tensor under the names that the artifact gives them (`<module>.scales`), so that
any safetensors loader fills them. Entropy-coded streams are decoded to levels when they are loaded (`arrange`). A
streamed module has no buffers: its `source` multiplies.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.utils._pytree import tree_map
from transformers.pytorch_utils import Conv1D

from waterfill import kernels
from waterfill.codecs import TableCodec, Trellis
from waterfill.errors import WaterfillError

_DTYPES = {"F16": torch.float16, "U8": torch.uint8}


class Source(Protocol):
    """A matrix whose codes are elsewhere than in the module."""

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T: `[..., in]` -> `[..., out]`, of the dtype of x."""

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 `[...]` -> float32 `[..., in]`."""

    def dense(self) -> torch.Tensor:
        """W itself, float32 `[out, in]`."""


_PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


class DecodedOnUse:
    """Stands for a packed weight: knows its dtype, device and shape. Products with activations come from the codes; for
    anything else that is computed with it the matrix is decoded."""

    def __init__(self, matrix: PackedMatrix) -> None:
        self._matrix = matrix

    dtype = property(lambda self: self._matrix.dtype)
    device = property(lambda self: next((b.device for b in self._matrix.buffers()), torch.device("cpu")))
    shape = property(lambda self: torch.Size(self._matrix.stored_shape))
    ndim = 2

    def decode(self) -> torch.Tensor:
        """float `[out, in]`, or `[in, out]` where the model keeps it so."""
        weight = self._matrix.dense().to(self._matrix.dtype)
        return weight.T if self._matrix.transposed else weight

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decode(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if hasattr(nn.init, getattr(func, "__name__", "")):  # transformers: modules that also have computed buffers
            return (kwargs or {}).get("tensor", args[0] if args else None)
        if (product := _product(func, *args, **(kwargs or {}))) is not None:
            return product
        args, kwargs = tree_map(lambda x: x.decode() if isinstance(x, cls) else x, (tuple(args), kwargs or {}))
        return func(*args, **kwargs)


def _product(func: Any, x: Any, weight: Any = None, bias: Any = None, **others: Any) -> torch.Tensor | None:
    """x W^T from the codes, where `func` computes that."""
    if others or not isinstance(x, torch.Tensor) or not isinstance(weight, DecodedOnUse):
        return None
    matrix = weight._matrix
    if func is not nn.functional.linear if not matrix.transposed else func not in _PRODUCTS:
        return None
    y = matrix.multiply(x)
    return y if bias is None else y + bias


class PackedMatrix(nn.Module):
    """A matrix `[out, in]` in packed form. `dtype` is that of the activations it works with."""

    scales: torch.Tensor  # float16 [out, groups]
    codes: torch.Tensor  # uint8 [bytes]
    streams: torch.Tensor  # uint8 [bytes], in place of the two until they are decoded
    layout = kernels.STORED  # of the two buffers
    transposed = False  # whether the model's own parameter is [in, out]
    streamed = False
    source: Source | None = None  # of a streamed matrix, once the model is loaded

    def attach(
        self,
        codec: TableCodec | Trellis,
        shape: tuple[int, int],
        exponent: int,
        dtype: torch.dtype,
        *,
        streamed: bool = False,
    ) -> None:
        """Declare the matrix and, unless it is streamed, make room for its buffers, on the meta device until they are
        loaded."""
        self.streamed = streamed
        self.stored, self.shape, self.exponent, self.dtype = codec, shape, exponent, dtype
        self.codec = codec.levels if isinstance(codec, Trellis) else codec  # that it is multiplied from
        for key, part in codec.layout(shape).items() if not streamed else ():
            self.register_buffer(key, torch.empty(part.shape, dtype=_DTYPES[part.dtype], device="meta"))

    @property
    def weight(self) -> DecodedOnUse:
        """For model code that looks at a weight from outside, mostly for its dtype or device."""
        return DecodedOnUse(self)

    @property
    def packed(self) -> kernels.Packed:
        return kernels.Packed(self.codec, self.scales, self.codes, self.exponent, self.shape, self.layout)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T: `[..., in]` -> `[..., out]`, of the dtype of x."""
        return kernels.matmul(x, self.packed) if self.source is None else self.source.multiply(x)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 `[...]` -> float32 `[..., in]`."""
        return kernels.rows(self.packed, ids) if self.source is None else self.source.rows(ids)

    def dense(self) -> torch.Tensor:
        """W itself, float32 `[out, in]`."""
        return kernels.dense(self.packed) if self.source is None else self.source.dense()

    def arrange(self) -> None:
        """Exchange the buffers, once they are loaded, for the ones that the kernels multiply from."""
        if isinstance(self.stored, Trellis):
            device = self.streams.device
            codes, scales = self.stored.to_levels(self.streams.cpu(), self.shape)
            del self.streams
            self.register_buffer("scales", scales.to(device))
            self.register_buffer("codes", codes.to(device))
        arranged = kernels.arrange(self.packed)
        self.scales, self.codes, self.layout = arranged.scales, arranged.codes, arranged.layout

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """`model.to(dtype)` changes the activations' dtype; stored scales are not activations and keep their bits."""
        scaled = "scales" in self._buffers
        if scaled:
            self.scales = self.scales.view(torch.int16)
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            if scaled:
                self.scales = self.scales.view(torch.float16)
        if self.layout != kernels.STORED and self.codes.device.type not in ("cpu", "meta"):
            raise WaterfillError(
                f"these weights were arranged for the CPU as they were loaded and cannot move to {self.codes.device}; "
                "load the model with device_map instead"
            )
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    @property
    def stored_shape(self) -> tuple[int, int]:
        return (self.shape[1], self.shape[0]) if self.transposed else self.shape

    def extra_repr(self) -> str:
        return f"out_features={self.shape[0]}, in_features={self.shape[1]}, codec={self.stored.name}"


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
        y = self.multiply(x)
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
        return self.rows(ids).to(self.dtype)


class TiedHead(nn.Module):
    """Output head that multiplies with the packed embedding."""

    def __init__(self, embedding: PackedEmbedding, bias: nn.Parameter | None) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple, so that its buffers are not registered twice
        self.bias = bias
        self.out_features, self.in_features = embedding.shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self._embedding[0].multiply(x)
        return y if self.bias is None else y + self.bias


class PackedExperts(nn.ModuleList):
    """The experts of one fused 3-D parameter, which the model's code indexes one by one."""

    def __init__(self, count: int, transposed: bool, dtype: torch.dtype) -> None:
        super().__init__([PackedMatrix() for _ in range(count)])
        self.dtype = dtype
        for expert in range(count):
            self.expert(expert).transposed = transposed

    def expert(self, index: int) -> PackedMatrix:
        return cast(PackedMatrix, self._modules[str(index)])

    def __getitem__(self, index: Any) -> Any:
        """One expert's weight, as if it were `[out, in]`, or `[in, out]` where the model keeps it so."""
        return self.expert(int(index)).weight


def pack_linear(module: nn.Module) -> PackedLinear:
    """Turn an `nn.Linear` or Conv1D (or a subclass) into a packed one; its bias stays. Call `attach` next."""
    transposed = isinstance(module, Conv1D)
    packed: PackedLinear = _replace_weight(module, PackedLinear)
    packed.transposed = transposed
    return packed


def pack_embedding(module: nn.Embedding) -> PackedEmbedding:
    """Turn an `nn.Embedding` (or a subclass that scales its result) into a packed one. Call `attach` next."""
    packed: PackedEmbedding = _replace_weight(module, PackedEmbedding)
    return packed


def _replace_weight(module: nn.Module, packed_class: type[PackedMatrix]) -> Any:
    del module._parameters["weight"]
    for name in ("in_features", "out_features", "num_embeddings", "embedding_dim"):
        module.__dict__.pop(name, None)  # properties of the packed classes
    original: Any = type(module)
    target: Any = packed_class
    module.__class__ = _packed_subclass(original, target)
    return module


@cache
def _packed_subclass(original: Any, packed_class: Any) -> Any:
    """The packed class; for a subclass with a forward of its own, one whose `super().forward` is the packed one."""
    plain = next(base for base in original.__mro__ if base in (nn.Linear, nn.Embedding, Conv1D))
    if original.forward is plain.forward:
        return packed_class
    slot = type(f"{packed_class.__name__}Slot", (packed_class, plain), {})
    return type(f"Packed{original.__name__}", (original, slot), {})
