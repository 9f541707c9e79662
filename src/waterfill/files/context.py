"""How long a text a model takes: the one reading of that from a transformers configuration."""

from __future__ import annotations

from typing import Any

NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")  # the usual one first


def context_length(config: Any) -> int | None:
    """Tokens that a model takes at most; None where its configuration states no number of them.

    Of a model of several kinds of input it is the text model's. What stands for None is each caller's to say: a probe
    and a generation know no end then, a window of a measure has the usual length.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in NAMES:
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
