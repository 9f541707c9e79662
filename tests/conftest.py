"""Shared fixtures: the example model, and optional reference data that lives outside the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def ref_llama() -> Path:
    """The small trained Llama that the repository ships."""
    return REPOSITORY / "examples" / "ref-llama"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Directory with held-out text and published sensitivities; set WATERFILL_TEST_DATA to its parent."""
    root = Path(os.environ.get("WATERFILL_TEST_DATA", REPOSITORY.parent / "shared"))
    if not (root / "data").is_dir():
        pytest.skip(f"no reference data at {root} (set WATERFILL_TEST_DATA to a folder that holds data/)")
    return root / "data"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
