"""Modules that hold packed weights: they replace a model's own, in place, and multiply through the kernels.

A packed module owns the buffers of its tensor under the names that the artifact gives them (`<module>.scales`), so that
any safetensors loader fills them; then it exchanges them for those of the codec's form in memory (`arrange`). A
streamed module has no buffers: its `source` multiplies. A tied module multiplies with another one's matrix.

Each is an instance of the class that it replaces, so that whoever looks for linear layers or embeddings finds it, as
PEFT does to put adapters beside them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from waterfill import kernels
from waterfill.base.dtypes import TORCH_DTYPES
from waterfill.base.errors import WaterfillError
from waterfill.codecs import Codec, MemoryForm
from waterfill.running.hf.made import make
from waterfill.running.hf.stand_in import StandIn, Traced

_BITS = {2: torch.int16, 4: torch.int32}  # what holds the bits of a floating-point number
_EXPONENTS = range(-96, 97)  # of a matrix that is scaled: beyond these, float32 might not hold its weights


class Source(Protocol):
    """A matrix whose codes are elsewhere than in the module."""

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T: `[..., in]` -> `[..., out]`, of the dtype of x."""

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 `[...]` -> float32 `[..., in]`."""

    def dense(self) -> torch.Tensor:
        """W itself, float32 `[out, in]`."""

    def scaled(self, power: int) -> Source:
        """Of 2^power W."""


class _HasWeight(nn.Module):
    """A module whose weight is a property."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            object.__setattr__(self, name, value)  # nn.Module would look among its parameters
        else:
            super().__setattr__(name, value)


class PackedMatrix(_HasWeight):
    """A matrix `[out, in]` in packed form. `dtype` is that of the activations it works with."""

    scales: torch.Tensor  # float16 [out, groups]; in their place, until they are decoded, whatever the codec stores
    codes: torch.Tensor  # uint8 [bytes]
    stored: Codec  # of the artifact
    codec: MemoryForm  # that it is multiplied from
    layout = kernels.STORED  # of the two buffers
    transposed = False  # whether the model's own parameter is [in, out]
    streamed = False
    source: Source | None = None  # who multiplies in place of the buffers: a streamer, or whoever changes the scales
    loading = False  # between `install` and `end_loading`
    _weight: weakref.ref[StandIn] | None = None

    def __init__(self) -> None:
        nn.Module.__init__(self)  # of the class that it replaces nothing but the name is wanted

    def attach(
        self,
        codec: Codec,
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
        self.codec = codec.memory
        for key, part in codec.layout(shape).items() if not streamed else ():
            self.register_buffer(key, torch.empty(part.shape, dtype=TORCH_DTYPES[part.dtype], device="meta"))

    @property
    def weight(self) -> Any:
        """For model code that looks at a weight from outside, mostly for its dtype or device: a `StandIn`, one object
        as long as anybody holds it."""
        if torch.compiler.is_compiling():
            return self._stand_in(Traced)
        known = None if self._weight is None else self._weight()
        if known is None:
            known = self._stand_in(StandIn)
            self._weight = weakref.ref(known)
        return known

    @weight.setter
    def weight(self, value: Any) -> None:
        if not isinstance(value, StandIn) or not value.stands_for(self):  # `module.weight *= 2` assigns its own
            raise WaterfillError(
                f"the weight of {type(self).__name__} is packed and cannot be replaced; replace the module"
            )

    def _stand_in(self, kind: Any) -> Any:
        return kind(self, self.stored_shape, self.dtype, self.device, transposed=self.transposed)

    @property
    def device(self) -> torch.device:
        """Of the buffers, or of the activations where there are none."""
        for tensor in (*self._buffers.values(), *self._parameters.values()):
            if tensor is not None:
                return tensor.device
        return torch.device("cpu")

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

    def scale_by_power(self, power: int) -> None:
        """Multiply W by 2^power from now on, exactly.

        Raises:
            WaterfillError: float32 might not hold it.
        """
        if self.exponent + power not in _EXPONENTS:
            raise WaterfillError(f"a packed weight {list(self.shape)} cannot be multiplied by 2^{power} as well")
        self.exponent += power
        if self.source is not None:
            self.source = self.source.scaled(power)

    def end_loading(self) -> None:
        """End the loading: from now on the weight has values.

        Model code asks the first parameter of a module for its dtype and device, which is why there is always one.
        """
        self.loading, self._weight = False, None
        if all(parameter is None for parameter in self._parameters.values()):
            empty = torch.empty(0, dtype=self.dtype, device=self.device)
            self.register_parameter("empty", nn.Parameter(empty, requires_grad=False))

    def arrange(self) -> None:
        """Exchange the buffers, once they are loaded, for the ones that the kernels multiply from."""
        if self.stored is not self.codec:
            device, stored = self.device, {key: self._buffers[key] for key in self.stored.layout(self.shape)}
            loaded = {key: buffer.cpu() for key, buffer in stored.items() if buffer is not None}
            memory = self.stored.to_memory(loaded, self.shape, self.exponent)
            for key in stored:
                delattr(self, key)
            del stored, loaded
            for key, buffer in memory.items():
                self.register_buffer(key, buffer.to(device))
        arranged = kernels.arrange(self.packed)
        self.scales, self.codes, self.layout = arranged.scales, arranged.codes, arranged.layout

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """`model.to(dtype)` changes the activations' dtype; what is stored is not activations and keeps its bits."""
        buffers = {key: buffer for key, buffer in self._buffers.items() if buffer is not None}
        kept = {key: buffer.dtype for key, buffer in buffers.items() if buffer.is_floating_point()}
        for key, dtype in kept.items():
            self._buffers[key] = buffers[key].view(_BITS[dtype.itemsize])
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            for key, dtype in kept.items():
                self._buffers[key] = cast(torch.Tensor, self._buffers[key]).view(dtype)
        if self.layout != kernels.STORED and self.codes.device.type not in ("cpu", "meta"):
            raise WaterfillError(
                f"these weights were arranged for the CPU as they were loaded and cannot move to {self.codes.device}; "
                "load the model with device_map instead"
            )
        self.dtype, self._weight = fn(torch.empty(0, dtype=self.dtype)).dtype, None
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_weight"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if not kernels.usable(self.layout):
            raise WaterfillError(
                f"the model was pickled with its weights arranged for {self.layout}, which this machine does not have; "
                "load the artifact itself, with waterfill.load"
            )

    @property
    def stored_shape(self) -> tuple[int, int]:
        return (self.shape[1], self.shape[0]) if self.transposed else self.shape

    def extra_repr(self) -> str:
        return f"out_features={self.shape[0]}, in_features={self.shape[1]}, codec={self.stored.name}"


class Tied(_HasWeight):
    """Multiplies with the matrix of another module, which owns it."""

    _matrix: tuple[PackedMatrix]  # in a tuple, so that its buffers are not registered twice

    @property
    def matrix(self) -> PackedMatrix:
        return self._matrix[0]

    @property
    def weight(self) -> Any:
        """The other module's."""
        return self.matrix.weight

    @weight.setter
    def weight(self, value: Any) -> None:
        self.matrix.weight = value

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """As `PackedMatrix.multiply`."""
        return self.matrix.multiply(x)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """As `PackedMatrix.rows`."""
        return self.matrix.rows(ids)


class _Linear(nn.Module):
    """What `nn.Linear` (or Conv1D) does, with a packed matrix."""

    bias: Any  # a parameter, or None

    @property
    def in_features(self: Any) -> int:
        return self.shape[1]  # type: ignore[no-any-return]

    @property
    def out_features(self: Any) -> int:
        return self.shape[0]  # type: ignore[no-any-return]

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.multiply(x)
        return y if self.bias is None else y + self.bias  # type: ignore[no-any-return]


class _Embedding(nn.Module):
    """What `nn.Embedding` does, with a packed matrix: decodes the rows that are asked for."""

    @property
    def num_embeddings(self: Any) -> int:
        return self.shape[0]  # type: ignore[no-any-return]

    @property
    def embedding_dim(self: Any) -> int:
        return self.shape[1]  # type: ignore[no-any-return]

    def forward(self: Any, ids: torch.Tensor) -> torch.Tensor:
        return self.rows(ids).to(self.dtype)  # type: ignore[no-any-return]


class PackedLinear(PackedMatrix, _Linear, nn.Linear):  # type: ignore[override]  # sizes are properties
    """`nn.Linear` from codes."""


class PackedConv1D(PackedMatrix, _Linear, Conv1D):  # type: ignore[misc]  # transformers is untyped
    """Conv1D from codes."""


class PackedEmbedding(PackedMatrix, _Embedding, nn.Embedding):  # type: ignore[override]
    """`nn.Embedding` from codes."""


class TiedLinear(Tied, _Linear, nn.Linear):  # type: ignore[override]
    """`nn.Linear` whose weight is another module's: an output head, mostly."""


class TiedEmbedding(Tied, _Embedding, nn.Embedding):  # type: ignore[override]
    """`nn.Embedding` whose weight is another module's."""


def pack_linear(module: nn.Module) -> Any:
    """Turn an `nn.Linear` or Conv1D (or a subclass) into a packed one; its bias stays. Call `attach` next."""
    transposed = isinstance(module, Conv1D)
    packed = _replace_weight(module, PackedConv1D if transposed else PackedLinear)
    packed.transposed = transposed
    return packed


def pack_embedding(module: nn.Embedding) -> PackedEmbedding:
    """Turn an `nn.Embedding` (or a subclass that scales its result) into a packed one. Call `attach` next."""
    packed: PackedEmbedding = _replace_weight(module, PackedEmbedding)
    return packed


def tie(module: nn.Module, matrix: PackedMatrix) -> None:
    """Have a module, of whatever class, use the matrix of another one as its weight."""
    kinds = {nn.Linear: TiedLinear, nn.Embedding: TiedEmbedding}
    tied = _replace_weight(module, next((kinds[kind] for kind in kinds if isinstance(module, kind)), Tied))
    tied._matrix = (matrix,)


def _replace_weight(module: nn.Module, packed_class: Any) -> Any:
    del module._parameters["weight"]
    for name in ("in_features", "out_features", "num_embeddings", "embedding_dim"):
        module.__dict__.pop(name, None)  # properties of the packed classes
    original: Any = type(module)
    module.__class__ = _packed_subclass(original, packed_class)
    if not any(member is not None for member in (*module._parameters.values(), *module._buffers.values())):
        module._is_hf_initialized = True  # type: ignore[assignment]  # nothing is left that transformers could
    return module


@cache
def _packed_subclass(original: Any, packed_class: Any) -> Any:
    """The packed class; for a subclass with a forward of its own, one whose `super().forward` is the packed one."""
    if packed_class is Tied:
        return make(f"Tied{original.__name__}", (Tied, original), _packed_subclass, original, packed_class)
    plain = next(base for base in original.__mro__ if base in (nn.Linear, nn.Embedding, Conv1D))
    if original.forward is plain.forward:
        return packed_class
    slot = type(f"{packed_class.__name__}Slot", (packed_class, plain), {})
    return make(f"Packed{original.__name__}", (original, slot), _packed_subclass, original, packed_class)
