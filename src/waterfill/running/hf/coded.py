"""Losslessly coded tensors while a model is loaded: transformers fills streams, which then become the model's tensors.

    parameter or buffer --hold--> module of that name with a buffer `streams` --decode_coded--> the tensor, to the bit

A tensor `model.norm.weight` lies in the artifact as `model.norm.weight.streams`. A module in the parameter's place
makes that a name that the model has, so that any loader finds it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import build_glob_alternation
from transformers.utils.logging import tqdm

from waterfill.base.dtypes import TORCH_DTYPES, WEIGHT_DTYPES
from waterfill.base.errors import ArtifactError
from waterfill.codecs import lossless
from waterfill.files.artifact import StoredTensor
from waterfill.running.hf.stand_in import StandIn
from waterfill.running.hf.tensor_module import TensorModule

_TIES = "all_tied_weights_keys"


class Coded(TensorModule):
    """Stands in a tensor's place. Without streams it is that of a tensor tied to another one."""

    streams: torch.Tensor  # uint8 [bytes]
    loading = True

    def __init__(self, like: torch.Tensor, tensor: StoredTensor | None = None) -> None:
        super().__init__()
        self._like = like.shape, like.dtype, torch.device("cpu")
        self.tensor = tensor
        if tensor is not None:
            (size_bytes,) = tensor.buffers[0].shape
            self.register_buffer("streams", torch.empty(size_bytes, dtype=torch.uint8, device="meta"))

    def stand_in(self) -> StandIn:
        """For a tensor that has no values yet."""
        return StandIn(self, *self._like)

    def decode(self) -> torch.Tensor:
        """The tensor, as it was packed."""
        assert self.tensor is not None
        streams = self.streams.cpu().to(torch.uint8)  # early versions make float32 of all that a model keeps so
        return lossless.decode(streams, self.tensor.shape, TORCH_DTYPES[self.tensor.dtype])


@dataclass
class _Place:
    """Where a tensor belongs: its module and its name there, and the names before and after it."""

    owner: nn.Module
    name: str
    order: list[str]  # of the module's parameters, then of its buffers

    def put(self, tensor: torch.Tensor) -> None:
        del self.owner._modules[self.name]
        if isinstance(tensor, nn.Parameter):
            self.owner.register_parameter(self.name, tensor)
            members: dict[str, Any] = self.owner._parameters
        else:
            self.owner.register_buffer(self.name, tensor)
            members = self.owner._buffers
        for name in self.order:  # a state dict lists them in the order of the model
            if name in members:
                members[name] = members.pop(name)


@dataclass
class _Held:
    coded: Coded
    places: list[_Place]  # the first is the tensor's own, the others are tied to it
    dtype: torch.dtype
    requires_grad: bool | None  # None: a buffer


@dataclass
class _Holding:
    tensors: list[_Held] = field(default_factory=list)
    ties: dict[str, str] = field(default_factory=dict)


def hold(model: Any, tensors: Iterable[StoredTensor], dtype: torch.dtype) -> None:
    """Put modules in the place of all tensors, given those that are losslessly coded, and the model's dtype.

    Raises:
        ArtifactError: a tensor has no place in the model, or is not what its place calls for.
    """
    holding = _Holding(ties=dict(getattr(model, _TIES, None) or {}))
    dtypes, orders = _dtype_plan(model, dtype), dict[nn.Module, list[str]]()
    for stored in tensors:
        aliases = [target for target, source in holding.ties.items() if source == stored.name]
        original = _find(model, stored)
        kind = nn.Parameter if isinstance(original, nn.Parameter) else None
        coded = Coded(original, stored)
        modules = [(stored.name, coded), *((alias, Coded(original)) for alias in aliases)]
        places = [_replace(model, name, module, orders) for name, module in modules]
        wanted = next((dtype for pattern, dtype in dtypes if pattern.search(stored.name)), original.dtype)
        holding.tensors.append(_Held(coded, places, wanted, original.requires_grad if kind else None))
    if holding.tensors:
        held = {held.coded.tensor.name for held in holding.tensors if held.coded.tensor}
        setattr(model, _TIES, {k: v for k, v in holding.ties.items() if v not in held})
        model.__dict__["_waterfill_coded"] = holding


def decode_coded(model: Any) -> None:
    """Put the tensors themselves, whose streams are loaded by now, back in their places; tied ones stay tied."""
    holding: _Holding | None = model.__dict__.pop("_waterfill_coded", None)
    if holding is None:
        return
    for held in tqdm(
        holding.tensors, desc="Decoding kept tensors", disable=len(holding.tensors) < 2 or None, leave=False
    ):
        device = held.coded.streams.device
        tensor = held.coded.decode().to(device=device, dtype=held.dtype)
        del held.coded.streams  # before the next one takes memory
        if held.requires_grad is not None:
            tensor = nn.Parameter(tensor, requires_grad=held.requires_grad)
        tensor._is_hf_initialized = True
        for place in held.places:
            place.put(tensor)
    setattr(model, _TIES, holding.ties)


def _find(model: nn.Module, stored: StoredTensor) -> torch.Tensor:
    path, _, name = stored.name.rpartition(".")
    try:
        owner = model.get_submodule(path)
    except AttributeError:
        owner = nn.Module()
    tensor: torch.Tensor | None = owner._parameters.get(name)
    tensor = owner._buffers.get(name) if tensor is None else tensor
    if tensor is None:
        raise ArtifactError(f"tensor {stored.name!r} has no place in {type(model).__name__}; pack the model again")
    if tuple(tensor.shape) != stored.shape or stored.dtype not in WEIGHT_DTYPES:
        raise ArtifactError(
            f"tensor {stored.name!r} is {stored.dtype} {list(stored.shape)} where the model has {list(tensor.shape)}; "
            "pack the model again"
        )
    if [(buffer.dtype, len(buffer.shape)) for buffer in stored.buffers] != [("U8", 1)] or stored.keys != (
        lossless.BUFFER,
    ):
        raise ArtifactError(f"tensor {stored.name!r} is not stored as {lossless.BUFFER!r} alone; pack the model again")
    return tensor


def _replace(model: nn.Module, path: str, coded: Coded, orders: dict[nn.Module, list[str]]) -> _Place:
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    order = orders.setdefault(owner, [*owner._parameters, *owner._buffers])
    delattr(owner, name)
    owner._modules[name] = coded
    if not owner._non_persistent_buffers_set:  # which transformers would have to compute
        owner._is_hf_initialized = True  # type: ignore[assignment]
    return _Place(owner, name, order)


def _dtype_plan(model: Any, dtype: torch.dtype) -> list[tuple[Any, torch.dtype]]:
    """Patterns of the tensors that transformers gives another dtype than the model's, as its loader has it."""
    plan = model._get_dtype_plan(dtype) if hasattr(model, "_get_dtype_plan") else {}
    return [(build_glob_alternation([pattern])[0], dtype) for pattern, dtype in plan.items()]
