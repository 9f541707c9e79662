"""From a text file to windows of token ids.

file -> token_ids: the whole text, tokenised once -> windows [windows, context]: non-overlapping, the tail dropped
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from waterfill.base import reading
from waterfill.base.errors import WaterfillError
from waterfill.files.context import context_length
from waterfill.files.settings.tokenizing import in_words

USUAL_CONTEXT = 2048  # of the published WikiText-2 figures


def token_ids(tokenizer: Any, path: str | Path) -> Tensor:
    """Token ids, int64 [tokens], of a UTF-8 text file tokenised as one string with default special tokens.

    Raises:
        WaterfillError: the file cannot be read as text.
    """
    try:
        text = reading.read_text(Path(path), sys.maxsize)
    except (OSError, UnicodeDecodeError) as error:
        raise WaterfillError(f"{path} cannot be read as UTF-8 text ({error}); name a plain-text file") from error
    # verbose=False: the text is longer than the model's context on purpose, the tokenizer's warning would mislead.
    with in_words():
        return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def begin_token(tokenizer: Any) -> int | None:
    """The token that a tokenizer puts before every text by itself; None if it does not."""
    bos, ids = tokenizer.bos_token_id, tokenizer("a", verbose=False)["input_ids"]
    return int(bos) if bos is not None and ids and ids[0] == bos else None


def default_context(model: Any) -> int:
    """Tokens per window when none are asked for: 2048, or the model's context if that is less, and stated."""
    return min(USUAL_CONTEXT, context_length(model.config) or USUAL_CONTEXT)


def windows(ids: Tensor, context: int) -> Tensor:
    """Cut token ids [tokens] into non-overlapping windows [windows, context], dropping the tail.

    Raises:
        WaterfillError: the text is shorter than one window, or the context scores no target.
    """
    if ids.ndim != 1:
        raise WaterfillError(f"token ids have shape {list(ids.shape)}, expected [tokens]; pass the ids of one text")
    if context < 2:
        raise WaterfillError(f"a context of {context} tokens scores no target; choose at least 2")
    count = len(ids) // context
    if count == 0:
        raise WaterfillError(
            f"the text holds {len(ids)} tokens, less than one window of {context}; "
            "give a longer text or a shorter context"
        )
    return ids[: count * context].reshape(count, context)
