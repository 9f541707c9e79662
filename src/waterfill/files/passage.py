"""Texts on their way through a model that is read block by block: some blocks for all of them, then the next ones.

    part of the texts ──► (blocks before: passed over) ──► blocks first … stop ──► carried, for the next blocks
                                                     └──► what they multiply is seen by hooks

So a block's weights are read once for all texts, and what is recorded of a block is in memory with it alone. In between
only what the last block returned is held, of every part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from waterfill.files.model_calls import read

TRIAL_TOKENS = 8


class _Enough(Exception):  # noqa: N818  # ends a pass whose rest is not needed
    pass


class Passage:
    """Takes texts through the blocks of a model. Blocks are numbered by their calls.

    Args:
        model: from `load_blockwise`; one that is in memory as a whole (`blockwise` is None) is one block.
        parts: token ids, int64 `[sequences, length]` each, that are read together.
    """

    def __init__(self, model: Any, parts: Sequence[Tensor]) -> None:
        self._model, self._blockwise = model, model.blockwise
        self._parts = [parts[0][:1, :TRIAL_TOKENS], *parts]
        self._part, self._first, self._stop = 0, 0, 0
        self.call = 0  # blocks that were called so far in the pass under way
        self.blocks = 1 << 30  # in all
        self.trial()
        self.blocks = self.call
        self.restart()
        self._skips = self._may_skip()

    def __len__(self) -> int:
        """Parts of the texts."""
        return len(self._parts) - 1

    def trial(self) -> None:
        """A few tokens through all of it."""
        self._pass(0, 0, self.blocks + 1)

    def restart(self) -> None:
        """Back to the beginning."""
        self.reached = 0  # blocks that the texts have been through
        self._carried: list[Any] = [None] * len(self._parts)

    def advance(self, stop: int, step: Callable[[], None]) -> None:
        """Through the next blocks, those below number `stop`; where it is above `blocks`, to the end of the model.

        Args:
            step: called after every part.
        """
        for part in range(1, len(self._parts)):
            self._pass(part, self.reached if self._skips else 0, stop)
            step()
        self.reached = stop

    def end(self) -> NoReturn:
        """Leave out the rest of the model for the part that is under way; said by a hook that has seen all it wants."""
        raise _Enough

    @torch.no_grad()
    def _pass(self, part: int, first: int, stop: int) -> Tensor | None:
        """Logits where it came to the end."""
        self._part, self._first, self._stop, self.call = part, first, stop, 0
        logits = None
        with suppress(_Enough):
            if self._blockwise is None:
                logits = read(self._model, self._parts[part])
            else:
                with self._blockwise.passing(self._block):
                    logits = read(self._model, self._parts[part])
        self.call += self._blockwise is None
        return logits

    def _block(self, once: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        number = self.call
        if number < self._first:
            self.call += 1
            return self._carried[self._part]  # of the last of them: what others return goes nowhere else
        result = once(*args, **kwargs)
        self.call += 1
        if self.call == self._stop:
            self._carried[self._part] = result
            raise _Enough
        return result

    def _may_skip(self) -> bool:
        """Whether passing over blocks gives the same in the end: not where one hands on more than it returns."""
        if self._blockwise is None or self.blocks < 3:
            return False
        whole = self._pass(0, 0, self.blocks + 1)
        middle = self.blocks // 2
        self._pass(0, 0, middle)
        tokens = self._parts[0]
        self._parts[0] = tokens.flip(1)
        self._pass(0, 0, self.blocks + 1)  # what blocks leave elsewhere is now of another text
        self._parts[0] = tokens
        if not all(isinstance(leaf, Tensor | None | bool | int) for leaf in tree_leaves(self._carried[0])):
            return False
        with suppress(Exception):
            rest = self._pass(0, middle, self.blocks + 1)
            return whole is not None and rest is not None and torch.equal(whole, rest)
        return False
