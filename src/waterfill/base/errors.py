"""The errors a user can meet. Each message is one sentence: what was given, what was expected, what to do."""

from __future__ import annotations

MOST_QUOTED = 400  # characters of another library's error


class WaterfillError(Exception):
    """Base of every error that waterfill raises on purpose; the command line prints it and exits with code 2."""


class CheckpointError(WaterfillError):
    """A checkpoint cannot be read, or holds something that cannot be packed."""


class ArtifactError(WaterfillError):
    """A packed model is torn, altered, hostile or of an unknown version."""


class BudgetError(WaterfillError):
    """A byte, bit or loss budget that no plan can meet; where known, with the sizes that plans can have."""

    def __init__(self, message: str, smallest_bytes: int | None = None, largest_bytes: int | None = None) -> None:
        super().__init__(message)
        self.smallest_bytes = smallest_bytes
        self.largest_bytes = largest_bytes


def first_line(error: BaseException) -> str:
    """What another library's error says, short enough to be quoted in a sentence."""
    line = str(error).strip().partition("\n")[0] or type(error).__name__
    return line if len(line) <= MOST_QUOTED else f"{line[:MOST_QUOTED]}…"


def unknown_token(where: str, token: int, known: int) -> WaterfillError:
    """The error for a text with a token that the model has no embedding for."""
    return WaterfillError(
        f"{where} holds token {token}, but the model knows {known} tokens; use the model's own tokenizer"
    )


class MemoryLimitError(WaterfillError):
    """A model cannot be run in the memory that it was given; `smallest_bytes` would do."""

    def __init__(self, message: str, *, smallest_bytes: int) -> None:
        super().__init__(message)
        self.smallest_bytes = smallest_bytes


class UnsupportedError(WaterfillError):
    """The engine does not do what a model's files ask for, and transformers may; the message says what that is."""
