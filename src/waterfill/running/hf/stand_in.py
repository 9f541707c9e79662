"""Tensors that stand for packed weights in a model's own code: shape, dtype and device of the weight, and no memory.

    linear, matmul, bmm, embedding       from the codes
    detach, transposes                   another stand-in
    whatever else reads                  the weight is decoded; what still shares memory with it is a stand-in as well
    times or divided by 2^k, in place    carried out by the holder, exactly
    any other change in place            WaterfillError, since a decoded copy would take it and be dropped

While the model is being loaded the values are not there: they read as NaN, and changes are left undone, since whatever
initialises a weight now is overruled by the artifact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol, cast

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from waterfill.base.errors import WaterfillError

_aten = torch.ops.aten
_MATMULS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm)
_BY_ELEMENT = (torch.Tensor.apply_, torch.Tensor.map_, torch.Tensor.map2_)  # these go to the memory at once
_BATCHED = (torch.bmm, torch.Tensor.bmm)
_OF_MERGES = ("changed in place by aten.add_.Tensor", "given another 'data'")  # what PEFT does to a weight
_SCALINGS = {_aten.mul_.Tensor: 1, _aten.mul_.Scalar: 1, _aten.div_.Tensor: -1, _aten.div_.Scalar: -1}


class Holder(Protocol):
    """Who holds the weight that a stand-in stands for."""

    @property
    def loading(self) -> bool:
        """Whether its values are not there yet."""

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T: `[..., in]` -> `[..., out]`, of the dtype of x; of a matrix only."""

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 `[...]` -> float32 `[..., in]`; of a matrix only."""

    def dense(self) -> torch.Tensor:
        """The weight itself, float32; a matrix as `[out, in]`."""

    def scale_by_power(self, power: int) -> None:
        """Multiply the weight by 2^power from now on."""


class Experts(Holder, Protocol):
    """Who holds the weights of several experts."""

    def multiply_each(self, x: torch.Tensor) -> torch.Tensor:
        """One product per expert: `[expert, tokens, in]` -> `[expert, tokens, out]`, of the dtype of x."""


class StandIn(torch.Tensor):
    """Stands for a weight, or for its transpose, or for a view of it once it is decoded."""

    _is_hf_initialized = True  # transformers' functions that initialise a weight leave it alone
    _holder: Holder
    _transposed: bool  # against what the holder computes with
    _view: torch.Tensor | None  # of the decoded weight

    @staticmethod
    def __new__(
        cls: type[StandIn],
        holder: Holder,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        strides: Sequence[int] | None = None,
        transposed: bool = False,
        view: torch.Tensor | None = None,
    ) -> StandIn:
        with torch.inference_mode(False):  # it may outlive the mode, and be viewed in it
            made: StandIn = torch.Tensor._make_wrapper_subclass(
                cls, tuple(shape), strides=strides, dtype=dtype, device=device
            )
        made._holder, made._transposed, made._view = holder, transposed, view
        return made

    def decode(self) -> torch.Tensor:
        """A tensor of the weight's values; of a view, the one that other views of it share."""
        if self._view is not None:
            return self._view
        if self._holder.loading:
            return torch.full((), math.nan, dtype=self.dtype, device=self.device).expand(self.shape)
        weight = self._holder.dense().to(self.dtype)
        weight = weight.mT if self._transposed else weight
        return weight.contiguous() if self.is_contiguous() else weight

    def stands_for(self, holder: Holder) -> bool:
        """Whether it is the whole weight of that holder."""
        return self._holder is holder and self._view is None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (product := _product(func, args, kwargs)) is not None:
            return product
        if func in _BY_ELEMENT:
            _refuse(next(x for x in args if isinstance(x, cls)), f"given to {func.__name__}")
        if getattr(func, "__name__", "") == "__set__" or func is torch.Tensor.requires_grad_:
            return _set(func, *args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if (pieces := func.decompose(*args, **kwargs)) is not NotImplemented:  # in inference mode nobody has, yet
            return pieces
        if (changed := _changed(func, args, kwargs)) is not None:
            return changed._change(func, args)
        if (answer := _unread(func, args)) is not None:
            return answer
        held: dict[int | None, Holder] = {}

        def decode(weight: StandIn) -> torch.Tensor:
            tensor = weight.decode()
            held[_memory(tensor)] = weight._holder
            return tensor

        def stand_in(x: torch.Tensor) -> torch.Tensor:
            holder = held.get(_memory(x))
            return x if holder is None else StandIn(holder, x.shape, x.dtype, x.device, strides=x.stride(), view=x)

        result = func(*tree_map_only(cls, decode, args), **tree_map_only(cls, decode, kwargs))
        return tree_map_only(torch.Tensor, stand_in, result)

    def _change(self, func: Any, args: Any) -> StandIn:
        if self._holder.loading:
            return self
        power = _power(args[1]) if func in _SCALINGS and args[0] is self else None
        if power is None or self._view is not None:
            _refuse(self, f"changed in place by {func}")
        self._holder.scale_by_power(_SCALINGS[func] * power)
        return self

    # ------------------------------------------------------- what torch reads from memory, past both ways above

    def numpy(self, *, force: bool = False) -> Any:
        """The decoded weight; the array cannot be written to, which would change no weight."""
        array = self.decode().numpy(force=force)
        array.flags.writeable = False
        return array

    def tolist(self) -> Any:
        return self.decode().tolist()

    def data_ptr(self) -> NoReturn:
        _refuse(self, "read through a pointer")

    def untyped_storage(self) -> NoReturn:
        """Torch would hand out memory that is not there."""
        _refuse(self, "read or shared as memory")

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self.decode().__dlpack__(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        memo[id(self)] = copied = self.decode().clone()
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.decode().clone().__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype})"


class Traced:
    """What `torch.compile` sees of a matrix in a stand-in's place, whose making it cannot trace."""

    _view = None
    ndim = 2

    def __init__(
        self, holder: Holder, shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, transposed: bool
    ) -> None:
        self.shape, self.dtype, self.device = torch.Size(shape), dtype, device
        self._holder, self._transposed = holder, transposed

    def decode(self) -> torch.Tensor:
        """As `StandIn.decode`."""
        rows = self.shape[1 if self._transposed else 0]
        weight = self._holder.rows(torch.arange(rows, device=self.device)).to(self.dtype)
        return weight.mT if self._transposed else weight

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decode(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (product := _product(func, args, kwargs)) is not None:
            return product
        return func(*(_decoded(x) for x in args), **{name: _decoded(x) for name, x in kwargs.items()})


_STAND_INS = (StandIn, Traced)


def _decoded(x: Any) -> Any:
    return x.decode() if isinstance(x, Traced) else x


def _product(func: Any, args: Any, kwargs: Any) -> torch.Tensor | None:
    """x W^T from the codes, where `func` computes that."""
    if func is nn.functional.linear:
        return _linear(*args, **{"x" if name == "input" else name: value for name, value in kwargs.items()})
    if func in _MATMULS and len(args) == 2:
        return _from_codes(*args, transposed=True)
    if func in _BATCHED and len(args) == 2:
        return _each_from_codes(*args)
    return None


def _linear(x: Any, weight: Any, bias: Any = None) -> torch.Tensor | None:
    y = _from_codes(x, weight, transposed=False)
    return y if y is None or bias is None else y + bias


def _from_codes(x: Any, weight: Any, *, transposed: bool) -> torch.Tensor | None:
    if not isinstance(weight, _STAND_INS) or isinstance(x, _STAND_INS) or weight._transposed != transposed:
        return None
    if weight._view is not None or weight.ndim != 2 or weight._holder.loading:
        return None
    return weight._holder.multiply(x)


def _each_from_codes(x: Any, weights: Any) -> torch.Tensor | None:
    """x W for every expert, of experts that are `[in, out]` to the model."""
    if not isinstance(weights, StandIn) or isinstance(x, StandIn) or weights.ndim != 3 or not weights._transposed:
        return None
    if weights._view is not None or weights._holder.loading:
        return None
    return cast(Experts, weights._holder).multiply_each(x)


def _changed(func: Any, args: Any, kwargs: Any) -> StandIn | None:
    """The stand-in that `func` writes to."""
    parameters = func._schema.arguments
    arguments = dict(zip((parameter.name for parameter in parameters), args, strict=False)) | kwargs
    written = [p.name for p in parameters if p.alias_info is not None and p.alias_info.is_write]
    return next((x for name in written for x in tree_leaves(arguments.get(name)) if isinstance(x, StandIn)), None)


def _unread(func: Any, args: Any) -> torch.Tensor | None:
    """What can be had of a whole weight without decoding all of it."""
    weight = args[0] if args else None
    if not isinstance(weight, StandIn) or weight._view is not None:
        return None
    transposed = weight.ndim == 2 and _transposes(func, *args[1:])
    if func in (_aten.detach.default, _aten.alias.default) or transposed:
        order = -1 if transposed else 1
        return StandIn(
            weight._holder,
            weight.shape[::order],
            weight.dtype,
            weight.device,
            strides=weight.stride()[::order],
            transposed=weight._transposed != transposed,
        )
    if func is _aten.embedding.default and not weight._transposed and not weight._holder.loading:
        return weight._holder.rows(args[1]).to(weight.dtype)
    return None


def _transposes(func: Any, *axes: Any) -> bool:
    """Whether `func` exchanges the two axes of a matrix."""
    if func is _aten.permute.default:
        return [axis % 2 for axis in axes[0]] == [1, 0]
    return func is _aten.t.default or (func is _aten.transpose.int and axes[0] % 2 != axes[1] % 2)


def _set(func: Any, weight: StandIn, value: Any = True) -> StandIn:
    """`weight.name = value`, or `requires_grad_`: nobody would ever read it again from this object."""
    name = getattr(getattr(func, "__self__", None), "__name__", "requires_grad")
    if value is not None and value is not False and not weight._holder.loading:
        _refuse(weight, f"given another {name!r}")
    return weight


def _power(factor: Any) -> int | None:
    """k, where `factor` is 2^k."""
    if isinstance(factor, torch.Tensor):
        factor = factor.item() if factor.numel() == 1 else 0
    mantissa, exponent = math.frexp(factor)
    return exponent - 1 if mantissa == 0.5 else None


def _memory(tensor: torch.Tensor) -> int | None:
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else None


def _refuse(weight: StandIn, what: str) -> NoReturn:
    if what in _OF_MERGES:
        raise WaterfillError(
            f"a packed weight {list(weight.shape)} cannot be added to in place, as merging an adapter does, since sums "
            "have no codes: leave the adapter beside the packed model, merge it into the original and pack that, or "
            "take a copy, weight.clone()"
        )
    raise WaterfillError(
        f"a packed weight {list(weight.shape)} cannot be {what}: in place it can be multiplied or divided by powers of "
        "two; for anything else take a copy, weight.clone(), or change the original model and pack it again"
    )
