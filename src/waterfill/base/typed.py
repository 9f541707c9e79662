"""Dataclasses from JSON, checked field by field: types from their annotations, ranges from `Annotated[…, Range(…)]`.

    file ──► load ──► object ──► read(cls, …) ──► instance

What is wrong is said by its place: "tensors[3].alpha is null, expected a real number".
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from waterfill.base.errors import WaterfillError
from waterfill.base.reading import read_text

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """Least and greatest permitted number."""

    least: float
    greatest: float


Count = Annotated[int, Range(0, 2**62)]
Positive = Annotated[int, Range(1, 2**62)]
Share = Annotated[float, Range(0, 1)]
Magnitude = Annotated[float, Range(0, 1e12)]  # sums and products of such numbers stay finite


def load(path: Path, what: str, version: int, make: Callable[[dict[str, Any]], T]) -> T:
    """What `make` makes of the JSON object in a file, less its version; `make` raises ValueError for a bad one.

    Raises:
        WaterfillError: the file is not `what` of this version, or cannot be read.
    """
    try:
        data = json.loads(read_text(path))
        _expect(data, isinstance(data, dict), "", "an object")
        if data.pop("version", "no version") != version:
            raise ValueError("unknown version")
        return make(data)
    except (OSError, ValueError, RecursionError) as error:
        raise WaterfillError(
            f"{path} is not a {what} of this version ({error}); write one with `waterfill plan --save`"
        ) from error


def read(kind: Any, value: Any, where: str = "") -> Any:
    """`value`, of parsed JSON, as an instance of `kind`: a dataclass, str, bool, int, float, a union or Literal of
    such, a tuple or a mapping by names. `where` is its place in the file.

    Raises:
        ValueError: it is no such value.
    """
    if is_dataclass(kind):
        return _read_record(kind, value, where)
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _in_range(read(parts[0], value, where), parts[1], where)
    if origin is Literal:
        return _expect(value, isinstance(value, str) and value in parts, where, " or ".join(map(repr, parts)))
    if origin in (Union, UnionType):
        return _read_union(parts, value, where)
    if origin is tuple:
        return _read_tuple(parts, value, where)
    if origin is not None and issubclass(origin, Mapping):
        _expect(value, isinstance(value, dict), where, "an object")
        return {
            read(str, key, f"a name in {where}"): read(parts[1], item, f"{where}[{_shown(key)}]")
            for key, item in value.items()
        }
    return _read_plain(kind, value, where)


def _read_plain(kind: type, value: Any, where: str) -> Any:
    if kind is float:
        _expect(value, isinstance(value, int | float) and not isinstance(value, bool), where, "a real number")
        return _finite(value, where)
    if kind is int:
        return _expect(value, isinstance(value, int) and not isinstance(value, bool), where, "a whole number")
    if kind is bool:
        return _expect(value, isinstance(value, bool), where, "true or false")
    if kind is str:
        _expect(value, isinstance(value, str), where, "a string")
        return _expect(value, not any("\ud800" <= c <= "\udfff" for c in value), where, "characters of Unicode")
    if kind is type(None):
        return _expect(value, value is None, where, "null")
    raise TypeError(f"no reader for {kind}")


def _read_record(cls: Any, value: Any, where: str) -> Any:
    _expect(value, isinstance(value, dict), where, "an object")
    hints, inside = _hints(cls), f"{where}." if where else ""
    for name in value:
        if name not in hints:
            raise ValueError(f"{where or 'it'} has a field {_shown(name)} that it should not have")
    required = [field.name for field in fields(cls) if field.default is MISSING]
    for name in required:
        if name not in value:
            raise ValueError(f"{inside}{name} is absent")
    return cls(**{name: read(hints[name], item, inside + name) for name, item in value.items()})


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def _read_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    reasons = []
    for kind in kinds:
        try:
            return read(kind, value, where)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(reasons[0])


def _read_tuple(kinds: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    _expect(value, isinstance(value, list), where, "an array")
    if kinds[-1] is Ellipsis:
        return tuple(read(kinds[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    _expect(value, len(value) == len(kinds), where, f"{len(kinds)} of them")
    return tuple(read(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _finite(value: float, where: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{where} is {number}, which is not finite")
    return number


def _in_range(value: Any, permitted: Range, where: str) -> Any:
    expected = f"a number from {permitted.least:g} to {permitted.greatest:g}"
    return _expect(value, permitted.least <= value <= permitted.greatest, where, expected)


def _expect(value: Any, fits: bool, where: str, expected: str) -> Any:
    if not fits:
        raise ValueError(f"{where or 'it'} is {_shown(value)}, expected {expected}")
    return value


def _shown(value: Any) -> str:
    """A value as the file has it, cut short."""
    if isinstance(value, dict | list):
        return f"an {'object' if isinstance(value, dict) else 'array'} of {len(value)}"
    try:
        text = json.dumps(value)
    except ValueError:  # a whole number of thousands of digits
        return "a number of very many digits"
    return text if len(text) <= 60 else f"{text[:60]}…"
