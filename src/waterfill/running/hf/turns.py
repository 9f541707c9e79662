"""Texts that are generated at the same time with one transformers model: they take turns, token by token.

    thread 1 ──► token ──┐      ┌──► token ──┐
    thread 2             └──► token          └──► …

A pass of a model has memory and an order of weights to itself, and torch's global generators, which are all that
transformers samples from, serve one text with its own seed at a time.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import StoppingCriteria


class Turns:
    """A lock that whoever has waited longest is handed."""

    def __init__(self) -> None:
        self._mutex, self._taken = threading.Lock(), False
        self._waiting: deque[threading.Lock] = deque()

    def take(self) -> None:
        """Wait for a turn."""
        with self._mutex:
            if not self._taken:
                self._taken = True
                return
            mine = threading.Lock()
            mine.acquire()
            self._waiting.append(mine)
        mine.acquire()

    def end(self) -> None:
        """The next one's turn."""
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False

    @property
    def awaited(self) -> bool:
        """Whether somebody waits."""
        return bool(self._waiting)


_models: WeakKeyDictionary[Any, Turns] = WeakKeyDictionary()
_models_lock = threading.Lock()
_random = Turns()


class Turn(StoppingCriteria):  # type: ignore[misc]
    """One text's turns, in a `with` statement around transformers' loop; after each token another text has its own.

    Args:
        samples: whether tokens are sampled.
        seed: that they are sampled with; None draws on torch's random state as it is.
    """

    def __init__(self, model: Any, *, samples: bool, seed: int | None) -> None:
        with _models_lock:
            own = _models.setdefault(model, Turns())
        self._turns = (own, _random) if samples else (own,)
        self._seed = seed if samples else None
        self._cuda = model.device if model.device.type == "cuda" else None

    def __enter__(self) -> Turn:
        self._take()
        if self._seed is not None:
            self._theirs = self._state()
            torch.manual_seed(self._seed)
        return self

    def __exit__(self, *_: object) -> None:
        if self._seed is not None:
            self._restore(self._theirs)
        self._end()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """After each token."""
        if any(turns.awaited for turns in self._turns):
            own = None
            if self._seed is not None:
                own = self._state()
                self._restore(self._theirs)
            self._end()
            self._take()
            if own is not None:
                self._theirs = self._state()
                self._restore(own)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def _take(self) -> None:
        for turns in self._turns:  # in one order everywhere
            turns.take()

    def _end(self) -> None:
        for turns in reversed(self._turns):
            turns.end()

    def _state(self) -> Sequence[Tensor]:
        """Of torch's generators that this text uses."""
        return [torch.get_rng_state(), *([] if self._cuda is None else [torch.cuda.get_rng_state(self._cuda)])]

    def _restore(self, state: Sequence[Tensor]) -> None:
        torch.set_rng_state(state[0])
        if self._cuda is not None:
            torch.cuda.set_rng_state(state[1], self._cuda)
