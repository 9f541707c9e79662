"""The original model with little of it in memory: blocks are read from the checkpoint as they are run, and forgotten.

    forward    embedding: the rows that are looked up ──► block after block ──► head: some rows at a time ──► logits
    backward   the same the other way; a block is read and computed again (Chen et al. 2016, arXiv 1604.06174)

What is kept meanwhile is a block's inputs. Gradients of weights are handed to whoever asked for them as they come,
block by block and row by row, so that no two blocks' are in memory at once.
"""

from __future__ import annotations

import logging
from collections import UserDict
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from copy import copy, deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from transformers import Cache

from waterfill.base.errors import WaterfillError, first_line
from waterfill.files.architecture import read_kept
from waterfill.files.block_division import Block, Division, LookUp, Slot, Table, divide
from waterfill.files.checkpoint import Checkpoint, check_finite
from waterfill.files.model_calls import read
from waterfill.files.original import load_original
from waterfill.files.skeleton import ModelTensor, build_skeleton, locate

_log = logging.getLogger(__name__)

CHUNK_WEIGHTS = 1 << 24  # of the head, in memory at a time
_TENSOR = object()  # stands for one

Consume = Callable[[str, Tensor, Tensor, int], None]
"""Called with a parameter's state-dict name, some of its rows or all of it, their gradient, and 1; or -1 to take back
what was handed out of these rows before."""


class Watcher:
    """Who wants to know what becomes of weights; parameters go by their state-dict names."""

    def read(self, name: str, weight: Tensor) -> None:
        """A parameter is in memory, and about to be used."""

    def forgotten(self, name: str, weight: Tensor) -> None:
        """It is not any more."""

    def multiplied(self, name: str, tokens: int) -> None:
        """A parameter was multiplied with so many tokens, or looked up for them, row by row, without being `read`."""


def load_blockwise(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The transformers model of a checkpoint, computing in `dtype`, whose weights are read as they are needed.

    `model.blockwise` gives its gradients. Where a model's code reaches past its own blocks, all of it is loaded, a line
    says so, and `model.blockwise` is None.

    Raises:
        CheckpointError: a tensor is absent, or holds NaN or Inf.
    """
    try:
        model = build_skeleton(checkpoint, dtype).eval().requires_grad_(False)
        model.blockwise = Blockwise(model, checkpoint, dtype)
        with torch.no_grad(), model.blockwise.trial():
            logits = read(model, torch.zeros(1, 2, dtype=torch.int64))
        if not bool(logits.isfinite().all()):
            raise RuntimeError("logits are not finite")
    except WaterfillError:
        raise
    except Exception as error:  # code that takes weights from where they are not
        _log.warning("%s is loaded as a whole: it does not run block by block (%s)", checkpoint.path, first_line(error))
        model = load_original(checkpoint, dtype)
        model.blockwise = None
    return model


class Blockwise:
    """Reads the weights of one model, and hands out their gradients."""

    def __init__(self, model: Any, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._checkpoint, self._dtype = checkpoint, dtype
        self._wanted: Set[str] = frozenset()
        self._consume: Consume | None = None
        self._watcher: Watcher | None = None
        self._anchor = torch.zeros((), requires_grad=True)  # a block may have no other input to differentiate by
        self._on_trial = False
        self._parts = self._divided(model)
        self._hold_outside()
        for module, block in self._parts.blocks.items():
            _replace(module, partial(self._run, block, module.forward))
        for embedding, table in self._parts.embeddings.items():
            _replace(embedding, partial(self._look_up, embedding, table, embedding.forward))
        if (head := self._parts.head) is not None:
            _replace(head.module, partial(self._multiply, head.module, head.table))
        for table in self._parts.tables:
            placeholder = nn.Parameter(_unknown(table.shape, dtype), requires_grad=False)
            for slot in table.slots:
                slot.fill(placeholder)

    def _divided(self, model: Any) -> Division:
        state = model.state_dict(keep_vars=True)
        tensors = {id(state[tensor.name]): tensor for tensor in locate(model, self._checkpoint)[0]}
        for name, buffer in state.items():
            if not isinstance(buffer, nn.Parameter) and id(buffer) in tensors:
                state[name].copy_(read_kept(self._checkpoint, tensors[id(buffer)]))
        return divide(model, tensors)

    def _hold_outside(self) -> None:
        self._outside: dict[str, nn.Parameter] = {}
        for slot in self._parts.outside:
            if slot.tensor.name not in self._outside:
                self._outside[slot.tensor.name] = nn.Parameter(self._read(slot.tensor), requires_grad=False)
            slot.fill(self._outside[slot.tensor.name])

    def _read(self, tensor: ModelTensor) -> Tensor:
        return read_kept(self._checkpoint, tensor).to(self._dtype)

    # -----------------------------------------------------------------------------------------------------------------
    # What is asked for

    @contextmanager
    def watched(self, watcher: Watcher) -> Iterator[None]:
        """Tell somebody what becomes of weights inside of the block."""
        self._watcher = watcher
        for name, parameter in self._outside.items():
            watcher.read(name, parameter)
        try:
            yield
        finally:
            self._watcher = None

    @contextmanager
    def gradients(self, wanted: Set[str], consume: Consume) -> Iterator[None]:
        """Hand the gradients of these parameters, of one backward pass inside of the block, to somebody.

        Those of weights that lie outside of blocks, or are used more than once, come at the end.
        """
        self._wanted, self._consume = wanted, consume
        held = [parameter for name, parameter in self._outside.items() if name in wanted]
        for parameter in held:
            parameter.requires_grad_()
        self._forget()
        try:
            yield
            self._hand_out_sums()
        finally:
            for parameter in held:
                parameter.requires_grad_(False).grad = None
            self._forget()
            self._wanted, self._consume = frozenset(), None

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Fail, inside of the block, where blocks hand each other more than what they return: it has no gradients."""
        self._on_trial = True
        try:
            yield
        finally:
            self._on_trial = False

    def _hand_out_sums(self) -> None:
        assert self._consume is not None
        for name, parameter in self._outside.items():
            if parameter.grad is not None:
                self._consume(name, parameter.detach(), parameter.grad, 1)
        for block in self._parts.blocks.values():
            for slot in block.slots:
                if (total := block.sums.pop(slot.tensor.name, None)) is not None:
                    self._consume(slot.tensor.name, self._read(slot.tensor), total, 1)

    def _forget(self) -> None:
        for block in self._parts.blocks.values():
            block.calls = 0
            block.sums.clear()
        for table in self._parts.tables:
            table.look_ups.clear()

    # -----------------------------------------------------------------------------------------------------------------
    # Blocks

    def _run(self, block: Block, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        once = partial(self._run_once, block, forward)
        if self._on_trial:
            return _closed(once, args, kwargs)
        if self._consume is None or not torch.is_grad_enabled():
            return once(*args, **kwargs)
        block.calls += 1
        return _recomputed(once, args, kwargs, self._anchor)

    def _run_once(self, block: Block, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        weights = [self._leaf(block, slot.tensor) for slot in block.slots]
        before = [slot.fill(weight) for slot, weight in zip(block.slots, weights, strict=True)]
        try:
            self._tell("read", block.slots, weights)
            return forward(*args, **kwargs)
        finally:
            for slot, parameter in zip(block.slots, before, strict=True):
                slot.fill(parameter)
            self._tell("forgotten", block.slots, weights)

    def _tell(self, what: str, slots: list[Slot], weights: list[nn.Parameter]) -> None:
        if self._watcher is not None:
            for slot, weight in zip(slots, weights, strict=True):
                getattr(self._watcher, what)(slot.tensor.name, weight)

    def _leaf(self, block: Block, tensor: ModelTensor) -> nn.Parameter:
        weight = nn.Parameter(self._read(tensor), requires_grad=False)
        if self._asked(tensor.name):
            weight.requires_grad_()
            weight.register_post_accumulate_grad_hook(partial(self._arrived, block, tensor.name))
        return weight

    def _asked(self, name: str) -> bool:
        return self._consume is not None and name in self._wanted and torch.is_grad_enabled()

    def _arrived(self, block: Block, name: str, weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        assert self._consume is not None
        if block.calls == 1:
            self._consume(name, weight.detach(), gradient, 1)
        elif name in block.sums:
            block.sums[name] += gradient
        else:
            block.sums[name] = gradient

    # -----------------------------------------------------------------------------------------------------------------
    # Tables of tokens: embeddings and the head

    def _look_up(self, module: nn.Embedding, table: Table, forward: Callable[..., Tensor], ids: Tensor) -> Tensor:
        """The module's own forward, of a table that has only the rows of these tokens."""
        rows, places = ids.unique(return_inverse=True)
        weight = nn.Parameter(self._rows(table, rows), requires_grad=False)
        if self._asked(table.name):
            weight.requires_grad_()
            look_up = LookUp(rows, torch.zeros(weight.shape))
            table.look_ups.append(look_up)
            weight.register_post_accumulate_grad_hook(partial(self._rows_arrived, table, look_up))
        if self._watcher is not None:
            self._watcher.multiplied(table.name, ids.numel())
        before, padding = table.slot_of(module).fill(weight), module.padding_idx
        module.padding_idx = None if padding is None else next(iter((rows == padding).nonzero()[:, 0].tolist()), None)
        try:
            return forward(places)
        finally:
            module.padding_idx = padding
            table.slot_of(module).fill(before)

    def _rows(self, table: Table, rows: Tensor | slice) -> Tensor:
        read = self._checkpoint.read
        weight = read(table.source, rows) if isinstance(rows, slice) else read(table.source)[rows]
        check_finite(weight, table.source, self._checkpoint.tensors[table.source].file)
        return weight.to(self._dtype)

    def _rows_arrived(self, table: Table, look_up: LookUp, weight: Tensor) -> None:
        """The gradient of a row is the sum of all that comes of it: what is known already is taken back."""
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        assert self._consume is not None
        if table.is_head or len(table.look_ups) > 1:
            self._consume(table.name, weight.detach(), look_up.known.to(gradient.dtype), -1)
        self._consume(table.name, weight.detach(), gradient + look_up.known, 1)
        for other in table.look_ups:
            if other is not look_up:
                other.add(look_up.rows, gradient)

    def _multiply(self, module: nn.Linear, table: Table, x: Tensor) -> Tensor:
        if self._watcher is not None:
            self._watcher.multiplied(table.name, x.numel() // x.shape[-1])
        product: Callable[..., Tensor] = _HeadProduct.apply
        logits = product(x, self, table, self._asked(table.name))
        return logits if module.bias is None else logits + module.bias

    def chunks(self, table: Table) -> Iterator[tuple[slice, Tensor]]:
        """Rows of a table, and their weights `[rows, width]`."""
        height, width = table.shape
        step = max(1, CHUNK_WEIGHTS // width)
        for start in range(0, height, step):
            rows = slice(start, min(start + step, height))
            yield rows, self._rows(table, rows)

    def consume_rows(self, table: Table, rows: slice, weight: Tensor, gradient: Tensor) -> None:
        """Of the head. Those that the embedding looked up are kept until its own gradient comes."""
        assert self._consume is not None
        self._consume(table.name, weight, gradient, 1)
        for look_up in table.look_ups:
            look_up.add(torch.arange(rows.start, rows.stop), gradient)


class _HeadProduct(torch.autograd.Function):
    """x `[..., in]` times the head, some of its rows at a time, both ways."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Blockwise, table: Table, wanted: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weights, ctx.table, ctx.wanted = weights, table, wanted
        logits = x.new_empty(*x.shape[:-1], table.shape[0])
        for rows, weight in weights.chunks(table):
            logits[..., rows] = nn.functional.linear(x, weight)
        return logits

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        flat, slope = x.flatten(0, -2), gradients[0].flatten(0, -2)
        total = torch.zeros_like(flat)
        for rows, weight in ctx.weights.chunks(ctx.table):
            total += slope[:, rows] @ weight
            if ctx.wanted:
                ctx.weights.consume_rows(ctx.table, rows, weight, slope[:, rows].T @ flat)
        return total.view_as(x), None, None, None


def _unknown(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What stands for a table between calls: NaN, without memory. Code may ask for its device, and hide its values."""
    return torch.full((), torch.nan, dtype=dtype).expand(*shape)


def _replace(module: nn.Module, forward: Callable[..., Any]) -> None:
    """What a module does when it is called; its hooks stay."""
    vars(module)["forward"] = forward


def _closed(forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
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


def _recomputed(forward: Callable[..., Any], args: Any, kwargs: Any, anchor: Tensor) -> Any:
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
