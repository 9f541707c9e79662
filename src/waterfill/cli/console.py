"""What every command prints with: results on standard output, remarks on standard error, JSON on one line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from io import TextIOWrapper
from typing import Any

import click
from rich.console import Console

from waterfill.base.records import finite
from waterfill.cli import events

PIPED_WIDTH = 200  # of tables that no terminal limits


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that stand on the command line; the others have the defaults of the Python functions. `no_cache` is
    a `cache` that is False."""
    set_ = {name: value for name, value in options.items() if value is not None and value is not False and value != ()}
    return {**set_, "cache": False} if set_.pop("no_cache", False) else set_


def show_everything() -> None:
    """Have characters that a stream's encoding lacks written as escapes: a model may say anything."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def out() -> Console:
    """Standard output for tables."""
    limited = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if limited else PIPED_WIDTH, highlight=False, markup=False, emoji=False)


def note(sentence: str) -> None:
    """What is not part of the result."""
    say("info", sentence)


def say(level: str, sentence: str) -> None:
    """A remark: a line, or an event with --json. `level` is as in Python's logging, in lower case."""
    if events.wanted():
        events.log(level, sentence)
        return
    colour = "yellow" if level in ("warning", "error", "critical") else None
    click.echo(click.style(sentence, fg=colour, dim=colour is None), err=True)


def print_json(record: Mapping[str, Any]) -> None:
    """One object on one line."""
    click.echo(json.dumps(finite(record), allow_nan=False))
