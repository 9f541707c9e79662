"""Products whose chunks arrive one by one: the same numbers whatever comes when, and nothing kept when they end."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import waterfill
from tests.support import models
from tests.support.plans import plan_for
from waterfill.base import native
from waterfill.base.errors import ArtifactError
from waterfill.files.artifact import open_artifact
from waterfill.planning.budget import Budget
from waterfill.running.streaming.chunks import Chunk, ChunkData
from waterfill.running.streaming.products import Held, Product, Products
from waterfill.running.streaming.storage import Slot, Storage
from waterfill.running.streaming.tuning import Tuning
from waterfill.running.streaming.view import Activations, View

pytestmark = pytest.mark.skipif(native.isa() is None, reason="the native library was not built, or is switched off")

CODECS = ("trellis-s8-r3.0000", "higgs-p2-n16")
Floats = npt.NDArray[np.float32]


@pytest.fixture(scope="module", params=CODECS)
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("products")
    checkpoint = models.tiny_llama(root / "model", hidden=512, intermediate=2048, layers=2)
    plan = plan_for(checkpoint, codecs=[request.param], budget=Budget(bits=16.0), uniform=True)
    waterfill.pack(checkpoint, root / "out", plan=plan)
    return root / "out"


@pytest.fixture
def several_threads() -> Iterator[None]:
    library = native.library()
    assert library is not None
    library.set_team(None)
    library.set_threads(5)
    yield
    library.shares_threads = False
    library.choose_threads()


class Source:
    """Chunks in memory, as a ring of `slots` gives them: sometimes not yet, and never more than it has slots."""

    def __init__(self, slots: int, *, fails_at: int = -1) -> None:
        self.free, self.slots, self.fails_at, self.taken = slots, slots, fails_at, 0
        self.chance, self.storage = random.Random(slots), Storage()

    def take(self, chunk: Chunk, wait: bool) -> Held | None:
        if self.taken == self.fails_at:
            raise OSError("unplugged")
        if not self.free or (not wait and self.chance.random() < 0.5):
            assert not wait, "it waits for a slot that it holds itself"
            return None
        self.free -= 1
        self.taken += 1
        slot = Slot(chunk.region.size_bytes)
        return ChunkData(chunk, self.storage.read_into(chunk.region, slot), unchecked=True), slot

    def give_back(self, slot: Slot) -> None:
        self.free += 1


class Case:
    """The matrices of a layer that multiply the same x."""

    def __init__(self, artifact: Path) -> None:
        tensors, tuning = (
            open_artifact(artifact, verify=False).tensors,
            Tuning(chunk_bytes=200_000, part_weights=1 << 16),
        )
        names = [f"model.layers.{layer}.mlp.{kind}_proj" for layer in (0, 1) for kind in ("gate", "up")]
        self.matrices = [tuning.matrix(tensors[name], Storage(), verify=False) for name in names]
        self.x = np.random.default_rng(3).standard_normal((3, 512)).astype(np.float32)
        self.nanoseconds = np.zeros(2, np.int64)

    def run(self, source: Source) -> list[Floats]:
        ys = [np.zeros((3, matrix.shape[0]), np.float32) for matrix in self.matrices]
        with Activations(View.of_array(self.x)) as x:
            products = [
                Product(chunk, x, View.of_array(y))
                for matrix, y in zip(self.matrices, ys, strict=True)
                for chunk in matrix.chunks
            ]
            try:
                Products(products, source.take, source.give_back).run(self.nanoseconds)
            finally:
                assert source.free == source.slots, "all slots were given back"
        return ys

    def whole(self) -> list[Floats]:
        ys = [np.zeros((3, matrix.shape[0]), np.float32) for matrix in self.matrices]
        for matrix, y in zip(self.matrices, ys, strict=True):
            with Activations(View.of_array(self.x)) as given:
                matrix.whole(verify=False).arrange().multiply(given, View.of_array(y), self.nanoseconds)
        return ys


@pytest.fixture
def case(artifact: Path) -> Case:
    return Case(artifact)


@pytest.mark.parametrize("slots", [1, 2, 5, 100])
def test_results_are_those_of_whole_matrices(case: Case, slots: int, several_threads: None) -> None:
    assert sum(len(matrix.chunks) for matrix in case.matrices) > 4
    expected = case.whole()
    for _ in range(5):
        found = case.run(Source(slots))
        assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
    assert (case.nanoseconds > 0).all()


@pytest.mark.parametrize("fails_at", [0, 1, 4])
def test_what_the_source_raises_is_raised(case: Case, fails_at: int, several_threads: None) -> None:
    for slots in (1, 3):
        with pytest.raises(OSError, match="unplugged"):
            case.run(Source(slots, fails_at=fails_at))
    assert all(np.array_equal(*pair) for pair in zip(case.run(Source(3)), case.whole(), strict=True))


def test_the_part_that_changed_is_named(case: Case, several_threads: None) -> None:
    case.run(Source(3))
    matrix = case.matrices[2]
    place = len(matrix.sums) - 1
    matrix.sums[place] ^= np.uint64(1)
    offset = matrix.offset_bytes + int(matrix.ends[place])
    with pytest.raises(ArtifactError, match=rf"{matrix.name}' is not what it was .* at byte {offset}\)"):
        case.run(Source(3))
    matrix.sums[place] = 0  # as if it had never been read
    case.run(Source(3))
    assert matrix.sums[place] != 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("call", [1, 2, 4])
def test_an_interrupt_as_the_library_calls_back(
    case: Case, call: int, several_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes before the callback's first line can catch it: the library gets no answer."""
    ready, calls = native.READY, list[int]()

    def interrupting(callback: Callable[..., None]) -> Any:
        def interrupted(*given: Any) -> None:
            calls.append(1)
            if len(calls) == call:
                raise KeyboardInterrupt
            callback(*given)

        return ready(interrupted)

    monkeypatch.setattr(native, "READY", interrupting)
    with pytest.raises(KeyboardInterrupt):
        case.run(Source(2))
    monkeypatch.undo()
    assert all(np.array_equal(*pair) for pair in zip(case.run(Source(2)), case.whole(), strict=True))
