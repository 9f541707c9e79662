"""The conventions that people quote perplexities in. Figures of different conventions or contexts do not compare.

gptq       non-overlapping windows, 2048 tokens unless told otherwise; every target of a window is scored
strided    a window every `stride` tokens; all of the first is scored, of the others what is new: every target once
llama.cpp  non-overlapping windows, 512 tokens; the second half is scored; where the vocabulary adds a BOS, it replaces
           the first token of each
decode     as gptq, but the model reads token by token through its key-value cache
exl3       a window every `stride` tokens, whole ones only; every target of each is scored, most of them several times:
           rows of exllamav3's charts (eval/compare_q.py), whose KL is of the first 10
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from waterfill.base.errors import WaterfillError
from waterfill.evaluation.text import windows

CONVENTIONS = ("gptq", "strided", "llama.cpp", "decode", "exl3")
STRIDED = ("strided", "exl3")
USUAL_CONTEXTS = {"llama.cpp": 512}
USUAL_CONTEXT = 2048
USUAL_STRIDE = 512


@dataclass(frozen=True)
class Window:
    """A piece of text that a model reads alone: it predicts ids[first + 1:] from all that comes before each."""

    number: int
    ids: Tensor  # int64 [tokens]
    first: int  # the first position whose prediction is scored

    @property
    def targets(self) -> Tensor:
        """int64 [tokens - 1 - first]."""
        return self.ids[self.first + 1 :]


@dataclass(frozen=True)
class Convention:
    """How a text is cut and what of it is scored."""

    name: str
    context: int  # tokens per window
    stride: int | None = None  # of `strided` and `exl3` only
    bos: int | None = None  # what replaces the first token of each window, in `llama.cpp` only

    @property
    def decodes(self) -> bool:
        """Whether the model reads token by token."""
        return self.name == "decode"

    def cut(self, ids: Tensor) -> list[Window]:
        """Windows of token ids [tokens].

        Raises:
            WaterfillError: there is no window or no target.
        """
        if self.name == "strided":
            return self._strides(ids)
        if self.name == "exl3":
            windows(ids, self.context)  # refuses what cannot be cut
            assert self.stride is not None
            return [Window(number, part, 0) for number, part in enumerate(ids.unfold(0, self.context, self.stride))]
        first = self.context // 2 if self.name == "llama.cpp" else 0
        if first >= self.context - 1:
            raise WaterfillError(f"a context of {self.context} tokens scores no target; choose at least 3")
        parts = windows(ids, self.context)
        if self.name == "llama.cpp" and self.bos is not None:
            parts = parts.clone()
            parts[:, 0] = self.bos
        return [Window(number, part, first) for number, part in enumerate(parts)]

    def first_windows(self, ids: Tensor, count: int) -> Tensor:
        """The tokens of the first `count` windows."""
        stride = self.stride or self.context
        return ids[: (count - 1) * stride + self.context] if len(ids) >= self.context else ids

    def _strides(self, ids: Tensor) -> list[Window]:
        assert self.stride is not None
        windows(ids, min(self.context, max(2, len(ids))))  # refuses what cannot be cut
        cut: list[Window] = []
        scored = 1
        for start in range(0, len(ids), self.stride):
            end = min(start + self.context, len(ids))
            cut.append(Window(len(cut), ids[start:end], scored - start - 1))
            scored = end
            if end == len(ids):
                break
        return cut


def convention(
    name: str = "gptq",
    limit: int | None = None,
    *,
    context: int | None = None,
    stride: int | None = None,
    bos: int | None = None,
) -> Convention:
    """The convention of a name, with its usual context, or `limit`, the model's number of positions, if that is less.

    `bos` is the token that the tokenizer begins texts with, if it does (`text.begin_token`); only `llama.cpp` asks.

    Raises:
        WaterfillError: an unknown name, or a stride that is impossible or not asked for.
    """
    if name not in CONVENTIONS:
        raise WaterfillError(f"{name!r} is no convention; choose one of {', '.join(CONVENTIONS)}")
    if context is None:
        usual = USUAL_CONTEXTS.get(name, USUAL_CONTEXT)
        context = min(usual, limit or usual)
    if name not in STRIDED:
        if stride is not None:
            raise WaterfillError(
                f"a stride of {stride} was given, but only the conventions {' and '.join(STRIDED)} have one; drop it"
            )
        return Convention(name, context, bos=bos if name == "llama.cpp" else None)
    if stride is None:
        stride = min(USUAL_STRIDE, max(1, context // 2))
    if not 1 <= stride < context:
        raise WaterfillError(f"a stride of {stride} tokens was asked for; choose at least 1, and less than the context")
    return Convention(name, context, stride)


def batches(cut: Sequence[Window], batch: int) -> Iterator[list[Window]]:
    """Windows in order, up to `batch` at a time, those together that have one length and one first position."""
    for _, alike in groupby(cut, key=lambda window: (len(window.ids), window.first)):
        group = list(alike)
        for start in range(0, len(group), batch):
            yield group[start : start + batch]


def stacked(some: Sequence[Window]) -> Tensor:
    """Token ids, int64 [windows, tokens], of windows of one length."""
    return torch.stack([window.ids for window in some])
