"""Keys and values of transformers' models that grow in place: its own cache copies all of them for every token.

A static cache of transformers' does not, but is read to its end for every token, however short the text, and has to be
masked. So the layers that concatenate are replaced, behind the first pass, by such as write into memory that is there.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer


def reserve(cache: Any, tokens: int) -> None:
    """Have the layers of a cache that concatenate grow in place, up to `tokens` of a text.

    Windows and states, whose size is bounded, and caches of a model's own class stay as they are.
    """
    if type(cache) is DynamicCache:
        cache.layers[:] = [_reserved(layer, tokens) for layer in cache.layers]


def _reserved(layer: Any, tokens: int) -> Any:
    return _Growing(layer, tokens) if type(layer) is DynamicLayer and layer.get_seq_length() else layer


class _Growing(DynamicLayer):  # type: ignore[misc]
    """`keys` and `values` are the beginnings, `[sequences, heads, tokens, head_dim]`, of memory for more."""

    def __init__(self, layer: DynamicLayer, tokens: int) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self._memory = [_memory_for(layer.keys, tokens), _memory_for(layer.values, tokens)]
        self.update(layer.keys, layer.values)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        before = self.get_seq_length()
        after = before + key_states.shape[-2]
        if after > self._memory[0].shape[-2]:
            states: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states)
            return states
        for memory, new in zip(self._memory, (key_states, value_states), strict=True):
            memory[..., before:after, :] = new
        self.keys, self.values = (memory[..., :after, :] for memory in self._memory)
        return self.keys, self.values


def _memory_for(states: torch.Tensor, tokens: int) -> torch.Tensor:
    return states.new_empty((*states.shape[:-2], tokens, states.shape[-1]))
