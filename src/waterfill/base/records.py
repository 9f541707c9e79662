"""What every evaluation returns: frozen dataclasses that turn into plain data."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

from waterfill.base.errors import WaterfillError


class Record:
    """Base of the results: `to_dict`, `to_json` and `to_pandas` of a dataclass, nested or not."""

    def to_dict(self) -> dict[str, Any]:
        """The fields by name; nested results become dictionaries."""
        fields: dict[str, Any] = asdict(self)  # type: ignore[call-overload]  # every subclass is a dataclass
        return fields

    def to_json(self, **options: Any) -> str:
        """One JSON object; `null` for what is not finite. `options` are those of `json.dumps`."""
        return json.dumps(finite(self.to_dict()), allow_nan=False, **options)

    def to_pandas(self) -> Any:
        """A pandas Series; names of nested fields are joined with dots. A DataFrame of several results:
        `pandas.DataFrame([result.to_pandas() for result in results])`."""
        return pandas().Series(flattened(self.to_dict()))


def pandas() -> Any:
    """The module.

    Raises:
        WaterfillError: it is not installed.
    """
    try:
        return import_module("pandas")
    except ImportError as error:
        raise WaterfillError("pandas is not installed; install it, or use to_dict()") from error


def frame(records: Iterable[Record]) -> Any:
    """A pandas DataFrame, one row per result."""
    return pandas().DataFrame([record.to_dict() for record in records])


@dataclass(frozen=True)
class Estimate(Record):
    """A figure and its standard error."""

    value: float
    error: float


def flattened(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, keys joined with dots."""
    result: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            result |= flattened(value, f"{prefix}{name}.")
        else:
            result[f"{prefix}{name}"] = value
    return result


def finite(value: Any) -> Any:
    """`value` with None in the place of NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value
