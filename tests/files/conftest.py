"""Layouts of small models, and the files that a finished run writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.artifact_samples import build, directory_bytes, model
from waterfill.files.artifact import Layout, lay_out

SHARDED = 40


@pytest.fixture
def layout() -> Layout:
    return lay_out(model(), shard_bytes=SHARDED)


@pytest.fixture
def expected(tmp_path: Path, layout: Layout) -> dict[str, bytes]:
    """The files of an undisturbed run."""
    return directory_bytes(build(tmp_path / "undisturbed", layout))
