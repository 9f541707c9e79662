"""Functions of a pass whose values are computed again when gradients come back, and how much of others autograd keeps.

closed          call it, and fail where it changes what it is given
recomputed      call it without keeping what it computes (Chen et al. 2016, arXiv 1604.06174)
Kept            counts what is kept
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from transformers import Cache

_TENSOR = object()  # stands for one


class Kept:
    """Bytes of what autograd keeps for the way back, of the calls that are counted."""

    def __init__(self, most_bytes: int) -> None:
        self._most, self._bytes = most_bytes, 0
        self._seen: set[int] = set()

    @property
    def full(self) -> bool:
        """Whether no more should be."""
        return self._bytes >= self._most

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is kept of the calls inside of the block."""
        with saved_tensors_hooks(self._count, lambda tensor: tensor):
            yield

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if (place := storage.data_ptr()) not in self._seen:
            self._seen.add(place)
            self._bytes += storage.nbytes()
        return tensor


def closed(forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call it with copies of what it could leave something in for others, and fail where it changes anything else."""
    values, structure = tree_flatten((args, kwargs))
    versions = [value._version if isinstance(value, Tensor) else 0 for value in values]
    args, kwargs = given = tree_unflatten(list(map(_own, values)), structure)
    result = forward(*args, **kwargs)
    after = [value._version if isinstance(value, Tensor) else 0 for value in tree_leaves(given)]
    if after != versions:
        raise RuntimeError("a block changes what it is given")
    return result


def _own(value: Any) -> Any:
    """What a block may leave keys and values in: nobody else takes them from there."""
    return deepcopy(value) if isinstance(value, Cache) else copy(value) if isinstance(value, UserDict) else value


def recomputed(forward: Callable[..., Any], args: Any, kwargs: Any, anchor: Tensor) -> Any:
    """Call it without keeping what it computes; that is done again when gradients come back."""
    values, structure = tree_flatten((args, kwargs))
    places = [i for i, value in enumerate(values) if isinstance(value, Tensor) and value.requires_grad]
    inputs = [values[place] for place in places]
    for place in places:
        values[place] = None  # its graph would be held, too

    def again(given: Sequence[Tensor]) -> Any:
        whole = list(map(_own, values))
        for place, value in zip(places, given, strict=True):
            whole[place] = value
        args, kwargs = tree_unflatten(whole, structure)
        return forward(*args, **kwargs)

    shape: list[Any] = []
    compute: Callable[..., tuple[Tensor, ...]] = _Recomputed.apply
    tensors = iter(compute(again, shape, anchor, *inputs))
    others, of_outputs = shape
    return tree_unflatten([next(tensors) if value is _TENSOR else value for value in others], of_outputs)


class _Recomputed(torch.autograd.Function):
    """Tensors that a function puts out; the rest is added to a list, leaves and their tree."""

    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Any], rest: list[Any], anchor: Tensor, *given: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.function = function
        ctx.save_for_backward(*given)
        leaves, structure = tree_flatten(function(given))
        rest += [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure
        return _tensors(leaves)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        given = [value.detach().requires_grad_(value.requires_grad) for value in ctx.saved_tensors]
        with torch.enable_grad():
            results = _tensors(tree_leaves(ctx.function(given)))
        pairs = [(value, slope) for value, slope in zip(results, gradients, strict=True) if value.requires_grad]
        if pairs:
            torch.autograd.backward([value for value, _ in pairs], [slope for _, slope in pairs])
        return None, None, None, *(value.grad for value in given)


def _tensors(leaves: Sequence[Any]) -> tuple[Tensor, ...]:
    return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
