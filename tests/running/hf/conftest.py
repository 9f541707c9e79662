"""What fused layers say, and the calls that they take."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from waterfill.kernels.layer import DecoderLayer
from waterfill.running.hf import fused


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was logged about layers that run one operator at a time, as in a process that has said nothing yet."""
    fused._say.cache_clear()
    caplog.set_level(logging.INFO, "waterfill.kernels")
    begin = "decoder layers run one operator at a time, which is slower: "
    return lambda: [m.removeprefix(begin) for m in caplog.messages if m.startswith(begin)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Positions that went through the native layer, in order."""
    seen: list[int] = []
    original = DecoderLayer.__call__

    def counted(self: Any, hidden: Any, rotary: Any, keys: Any, values: Any, position: int) -> Any:
        seen.append(position)
        return original(self, hidden, rotary, keys, values, position)

    monkeypatch.setattr(DecoderLayer, "__call__", counted)
    return seen  # type: ignore[return-value]
