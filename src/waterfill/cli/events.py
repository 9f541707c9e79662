"""The log of events that `--json` has on standard error: one JSON object per line (docs/cli.md)."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

from waterfill.base.records import finite


def wanted() -> bool:
    """Whether `--json` is on the command line: known also where that cannot be parsed."""
    return "--json" in sys.argv


def write(event: str, **fields: Any) -> None:
    """One event; lost where standard error is closed, which is no reason for a command to fail."""
    with suppress(OSError):
        click.echo(json.dumps(finite({"event": event, **fields}), allow_nan=False), err=True)


def log(level: str, message: str) -> None:
    """What would be a line for people; `level` is as in Python's logging, in lower case."""
    write("log", level=level, message=message)


@contextmanager
def python_warnings() -> Iterator[None]:
    """Warnings of Python code, which would be lines between the events, are events while this lasts."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        log("warning", f"{category.__name__}: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
