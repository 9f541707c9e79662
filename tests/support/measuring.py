"""Sensitivities of a small checkpoint, as `measure_checkpoint` takes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from waterfill.files.architecture import describe
from waterfill.files.checkpoint import open_checkpoint
from waterfill.planning import measuring
from waterfill.planning.sensitivity import Sensitivity

RANDOM: dict[str, Any] = {"probe": "random", "length": 6}
KINDS: dict[str, dict[str, Any]] = {"random": RANDOM, "self": {"length": 6}, "text": {"length": 6}}


def measured(
    path: Path,
    *,
    keep: Sequence[str] = (),
    write: Any = None,
    error: Callable[[Sensitivity], float] | None = None,
    planned: Any = None,
    progress: Any = None,
    **options: Any,
) -> Sensitivity:
    """With an `error` of what is predicted, in place of the one that it has."""
    checkpoint = open_checkpoint(path)
    architecture = describe(checkpoint, keep)
    other = nullcontext() if error is None else patch.object(measuring, "relative_error", lambda found, _: error(found))
    with other:
        return measuring.measure_checkpoint(
            checkpoint,
            architecture,
            progress,
            options,  # type: ignore[arg-type]
            write=write,
            planned=planned,
        )


def falling(first: float) -> Callable[[Sensitivity], float]:
    """An error that falls as it does with independent sequences."""
    return lambda found: first / math.sqrt(int(found.probe["sequences"] or 0))
