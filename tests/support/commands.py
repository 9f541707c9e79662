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


Command = Callable[..., Result]
