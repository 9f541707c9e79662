"""The original model with little of it in memory: blocks are read from the checkpoint as they are run, and forgotten.

    forward    embedding: the rows that are looked up ──► block after block ──► head: some rows at a time ──► logits
    backward   the same the other way; a block's weights are read again, and what it computes is computed again where it
               was not kept (`recomputing`)

Gradients of weights are handed to whoever asked for them as they come,
block by block and row by row, so that no two blocks' are in memory at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from waterfill.base.errors import WaterfillError, first_line
from waterfill.files.architecture import read_kept
from waterfill.files.block_division import Block, Division, LookUp, Slot, Table, divide
from waterfill.files.checkpoint import Checkpoint, check_finite
from waterfill.files.head_product import HeadProduct
from waterfill.files.model_calls import read
from waterfill.files.original import load_original
from waterfill.files.recomputing import Kept, closed, recomputed
from waterfill.files.skeleton import ModelTensor, build_skeleton, locate

_log = logging.getLogger(__name__)

CHUNK_WEIGHTS = 1 << 24  # of the head, in memory at a time

Consume = Callable[[str, Tensor, Tensor, int], None]
"""Called with a parameter's state-dict name, some of its rows or all of it, their gradient, and 1; or -1 to take back
what was handed out of these rows before."""
Change = Callable[[str, Tensor, Tensor | None], Tensor]
"""Called with a parameter's state-dict name, its weights, and which rows they are where they are not all; returns what
is to be used in their place."""
ConsumeProduct = Callable[[str, Tensor, Tensor, Tensor, Tensor], None]
"""Called with a parameter's state-dict name, some of its rows `[rows, in]` or all of them, what was multiplied with
them `[tokens, in]`, the gradient of the product `[tokens, rows]`, and its part of that of the input `[tokens, in]`."""


class Watcher:
    """Who wants to know what becomes of weights; parameters go by their state-dict names."""

    def read(self, name: str, weight: Tensor, again: Callable[[], Tensor]) -> None:
        """A parameter is in memory, and about to be used; `again` gives it later, whoever has held it."""

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
        self._consume_product: ConsumeProduct | None = None
        self._kept = Kept(0)
        self._checked: set[str | tuple[str, int, int]] = set()  # to be finite: parameters, and rows of tables
        self._watcher: Watcher | None = None
        self._change: Change | None = None
        self._anchor = torch.zeros((), requires_grad=True)  # a block may have no other input to differentiate by
        self._on_trial = False
        self._passing: Callable[[Callable[..., Any], Any, Any], Any] | None = None
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
        weight = read_kept(self._checkpoint, tensor, checked=tensor.name in self._checked)
        self._checked.add(tensor.name)
        return weight.to(self._dtype)

    # -----------------------------------------------------------------------------------------------------------------
    # What is asked for

    @contextmanager
    def watched(self, watcher: Watcher) -> Iterator[None]:
        """Tell somebody what becomes of weights inside of the block."""
        self._watcher = watcher
        for name, parameter in self._outside.items():
            watcher.read(name, parameter, partial(itself, parameter))
        try:
            yield
        finally:
            self._watcher = None

    @contextmanager
    def gradients(
        self,
        wanted: Set[str],
        consume: Consume,
        *,
        consume_product: ConsumeProduct | None = None,
        kept_bytes: int = 0,
    ) -> Iterator[None]:
        """Hand the gradients of these parameters, of one backward pass inside of the block, to somebody.

        Those of weights that lie outside of blocks, or are used more than once, come at the end.

        Args:
            consume_product: told of the head's products instead, of the rows that no embedding looks up.
            kept_bytes: of what blocks compute that may be kept for the way back; the rest is computed again.
        """
        self._wanted, self._consume, self._consume_product = wanted, consume, consume_product
        self._kept = Kept(kept_bytes)
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
            self._wanted, self._consume, self._consume_product = frozenset(), None, None

    @contextmanager
    def changed(self, change: Change) -> Iterator[None]:
        """Compute with other weights inside of the block; nobody may ask for gradients there."""
        before = {name: parameter.data for name, parameter in self._outside.items()}
        self._change = change
        try:
            for name, parameter in self._outside.items():
                parameter.data = change(name, before[name], None)
            yield
        finally:
            self._change = None
            for name, parameter in self._outside.items():
                parameter.data = before[name]

    @contextmanager
    def passing(self, block: Callable[[Callable[..., Any], Any, Any], Any]) -> Iterator[None]:
        """Have somebody else call blocks inside of the block: given what to call, and its arguments."""
        self._passing = block
        try:
            yield
        finally:
            self._passing = None

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
        if self._passing is not None:
            return self._passing(once, args, kwargs)
        if self._on_trial:
            return closed(once, args, kwargs)
        if self._consume is None or not torch.is_grad_enabled():
            return once(*args, **kwargs)
        block.calls += 1
        if not self._kept.full:
            with self._kept.counting():
                return once(*args, **kwargs)
        return recomputed(once, args, kwargs, self._anchor)

    def _run_once(self, block: Block, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        weights = [self._leaf(block, slot.tensor) for slot in block.slots]
        before = [slot.fill(weight) for slot, weight in zip(block.slots, weights, strict=True)]
        try:
            self._tell_read(block.slots, weights)
            return forward(*args, **kwargs)
        finally:
            for slot, parameter in zip(block.slots, before, strict=True):
                slot.fill(parameter)
            self._tell_forgotten(block.slots, weights)

    def _tell_read(self, slots: list[Slot], weights: list[nn.Parameter]) -> None:
        if self._watcher is not None:
            for slot, weight in zip(slots, weights, strict=True):
                self._watcher.read(slot.tensor.name, weight, partial(self._read, slot.tensor))

    def _tell_forgotten(self, slots: list[Slot], weights: list[nn.Parameter]) -> None:
        if self._watcher is not None:
            for slot, weight in zip(slots, weights, strict=True):
                self._watcher.forgotten(slot.tensor.name, weight)

    def _leaf(self, block: Block, tensor: ModelTensor) -> nn.Parameter:
        values = self._read(tensor)
        if self._change is not None:
            values = self._change(tensor.name, values, None)
        weight = nn.Parameter(values, requires_grad=False)
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
        key = (table.source, rows.start, rows.stop) if isinstance(rows, slice) else None
        if key is None or key not in self._checked:
            check_finite(weight, table.source, self._checkpoint.tensors[table.source].file)
        if key is not None:
            self._checked.add(key)
        weight = weight.to(self._dtype)
        if self._change is None:
            return weight
        numbers = torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        return self._change(table.name, weight, numbers)

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
        product: Callable[..., Tensor] = HeadProduct.apply
        anchor = None if self._consume is None else self._anchor
        logits = product(x, self, table, self._asked(table.name), anchor)
        return logits if module.bias is None else logits + module.bias

    def chunks(self, table: Table) -> Iterator[tuple[slice, Tensor]]:
        """Rows of a table, and their weights `[rows, width]`."""
        height, width = table.shape
        step = max(1, CHUNK_WEIGHTS // width)
        for start in range(0, height, step):
            rows = slice(start, min(start + step, height))
            yield rows, self._rows(table, rows)

    def consume_rows(self, table: Table, rows: slice, weight: Tensor, x: Tensor, slope: Tensor, back: Tensor) -> None:
        """Of the head. Those that the embedding looked up are kept until its own gradient comes."""
        assert self._consume is not None
        looked_up = torch.arange(rows.start, rows.stop)
        if self._consume_product is not None:
            looked_up = table.looked_up(rows)
            here = looked_up - rows.start
            others = slope.index_fill(1, here, 0) if len(here) else slope
            self._consume_product(table.name, weight, x, others, back - slope[:, here] @ weight[here])
            weight, slope = weight[here], slope[:, here]
        gradient = slope.T @ x
        self._consume(table.name, weight, gradient, 1)
        for look_up in table.look_ups:
            look_up.add(looked_up, gradient)


def _unknown(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What stands for a table between calls: NaN, without memory. Code may ask for its device, and hide its values."""
    return torch.full((), torch.nan, dtype=dtype).expand(*shape)


def itself(weight: Tensor) -> Tensor:
    """What `Watcher.read` is given to get a weight again that stays in memory."""
    return weight


def _replace(module: nn.Module, forward: Callable[..., Any]) -> None:
    """What a module does when it is called; its hooks stay."""
    vars(module)["forward"] = forward
