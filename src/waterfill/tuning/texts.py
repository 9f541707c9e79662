"""A text as what a model is trained on: windows in an order drawn by a seed, and others that it never sees.

token ids ──► windows of `context` tokens ──► the last ones are held out ──► the others, in drawn order, by batches
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from waterfill.base.errors import WaterfillError
from waterfill.evaluation.conventions import Convention, Window

MOST_HELD = 16  # windows: enough to tell one state of a model from another


@dataclass(frozen=True)
class Lessons:
    """What training reads."""

    seen: tuple[Window, ...]  # all that may be trained on
    batches: tuple[tuple[Window, ...], ...]  # one per step
    held: tuple[Window, ...]
    how: Convention

    @property
    def windows(self) -> list[Window]:
        """All that are read, each once, in the order of the text."""
        every = {window.number: window for batch in (*self.batches, self.held) for window in batch}
        return [every[number] for number in sorted(every)]


def lessons(ids: Tensor, *, context: int, batch: int, steps: int, hold_out: float, seed: int) -> Lessons:
    """Cut token ids [tokens]: a share of the windows is held out, at least one and at most `MOST_HELD`; the others are
    read again in another order where there are fewer than the steps ask for.

    Raises:
        WaterfillError: the text is too short for one window of each.
    """
    how = Convention("gptq", context)
    cut = how.cut(ids)
    held = min(MOST_HELD, max(1, round(hold_out * len(cut))))
    if held >= len(cut):
        raise WaterfillError(
            f"the text holds {len(ids)} tokens, which is too little to train on and to hold some out in windows of "
            f"{context}; give a longer text, or a smaller --context"
        )
    seen, generator = cut[: len(cut) - held], torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps * batch:
        order += torch.randperm(len(seen), generator=generator).tolist()
    chosen = [seen[number] for number in order[: steps * batch]]
    batches = tuple(tuple(chosen[i : i + batch]) for i in range(0, len(chosen), batch))
    return Lessons(tuple(seen), batches, tuple(cut[len(cut) - held :]), how)
