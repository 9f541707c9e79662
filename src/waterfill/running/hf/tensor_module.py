"""Modules in the place of parameters: what a tensor is made of is loaded by name, and only modules have names."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils._pytree import tree_map_only

from waterfill.running.hf.stand_in import StandIn


class TensorModule(nn.Module):
    """Model code that takes it for the tensor gets the stand-in. Only `==` is that of modules."""

    _is_hf_initialized = True

    def stand_in(self) -> StandIn:
        """For the whole tensor."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):
                raise
            return getattr(self.stand_in(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(TensorModule, lambda module: module.stand_in(), (args, kwargs or {}))
        return func(*args, **kwargs)


def _forward(name: str) -> None:
    """Give `TensorModule` an operator of tensors, which Python looks up in the class."""

    def apply(self: TensorModule, *args: Any) -> Any:
        result = getattr(self.stand_in(), name)(*args)
        return self if name in _IN_PLACE else result

    setattr(TensorModule, name, apply)


_BINARY = ("add", "sub", "mul", "truediv", "matmul", "pow")
_IN_PLACE = tuple(f"__i{name}__" for name in _BINARY if name != "matmul")
_OTHERS = ("getitem", "setitem", "len", "iter", "neg", "abs", "lt", "le", "gt", "ge", *(f"r{name}" for name in _BINARY))
for _name in (*(f"__{name}__" for name in (*_BINARY, *_OTHERS)), *_IN_PLACE):
    _forward(_name)
