"""The state of the native library that a test finds and leaves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.kernel_samples import nothing_decided, one_thread
from waterfill.base import native


@pytest.fixture
def _ordinary(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a new process without the variables; afterwards as in a new process again."""
    for variable in (native.ISA_VARIABLE, native.FLOAT_ACTIVATIONS):
        monkeypatch.delenv(variable, raising=False)
    with one_thread(), nothing_decided():
        yield
