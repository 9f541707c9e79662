"""All methods that a comparison can name, in the order in which tables have them.

ggml, peers, gptq, slim, billm, anyprec, mixtures, rounding ──► METHODS ──► select("hqq-*")
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from waterfill.base.errors import WaterfillError
from waterfill.studies.comparison import anyprec, billm, ggml, gptq, mixtures, peers, rounding, slim
from waterfill.studies.comparison.base import Method

METHODS: tuple[Method, ...] = (
    *ggml.METHODS,
    *peers.METHODS,
    *gptq.METHODS,
    *slim.METHODS,
    *billm.METHODS,
    *anyprec.METHODS,
    *mixtures.METHODS,
    *rounding.METHODS,
)


def known() -> tuple[str, ...]:
    """The names of all methods."""
    return tuple(method.name for method in METHODS)


def select(patterns: Sequence[str] | None = None) -> tuple[Method, ...]:
    """Methods whose names match one of the patterns (all of them when there are none), each once, in their order.

    Raises:
        WaterfillError: a pattern that matches nothing.
    """
    wanted: Iterable[str] = patterns or ("*",)
    chosen = set()
    for pattern in wanted:
        matching = {name for name in known() if fnmatchcase(name, pattern)}
        if not matching:
            raise WaterfillError(f"no method matches {pattern!r}; there are {', '.join(known())}")
        chosen |= matching
    return tuple(method for method in METHODS if method.name in chosen)
