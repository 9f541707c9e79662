"""Matrices on disk, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import waterfill
from tests.support import models, streams
from tests.support.plans import plan_for
from waterfill.files.artifact import open_artifact
from waterfill.planning.budget import Budget
from waterfill.running.streaming import Storage, StreamedMatrix

CODECS = ("trellis-s8-r3.0000", "higgs-p2-n16")


@pytest.fixture(scope="session", params=CODECS)
def small_artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("small")
    checkpoint = models.tiny_llama(root / "model", hidden=96, intermediate=272, layers=1)
    plan = plan_for(checkpoint, codecs=[request.param], budget=Budget(bits=16.0), uniform=True)
    waterfill.pack(checkpoint, root / "out", plan=plan)
    return root / "out"


@pytest.fixture
def storage() -> Iterator[Storage]:
    opened = Storage()
    yield opened
    opened.close()


@pytest.fixture
def matrices(small_artifact: Path, storage: Storage) -> list[StreamedMatrix]:
    """In small chunks, of several parts where the codec lets them."""
    tensors = open_artifact(small_artifact, verify=False).tensors.values()
    tuning = streams.quick()
    return [tuning.matrix(tensor, storage, verify=True) for tensor in tensors if tensor.codec in CODECS]
