"""Ctrl-C at any moment ends what is running, wherever Python is just then."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import waterfill
from tests.support import models, streams
from tests.support.kernel_samples import NOT_BUILT
from waterfill.base import interrupts, native
from waterfill.running.streaming import Activations

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals")
TIMES = 25
WAIT_S = 30.0


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """A background job ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Destroyed:
    """An interrupt comes just as it is freed."""

    def __del__(self) -> None:
        raise KeyboardInterrupt


class Noticing:
    """As a callback of the library does, it says of itself that it was interrupted."""

    notices_interrupts = True


def repeat(action: Callable[[], object], begin: Callable[[], object] = lambda: None) -> None:
    """Until it is interrupted, which it should be soon after `begin`."""
    end_s = time.monotonic() + WAIT_S
    with interrupts.kept():
        begin()
        while time.monotonic() < end_s:
            action()


def test_an_interrupt_in_a_destructor_comes_again() -> None:
    for _ in range(5):
        several = [Destroyed(), Destroyed()]
        with pytest.raises(KeyboardInterrupt):
            repeat(several.clear)
        time.sleep(5 * interrupts.AGAIN_S)  # it comes once


def test_what_notices_by_itself_is_not_interrupted_twice() -> None:
    with interrupts.kept():
        for owner, again in ((Noticing(), False), (object(), True)):
            report = type("Unraisable", (), {"exc_type": KeyboardInterrupt, "object": None})
            report.object = type("Method", (), {"__self__": owner})()  # type: ignore[attr-defined]
            interrupted = False
            try:
                sys.unraisablehook(report)  # type: ignore[arg-type]
                time.sleep(20 * interrupts.AGAIN_S)
            except KeyboardInterrupt:
                interrupted = True
            assert interrupted == again


def test_other_errors_are_shown_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    with interrupts.kept():
        sys.unraisablehook(type("Unraisable", (), {"exc_type": ValueError, "object": None}))  # type: ignore[arg-type]
    assert len(shown) == 1
    assert sys.unraisablehook == shown.append


@pytest.mark.skipif(native.library() is None, reason=NOT_BUILT)
def test_a_streamed_generation_ends_at_every_interrupt(tmp_path: Path) -> None:
    """Most of the time Python is in callbacks of the library, or frees what they held."""
    models.tiny_llama(tmp_path / "model", layers=1, tokenizer=True)
    waterfill.pack(tmp_path / "model", tmp_path / "packed", bits=4.0, probe="random", sequences=2, length=8)
    tuning = streams.quick(chunk_bytes=8192, part_weights=8192)
    engine = waterfill.Engine(tmp_path / "packed", streamed=True, tuning=tuning)
    assert not hasattr(Activations, "__del__"), "where an interrupt would be dropped"

    def text() -> str:
        return "".join(engine.generate("Once upon", max_new_tokens=8, temperature=0))

    expected, after = text(), random.Random(0)
    for _ in range(TIMES):
        killer = threading.Timer(after.uniform(0.01, 0.06), os.kill, (os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            repeat(text, begin=killer.start)
        killer.join()
        assert text() == expected, "the next text is whole: nothing of the interrupted one is left"
