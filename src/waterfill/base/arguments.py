"""What callers give, checked by name: an argument of a wrong type, range or choice is one sentence.

A name means one thing in the whole package, so `CHECKS` says it once. `@checked` looks at every argument of a function
before the function does anything; choices that only some functions know are given to it.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple, ParamSpec, TypeVar

from waterfill.base.errors import WaterfillError

P = ParamSpec("P")
R = TypeVar("R")

CacheBits = int | str | Sequence[int] | None  # of keys and values: `cache_bits`
CACHE_BITS = (16, 8, 5, 4, 3)
PLAIN_BITS = (16, 16)  # numbers as they are
MOST = 2**31 - 1  # of anything that is counted
MOST_SEED = 2**63 - 1


class Check(NamedTuple):
    """What a value has to be, in words and in code."""

    expected: str
    holds: Callable[[Any], bool]


def whole(least: int, most: int = MOST) -> Check:
    """An integer of a range, of Python's or numpy's; True and False are none."""
    return Check(f"a whole number from {least} to {most}", lambda value: _is_whole(value) and least <= value <= most)


def number(expected: str, holds: Callable[[float], bool]) -> Check:
    """A real number, for which `holds` is asked."""
    return Check(expected, lambda value: is_real(value) and holds(value))


def choice(*names: str) -> Check:
    """One of some words."""
    return Check(f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names)


def optional(check: Check) -> Check:
    """The same, or None."""
    return Check(check.expected, lambda value: value is None or check.holds(value))


def each(check: Check, of: str) -> Check:
    """A list or tuple; one text is none, though Python takes it for a sequence of letters."""

    def holds(values: Any) -> bool:
        return isinstance(values, Collection) and not isinstance(values, str | bytes) and all(map(check.holds, values))

    return Check(f"a list of {of}", holds)


def is_real(value: object) -> bool:
    """Whether it is a finite number that a float can hold; True and False are none."""
    try:
        return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
    except OverflowError:
        return False


def _is_whole(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral)


def cache_bits(kv: CacheBits) -> tuple[int, int]:
    """Bits of keys and of values: 4 and "4" are both, "5,4" and (5, 4) each; None is 16 of both, numbers as they are.

    Raises:
        ValueError: it is none of these.
    """
    parts: Sequence[Any] = kv.split(",") if isinstance(kv, str) else kv if isinstance(kv, list | tuple) else (kv,)
    bits = [16 if part is None else int(part) if isinstance(part, str) else part for part in parts]
    if not 1 <= len(bits) <= 2 or not all(_is_whole(each) and each in CACHE_BITS for each in bits):
        raise ValueError(f"{kv!r} is not of {CACHE_BITS}")
    return int(bits[0]), int(bits[-1])


def _is_cache_bits(value: Any) -> bool:
    try:
        cache_bits(value)
    except (TypeError, ValueError):
        return False
    return True


def _is_path(value: object) -> bool:
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    return isinstance(text, str) and text != "" and "\0" not in text


PATH = Check("a path", _is_path)
SIZE = Check("a number of bytes, or a text such as '2.5GB'", lambda value: isinstance(value, str) or is_real(value))
FLAG = Check("True or False", lambda value: isinstance(value, bool))
NAMES = each(Check("a text", lambda value: isinstance(value, str)), "texts")
POSITIVE = number("a number above 0", lambda value: value > 0)
SEED = whole(0, MOST_SEED)

CHECKS: Mapping[str, Check] = {
    **dict.fromkeys(("model", "out", "artifact", "output", "against", "original"), PATH),
    **dict.fromkeys(("text", "save", "calibration"), optional(PATH)),
    **dict.fromkeys(("size", "memory"), optional(SIZE)),
    **dict.fromkeys(("bits", "max_kl", "rate", "draft_rate"), optional(Check("a finite number", is_real))),
    **dict.fromkeys(("keep", "tie", "codecs", "methods", "prompts"), NAMES),
    **dict.fromkeys(
        ("lossless", "uniform", "overwrite", "verify", "cache", "match", "chat_template", "efficiency"),
        FLAG,
    ),
    **dict.fromkeys(("sequences", "batch", "max_windows", "stride", "limit", "max_new_tokens", "logits"), whole(1)),
    **dict.fromkeys(("length", "context", "new_tokens"), whole(2)),
    "streamed": optional(FLAG),
    "kv": Check("16, 8, 5, 4 or 3 bits, or two of these as in '5,4': of keys, of values", _is_cache_bits),
    "memory_form": choice("auto", "levels", "codes"),
    "prompt_tokens": whole(1),
    "shots": whole(0),
    "seed": SEED,
    "tasks": Check("names, with commas or in a list", lambda value: isinstance(value, str) or NAMES.holds(value)),
    "revision": optional(Check("a branch, tag or commit", lambda value: isinstance(value, str) and value != "")),
    "progress": Check("a function", lambda value: value is None or callable(value)),
}


def check(name: str, value: object, wanted: Check) -> None:
    """Refuse a value that is not what is wanted.

    Raises:
        WaterfillError: it is something else.
    """
    if not wanted.holds(value):
        raise WaterfillError(f"{name} is {_shown(value)}; choose {wanted.expected}")


def checked(options: type | None = None, **more: Check) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Have the arguments of a function checked, all but those that are the defaults themselves.

    Args:
        options: the TypedDict of the function's keyword arguments, where it takes them as one.
        more: checks that `CHECKS` does not have, or has otherwise.
    """
    checks = {**CHECKS, **more}
    names = frozenset(options.__annotations__) if options is not None else frozenset()

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        defaults = {parameter.name: parameter.default for parameter in signature.parameters.values()}

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            arguments = dict(signature.bind(*args, **kwargs).arguments)
            others = arguments.pop("options", {})
            if unknown := sorted(others.keys() - names):
                raise TypeError(f"{function.__name__}() got an unexpected keyword argument {unknown[0]!r}")
            for name, value in {**arguments, **others}.items():
                if name in checks and value is not defaults.get(name, inspect.Parameter.empty):
                    check(name, value, checks[name])
            return function(*args, **kwargs)

        return call

    return decorate


def _shown(value: object) -> str:
    """A value in a sentence: as written, on one line, and not at length."""
    text = repr(value).partition("\n")[0]
    return text if len(text) <= 80 else f"{text[:77]}..."
