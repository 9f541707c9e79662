"""A small comparison of methods on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from tests.support.plans import SCALAR
from waterfill.planning.budget import Budget
from waterfill.planning.planner import Request
from waterfill.studies.comparison import Method, StudiedModel, compare_methods
from waterfill.studies.comparison.stored import quantised, run_quantiser

CONTEXT = 16
REQUEST = Request(codecs=SCALAR)


def method(name: str, quantiser: Callable[[Tensor], Any], **options: Any) -> Method:
    return Method(name, name.upper(), "test", partial(run_quantiser, quantiser), **options)


def compared(subject: StudiedModel, ids: Tensor, *methods: Method, **options: Any) -> Any:
    given: dict[str, Any] = {"budgets": [Budget(bits=4.0)], "ours": (), "match": False, "request": REQUEST}
    return compare_methods(subject, ids, text="t", context=CONTEXT, methods=methods, **{**given, **options})


def as_half(weight: Tensor) -> Any:
    return quantised(weight.half().float(), {"w": weight.half()})
