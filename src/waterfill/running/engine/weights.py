"""A model's matrices as the native layers multiply with them: all in memory, or streamed.

Resident   arranged in the kernels' layout; the library reads them by itself
Streamed   a callback for every product; chunks come from a `Streamer`
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from waterfill.base import native
from waterfill.files.artifact import Artifact
from waterfill.running.engine.families.llama_spec import EMBEDDING, PROJECTIONS, Spec
from waterfill.running.streaming.chunks import ChunkData, StreamedMatrix
from waterfill.running.streaming.fit import decoded_names, levels_line, packed_names
from waterfill.running.streaming.storage import Storage
from waterfill.running.streaming.streamer import Streamer
from waterfill.running.streaming.view import View

_log = logging.getLogger("waterfill.engine")

Floats = npt.NDArray[np.float32]


class Weights(Protocol):
    """What a pass multiplies with. `product` is a wf_product, or None where the library has all matrices."""

    product: Any

    def view(self, name: str) -> native.MatrixView:
        """The matrix of that tensor; of a streamed one no more than its shape."""

    def rows(self, ids: npt.NDArray[np.int64]) -> Floats:
        """Rows of the embedding, `[count, hidden]`."""

    def logits(self, x: Floats) -> Floats:
        """x `[tokens, hidden]` times the head -> `[tokens, vocabulary]`."""

    def expect(self, status: int) -> None:
        """Raise what has ended a pass that returned this status."""


class Resident:
    """Matrices in memory, arranged: by tensor, `views` and whatever keeps their memory alive."""

    product = None

    def __init__(self, views: Mapping[str, native.MatrixView], spec: Spec, owner: object) -> None:
        self._library, self._isa = kernels()
        self._views, self._head, self._owner = dict(views), spec.head, owner

    @classmethod
    def load(cls, artifact: Artifact, spec: Spec, *, verify: bool) -> Resident:
        """Decode and arrange all matrices of an artifact.

        Raises:
            ArtifactError: a stream is damaged or, with `verify`, a buffer is not what was packed.
        """
        held, coded = dict[str, ChunkData](), decoded_names(artifact)
        storage = Storage(direct=False)
        try:
            for name in tqdm(
                sorted(packed_names(artifact)), desc="decoding weights", leave=False, delay=1, disable=None
            ):
                matrix = StreamedMatrix(artifact.tensors[name], storage, verify=verify)
                held[name] = matrix.whole(verify=verify).arrange()
        finally:
            storage.close()
        if coded:
            stored = sum(artifact.tensors[name].size_bytes for name in coded)
            _log.info("%s", levels_line(stored, sum(held[name].nbytes for name in coded)))
        return cls({name: data.matrix_view for name, data in held.items()}, spec, held)

    def view(self, name: str) -> native.MatrixView:
        return self._views[name]

    def rows(self, ids: npt.NDArray[np.int64]) -> Floats:
        view = self._views[EMBEDDING]
        rows = np.empty((len(ids), view.width), np.float32)
        self._library.rows(self._isa, view, ids.ctypes.data, rows.ctypes.data, count=len(ids), rotated=False)
        return rows

    def logits(self, x: Floats) -> Floats:
        view = self._views[self._head]
        y = np.empty((len(x), view.rows), np.float32)
        matrices, results = native.matrices_of([view]), native.addresses_of([y.ctypes.data])
        self._library.matmul(self._isa, matrices, x.ctypes.data, results, dtype=native.FLOAT32, tokens=len(x))
        return y

    def expect(self, status: int) -> None:
        if status:
            raise ValueError(f"wf_run_layers refused its arguments (status {status})")


class Streamed:
    """Matrices whose chunks a streamer reads, keeps and decodes."""

    notices_interrupts = True  # in `_multiply`, by the status that is left then

    def __init__(self, streamer: Streamer, matrices: dict[str, StreamedMatrix], spec: Spec) -> None:
        self._streamer, self._matrices = streamer, matrices
        self._head, self._embedding = matrices[spec.head], matrices[EMBEDDING]
        self._layers = [
            [matrices[f"model.layers.{layer}.{name}"] for name in PROJECTIONS.values()] for layer in range(spec.layers)
        ]
        self._failure: BaseException | None = None
        self.product = native.PRODUCT(self._multiply)

    def view(self, name: str) -> native.MatrixView:
        rows, width = self._matrices[name].shape
        return native.MatrixView(rows, width)

    def rows(self, ids: npt.NDArray[np.int64]) -> Floats:
        return self._streamer.rows(self._embedding, ids)

    def logits(self, x: Floats) -> Floats:
        y = np.empty((len(x), self._head.shape[0]), np.float32)
        self._streamer.product(self._head, View.of_array(x), View.of_array(y))
        return y

    def expect(self, status: int) -> None:
        failure, self._failure = self._failure, None
        if status == native.UNANSWERED:
            raise failure or KeyboardInterrupt  # without one, it came just as `_multiply` was called
        if status:
            raise ValueError(f"wf_run_layers refused its arguments (status {status})")

    def _multiply(
        self, _: int | None, layer: int, first: int, count: int, x: int, tokens: int, ys: Sequence[int], status: Any
    ) -> None:
        """wf_product. An exception cannot pass through the library: it is kept, and raised behind it."""
        try:
            matrices = self._layers[layer][first : first + count]
            activations = View(x, native.FLOAT32, tokens, matrices[0].shape[1], None)
            results = [View(ys[i], native.FLOAT32, tokens, matrix.shape[0], None) for i, matrix in enumerate(matrices)]
            self._streamer.products(matrices, activations, results)
            status[0] = 0
        except BaseException as error:
            self._failure = error


def kernels() -> tuple[native.Native, int]:
    """The library, and the number of the instruction set in use."""
    library, isa = native.library(), native.isa()
    assert library is not None  # `opening` has seen to it
    assert isa is not None
    return library, library.isas[isa]
