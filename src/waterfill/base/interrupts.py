"""Ctrl-C that Python has dropped comes again.

An interrupt is an exception that is raised between two steps of whatever Python is doing. In a destructor, a callback
of a weak reference or one of C, an exception goes nowhere: Python prints it and goes on.
"""

from __future__ import annotations

import _thread
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

AGAIN_S = 0.01  # by when what dropped it has ended


@contextmanager
def kept() -> Iterator[None]:
    """Within, an interrupt that was dropped is raised again in the main thread, a moment later.

    What notices by itself that it was interrupted has an attribute `notices_interrupts`, and is left to that.
    """
    before, coming = sys.unraisablehook, threading.Lock()  # of several that were dropped, one comes again

    def again() -> None:
        time.sleep(AGAIN_S)
        coming.release()
        _thread.interrupt_main()

    def dropped(unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            before(unraisable)
        elif not _notices(unraisable.object) and coming.acquire(blocking=False):
            _thread.start_new_thread(again, ())  # not here, where it would be dropped once more

    sys.unraisablehook = dropped
    try:
        yield
    finally:
        sys.unraisablehook = before


def _notices(callback: object) -> bool:
    return bool(getattr(getattr(callback, "__self__", None), "notices_interrupts", False))
