"""The command line in this process: the fixture `command` of conftest.py runs it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

SCALAR = [part for n in (4, 8, 16, 64) for part in ("--codec", f"higgs-p1-n{n}")]


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def record(self) -> Any:
        assert self.out.count("\n") == 1, "one object on one line"
        return json.loads(self.out)

    @property
    def events(self) -> list[dict[str, Any]]:
        """What --json has on standard error."""
        return [json.loads(line) for line in self.err.splitlines()]

    @property
    def remarks(self) -> list[str]:
        """What would be lines for people without --json, other than those about progress."""
        return [event["message"] for event in self.events if event["event"] == "log"]


Command = Callable[..., Result]
