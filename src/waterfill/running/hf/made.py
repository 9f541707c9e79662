"""Classes that are made while a model is loaded, one per class of the model's own, and that pickle finds again.

Pickle stores a class by its name. A made one has none that another process knows, so it is stored as the call that
makes it.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from typing import Any


class Made(type):
    """Class of made classes."""

    recipe: tuple[Callable[..., Any], tuple[Any, ...]]


def make(name: str, bases: tuple[type, ...], maker: Callable[..., Any], *args: Any) -> Any:
    """A class of that name; `maker(*args)`, with a function of some module, has to give the same one at each call."""
    made = Made(name, bases, {})
    made.recipe = maker, args
    return made


copyreg.pickle(Made, lambda made: made.recipe)
