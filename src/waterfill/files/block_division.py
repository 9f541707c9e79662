"""How a model is divided to be read part by part: blocks, tables of tokens, and what lies outside of them.

A block is an entry of a `ModuleList` that is not inside of another one: a decoder layer. A table is an embedding's
weight or the head's, or both at once, of which a text needs some rows, or needs them one after the other. Weights that
belong to several of these, and everything else, are outside: norms, gates, positions, layers that blocks share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from waterfill.files.skeleton import ModelTensor


@dataclass(frozen=True)
class Slot:
    """Where a module has a parameter, and where the checkpoint has it."""

    module: nn.Module
    attribute: str
    tensor: ModelTensor

    def fill(self, parameter: nn.Parameter) -> nn.Parameter:
        """Put another one there; returns the one before."""
        before = self.module._parameters[self.attribute]
        assert before is not None
        self.module._parameters[self.attribute] = parameter
        return before


@dataclass
class Block:
    """A module whose parameters are read as it is called. One that is called again in a pass sums its gradients."""

    slots: list[Slot] = field(default_factory=list)
    calls: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)  # by parameter


@dataclass
class LookUp:
    """Rows of a table that were looked up together, ascending, and what is known of their gradients already."""

    rows: Tensor
    known: Tensor  # [rows, width]

    def add(self, rows: Tensor, gradient: Tensor) -> None:
        """Of these rows, ascending, as far as they are among its own."""
        if not len(rows):
            return
        places = torch.searchsorted(rows, self.rows).clamp_max(len(rows) - 1)
        same = rows[places] == self.rows
        self.known[same] += gradient[places[same]].to(self.known.dtype)


@dataclass
class Table:
    """Rows of tokens `[vocabulary, width]`, one checkpoint tensor."""

    name: str  # of the parameter
    source: str  # of the checkpoint
    shape: tuple[int, ...]
    slots: list[Slot]
    is_head: bool
    look_ups: list[LookUp] = field(default_factory=list)  # of a pass

    def looked_up(self, rows: slice) -> Tensor:
        """Those of these rows that are, ascending."""
        every = torch.cat([look_up.rows for look_up in self.look_ups] or [torch.empty(0, dtype=torch.int64)]).unique()
        some: Tensor = every[(every >= rows.start) & (every < rows.stop)]
        return some

    def slot_of(self, module: nn.Module) -> Slot:
        """Where an embedding has it."""
        return next(slot for slot in self.slots if slot.module is module)


class Head(NamedTuple):
    """The module that makes logits."""

    module: nn.Linear
    table: Table


@dataclass(frozen=True)
class Division:
    """All parameters of a model, each in one place."""

    blocks: Mapping[nn.Module, Block]
    embeddings: Mapping[nn.Embedding, Table]
    head: Head | None
    outside: tuple[Slot, ...]

    @property
    def tables(self) -> Iterator[Table]:
        """Each once."""
        yield from self.embeddings.values()
        if self.head is not None:
            yield self.head.table


def divide(model: Any, tensors: Mapping[int, ModelTensor]) -> Division:
    """Divide a model, whose parameters the checkpoint has as these tensors, by `id`."""
    blocks = {block: Block() for block in _outermost_entries(model)}
    owners: dict[int, list[nn.Module]] = {}
    for block in blocks:
        for module in block.modules():
            owners.setdefault(id(module), []).append(block)
    head = model.get_output_embeddings()
    embeddings: dict[nn.Embedding, Table] = {}
    outside: list[Slot] = []
    head_table: Table | None = None
    for slots in _slots(model, tensors):
        inside = [owners.get(id(slot.module), [slot.module]) for slot in slots]
        places = {id(owner) for owner_list in inside for owner in owner_list}
        if len(places) == 1 and inside[0][0] in blocks:
            blocks[inside[0][0]].slots.extend(slots)
        elif (table := _table(slots, head)) is not None and not any(id(slot.module) in owners for slot in slots):
            embeddings |= {slot.module: table for slot in slots if isinstance(slot.module, nn.Embedding)}
            head_table = table if table.is_head else head_table
        else:
            outside.extend(slots)
    blocks = {module: block for module, block in blocks.items() if block.slots}
    return Division(blocks, embeddings, None if head_table is None else Head(head, head_table), tuple(outside))


def _outermost_entries(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _outermost_entries(child)


def _slots(model: nn.Module, tensors: Mapping[int, ModelTensor]) -> Iterator[list[Slot]]:
    """All places of each parameter."""
    places: dict[int, list[Slot]] = {}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append(Slot(module, attribute, tensors[id(parameter)]))
    yield from places.values()


def _table(slots: list[Slot], head: nn.Module | None) -> Table | None:
    """The table that a parameter is, if it is used as nothing else."""
    tensor, modules = slots[0].tensor, [slot.module for slot in slots]
    if len(tensor.sources) != 1 or len(tensor.sources[0]) != 1 or not tensor.sources[0][0].whole:
        return None
    is_head = any(module is head for module in modules)
    if any(slot.attribute != "weight" for slot in slots) or (is_head and type(head) is not nn.Linear):
        return None
    if not all(module is head or _looks_up(module) for module in modules):
        return None
    return Table(tensor.name, tensor.sources[0][0].source, tensor.shape, slots, is_head)


def _looks_up(module: nn.Module) -> bool:
    """Whether it is called with tokens alone: others find their rows themselves, such as those of positions."""
    return isinstance(module, nn.Embedding) and len(signature(module.forward).parameters) == 1
