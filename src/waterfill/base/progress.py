"""How long work says how far it is: callbacks that whoever asks for the work gives, and nobody has to.

with stage(progress, "describing the model"):      # one step
    ...
with stage(progress, "planning", 7) as advance:    # seven
    advance()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all)."""

Step = Callable[[int, int], None]
"""The same of one thing that is being done: (steps done, steps in all)."""

# Stages that more than one verb has. Downloads are part of opening, and have bars of their own.
OPENING, DESCRIBING, LOADING = "opening the model", "describing the model", "loading the model"
READING, PLANNING = "reading the text", "planning"


def step_of(progress: Progress | None, what: str) -> Step | None:
    """A callback that says what is being done, too; None where nobody listens."""
    return None if progress is None else lambda done, total: progress(what, done, total)


@contextmanager
def stage(progress: Progress | None, what: str, total: int = 1) -> Iterator[Callable[[], None]]:
    """Says that a stage of `total` steps begins and, unless it fails, that it is over. Yields what is called when one
    of its steps is done, where there are several."""
    done = 0

    def tell(now: int) -> None:
        nonlocal done
        done = now
        if progress is not None:
            progress(what, done, total)

    tell(0)
    yield lambda: tell(min(done + 1, total))
    if done < total:
        tell(total)
