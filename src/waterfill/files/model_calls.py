"""How transformers hands a cache of keys and values to its models, and these to their layers.

    version         the argument's name                   what old names do
    5.0  to 5.23    past_key_values, or cache_params
    5.24 to         cache                                 a model takes them until 5.40; a layer hears only the new one

Names are read off the model, not off the version: whoever took an old one keeps working, and one that is not known is
said, not passed over.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from waterfill.base.lazy import torch

CACHE_NAMES = ("cache", "past_key_values", "cache_params", "state")  # the newest first; the last one is RWKV's
LAYER_ARGUMENTS = CACHE_NAMES[:2]  # of decoder layers with keys and values


def handed_cache(arguments: Mapping[str, Any]) -> tuple[bool, Any]:
    """Whether a decoder layer was called with a cache by a known name; and the cache, None for no cache."""
    for name in LAYER_ARGUMENTS:
        if name in arguments:
            return True, arguments[name]
    return False, None


def read(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits `[sequences, tokens, vocabulary]` of token ids `[sequences, tokens]`, read in one pass without a cache."""
    options = {"use_cache": False} if "use_cache" in _parameters(type(model)) else {}
    logits: torch.Tensor = model(input_ids=ids, **options).logits
    return logits


def read_on(model: Any, ids: torch.Tensor, past: Any = None) -> tuple[torch.Tensor, Any]:
    """Logits of ids that come after those of earlier calls, and what the next call needs as `past`.

    A model that keeps no cache reads the whole text again every time.
    """
    name = cache_argument(type(model))
    if name is None or isinstance(past, torch.Tensor):
        text = ids if past is None else torch.cat([past, ids], dim=1)
        return read(model, text)[:, -ids.shape[1] :], text
    output = model(input_ids=ids, use_cache=True, **{name: past})
    kept = getattr(output, name, None)
    return output.logits, ids if kept is None else kept


def output_cache(output: Mapping[str, Any]) -> Any:
    """The cache in what a model, or its `generate`, returns; None if there is none."""
    return next((output[name] for name in CACHE_NAMES if name in output), None)


def cache_argument(model_class: Any) -> str | None:
    """What a class's forward calls its cache; None if it takes none."""
    return next((name for name in CACHE_NAMES if name in _parameters(model_class)), None)


def _parameters(model_class: Any) -> Mapping[str, Any]:
    return inspect.signature(getattr(model_class, "forward", model_class.__call__)).parameters
