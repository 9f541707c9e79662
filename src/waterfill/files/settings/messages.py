"""Conversations: messages, what they may hold, and how they are written where a model has no template for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from waterfill.base.errors import WaterfillError, first_line

Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


def check_text(text: str) -> None:
    """Refuse surrogates, which Python makes of bytes in a terminal or pipe that are not UTF-8: tokenizers know none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise WaterfillError(
            f"the prompt is not valid UTF-8: its character {error.start + 1} is {text[error.start]!r}; "
            "write it in UTF-8"
        ) from error


def check_messages(messages: Sequence[Message]) -> None:
    """Refuse a conversation without messages, or with one that lacks a role or has no text."""
    if not messages or not all({"role", "content"} <= message.keys() for message in messages):
        raise WaterfillError("a conversation is one or more messages with 'role' and 'content'; give at least one")
    for message in messages:
        check_text(str(message["content"]))


def plain_lines(messages: Sequence[Message]) -> str:
    """A conversation as text, for models without a chat template, which continue it after the last "Assistant:"."""
    lines = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
    return "\n".join([*lines, "Assistant:"])


def refused(error: Exception) -> WaterfillError:
    """The error for a chat template that will not have a conversation."""
    return WaterfillError(f"the model's chat template refuses the conversation ({first_line(error)}); change it")
