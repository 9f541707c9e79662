"""How long work says how far it is: callbacks that whoever asks for the work gives, and nobody has to."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all)."""

Step = Callable[[int, int], None]
"""The same of one thing that is being done: (steps done, steps in all)."""


def step_of(progress: Progress | None, what: str) -> Step | None:
    """A callback that says what is being done, too; None where nobody listens."""
    return None if progress is None else lambda done, total: progress(what, done, total)
