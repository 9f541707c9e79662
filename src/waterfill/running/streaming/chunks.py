"""A packed matrix on disk as pieces that can be read, checked, decoded and multiplied one by one.

    part    rows that can be decoded alone, by one thread: of one stream, or some rows of codes (`Codec.parts`)
    chunk   consecutive parts, about `chunk_bytes` of one file: read at once
    matrix  chunks from the first row to the last

`ChunkData` is a chunk whose bytes are in memory: as stored, or, pinned, in the kernels' layout.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from waterfill.base import native
from waterfill.base.dtypes import TORCH_DTYPES
from waterfill.base.errors import ArtifactError
from waterfill.base.lazy import torch
from waterfill.codecs import get_codec
from waterfill.codecs.integers import native_table
from waterfill.files.artifact import StoredTensor, read_bytes
from waterfill.running.streaming.stages import StageViews, held_stages
from waterfill.running.streaming.storage import BLOCK_BYTES, HUGE_BYTES, Region, Storage
from waterfill.running.streaming.view import Activations, View

if TYPE_CHECKING:
    from waterfill.kernels import Packed

# Calls from Python are few, a handful of chunks is enough to read ahead, and a slot is a huge page.
CHUNK_BYTES = HUGE_BYTES - 2 * BLOCK_BYTES
PART_WEIGHTS = 1 << 18  # of codes


@dataclass(frozen=True)
class Chunk:
    """Parts `[first_part, last_part)` of a matrix: what is read at once."""

    matrix: StreamedMatrix
    first_part: int
    last_part: int

    @cached_property
    def region(self) -> Region:
        ends = self.matrix.ends
        start = int(ends[self.first_part])
        return Region(self.matrix.file, self.matrix.offset_bytes + start, int(ends[self.last_part]) - start)

    @property
    def first_row(self) -> int:
        return self.first_part * self.matrix.part_rows

    @property
    def rows(self) -> int:
        return min(self.last_part * self.matrix.part_rows, self.matrix.shape[0]) - self.first_row

    @property
    def numbers(self) -> npt.NDArray[np.int64]:
        """Of its rows."""
        return np.arange(self.first_row, self.first_row + self.rows)

    @cached_property
    def ends(self) -> npt.NDArray[np.uint32]:
        """Where each part ends, in bytes from the chunk's first."""
        ends = self.matrix.ends[self.first_part : self.last_part + 1]
        return np.asarray(ends[1:] - ends[0], np.uint32)

    @cached_property
    def view(self) -> native.ChunkView:
        """As the library sees it, in the form that is stored, if it can read that, but for the address of its bytes."""
        matrix, isa = self.matrix, native.isa()
        assert isa is not None
        step, table = native_table(matrix.codec, isa)
        unit = 2.0**matrix.exponent
        view = native.ChunkView(self.rows, matrix.shape[1], matrix.part_rows, step * unit, unit, table)
        view.ends, view.sums, view.parts = (
            self.ends.ctypes.data,
            matrix.sums[self.first_part :].ctypes.data,
            len(self.ends),
        )
        if matrix.native is None:
            return view
        for field, value in matrix.native.items():
            setattr(view, field, value)
        if "scales" in matrix.held:
            scales = matrix.stored_held(self)["scales"]
            view.scales, view.scales_count = scales.ctypes.data, scales.size // 2
        if self._stages is not None:
            self._stages.put(view)
        return view

    @cached_property
    def _stages(self) -> StageViews | None:
        """What is held of a nested matrix, as the library sees it; alive as long as the chunk."""
        stages = self.matrix.stages
        return None if stages is None else StageViews(stages, self.first_part, self.last_part)

    @property
    def weights(self) -> int:
        return self.rows * self.matrix.shape[1]

    @property
    def decoded_bytes(self) -> int:
        """Memory that it takes in the kernels' layout, near enough."""
        codec = self.matrix.codec
        return self.rows * codec.row_bytes(self.matrix.shape[1]) + 2 * self.rows


class StreamedMatrix:
    """A matrix `[out, in]` whose codes stay on disk. What is small beside them, the scales of fixed-rate codes, does
    not: it is `held`, as the bytes of each row, and with `verify` compared with its digest.

    Raises:
        ArtifactError: that differs, or the index is damaged.
        WaterfillError: the codec is not known.
    """

    def __init__(
        self,
        tensor: StoredTensor,
        storage: Storage,
        *,
        verify: bool,
        chunk_bytes: int = CHUNK_BYTES,
        part_weights: int = PART_WEIGHTS,
    ) -> None:
        self.tensor, self.name = tensor, tensor.name
        self.shape = (tensor.shape[0], tensor.shape[1])
        self.exponent = tensor.exponent
        self.stored = get_codec(tensor.codec)
        self.codec = self.stored.memory  # that is multiplied from
        self.native = self.stored.native_fields(self.shape[1])  # None: the library does not decode it
        self.parts = self.stored.parts(self.shape, part_weights)
        buffers = dict(zip(tensor.keys, tensor.buffers, strict=True))
        self.buffer = buffers.pop(self.parts.key)
        self.file, self.offset_bytes = self.buffer.file, self.buffer.offset_bytes
        self.part_rows = self.parts.rows
        self.ends = self._bounds(storage)
        self.held: dict[str, npt.NDArray[np.uint8]] = {
            key: read_bytes(small, verify=verify) for key, small in buffers.items()
        }
        self.stages = held_stages(self.stored, self.shape, self.held, f"{self.file}: tensor {self.name!r}")
        self.sums = np.zeros(len(self.ends) - 1, np.uint64)  # checksums of the parts; 0: not read yet
        self.chunks = tuple(self._chunks(chunk_bytes))

    def _bounds(self, storage: Storage) -> npt.NDArray[np.int64]:
        rows, size = self.shape[0], self.buffer.size_bytes
        index = min(self.parts.index_bytes(rows), size)
        ends = self.parts.bounds(rows, storage.read(Region(self.file, self.offset_bytes, index)) if index else b"")
        if len(ends) != -(-rows // self.part_rows) + 1 or (np.diff(ends) < 0).any() or ends[-1] > size:
            raise ArtifactError(
                f"{self.file}: the index of tensor {self.name!r} at byte {self.offset_bytes} is damaged; fetch the "
                "artifact again, or pack again"
            )
        return ends

    def _chunks(self, chunk_bytes: int) -> list[Chunk]:
        chunks, first, parts = [], 0, len(self.ends) - 1
        for part in range(1, parts + 1):
            if part == parts or self.ends[part + 1] - self.ends[first] > chunk_bytes:
                chunks.append(Chunk(self, first, part))
                first = part
        return chunks

    def whole(self, *, verify: bool) -> ChunkData:
        """All of it in memory, as stored; with `verify`, compared with its digest."""
        data = read_bytes(self.buffer, verify=verify)
        return ChunkData(Chunk(self, 0, len(self.ends) - 1), data[self.ends[0] : self.ends[-1]])

    def part(self, row: int) -> Chunk:
        """The one part that holds a row."""
        number = row // self.part_rows
        return Chunk(self, number, number + 1)

    def stored_rows(self, chunk: Chunk, data: npt.NDArray[np.uint8]) -> dict[str, torch.Tensor]:
        """The rows of a chunk as buffers of a smaller matrix, given the chunk's bytes."""
        layout = self.stored.layout((chunk.rows, self.shape[1]))
        bytes_of = {self.parts.key: self.parts.alone(chunk.ends, data)}
        bytes_of |= self.stored_held(chunk)
        tensors = {key: torch.from_numpy(bytes_of[key]).view(TORCH_DTYPES[part.dtype]) for key, part in layout.items()}
        return {key: tensors[key].view(-1, *part.shape[1:]) for key, part in layout.items()}

    def stored_held(self, chunk: Chunk) -> Mapping[str, npt.NDArray[np.uint8]]:
        """What is held of the rows of a chunk."""
        return self.stored.rows(self.held, self.shape, chunk.first_row, chunk.first_row + chunk.rows)

    @property
    def decoding_bytes(self) -> int:
        """Memory that its largest chunk takes for a while where the library does not decode it."""
        if self.native is not None:
            return 0
        return max(self.stored.decoding_bytes((chunk.rows, self.shape[1])) for chunk in self.chunks)

    @property
    def coded_bytes(self) -> int:
        """Bytes on disk that one product reads."""
        return int(self.ends[-1] - self.ends[0])

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    def check(self, chunk: Chunk, data: npt.NDArray[np.uint8]) -> None:
        """Compare parts with what they were when they were first read.

        Raises:
            ArtifactError: they differ; names file, tensor and offset.
        """
        library = native.library()
        if library is None:
            return
        isa = library.isas[native.isa() or "scalar"]
        sums = np.empty(len(chunk.ends), np.uint64)
        library.checksums(isa, data, chunk.ends, sums)
        known = self.sums[chunk.first_part : chunk.last_part]
        changed = np.flatnonzero((known != 0) & (sums != known))
        if len(changed):
            raise self.changed(chunk, int(changed[0]))
        known[:] = sums

    def changed(self, chunk: Chunk, part: int) -> ArtifactError:
        return self.damaged(chunk, part, "is not what it was when it was first read")

    def damaged(self, chunk: Chunk, part: int, what: str = "is damaged") -> ArtifactError:
        offset = self.offset_bytes + int(self.ends[chunk.first_part + part])
        return ArtifactError(
            f"{self.file}: tensor {self.name!r} {what} (the part at byte {offset}); fetch the artifact again, or pack "
            "again"
        )


class ChunkData:
    """A chunk's bytes in memory, `data` uint8; with `scales`, codes and scales in the kernels' layout; `unchecked` if
    products are to compare its parts with what they were when they were first read."""

    def __init__(
        self,
        chunk: Chunk,
        data: npt.NDArray[np.uint8],
        scales: npt.NDArray[np.uint16] | None = None,
        *,
        unchecked: bool = False,
    ) -> None:
        self.chunk, self.data, self._scales, self._unchecked = chunk, data, scales, unchecked

    @property
    def arranged(self) -> bool:
        return self._scales is not None

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self._scales is None else self._scales.nbytes)

    def multiply(self, x: Activations, y: View, nanoseconds: npt.NDArray[np.int64]) -> None:
        """Write the chunk's columns of y `[tokens, out]`.

        Time spent decoding and multiplying, by all threads, is added to `nanoseconds`, `[2]`.

        Raises:
            ArtifactError: a part is damaged.
        """
        prepared = x.prepared(self.chunk.matrix.codec)
        if prepared is None or x.isa is None:
            from waterfill import kernels

            if self._unchecked:
                self.chunk.matrix.check(self.chunk, self.data)
            first = self.chunk.first_row
            y.tensor()[:, first : first + self.chunk.rows] = kernels.matmul(x.view.tensor(), self.packed())
            return
        library = native.library()
        assert library is not None
        ready = self.ready()  # alive until it has been multiplied
        task = (native.Task * 1)(ready.task(prepared, y))
        expect(
            *library.multiply_chunks(library.isas[x.isa], task, dtype=y.dtype, nanoseconds=nanoseconds), [self.chunk]
        )

    def task(self, prepared: int | None, y: View) -> native.Task:
        """The same product for the library to compute, of a chunk that is `ready` and of `Activations.prepared`."""
        address = y.address + self.chunk.first_row * y.item_bytes
        return native.Task(ctypes.addressof(self._view), prepared, address, y.width)

    def ready(self) -> ChunkData:
        """Itself where the library decodes it while it multiplies; else decoded."""
        return self if self.arranged or self.chunk.matrix.native is not None else self.arrange()

    def copy(self) -> ChunkData:
        return ChunkData(self.chunk, self.data.copy(), self._scales)

    def arrange(self) -> ChunkData:
        """A copy in the kernels' layout: larger, and multiplied without decoding."""
        library, isa = native.library(), native.isa()
        if library is None or isa is None or self.arranged:
            return self.copy()
        if self.chunk.matrix.native is None:
            return self._decoded()
        codec, rows, width = self.chunk.matrix.codec, self.chunk.rows, self.chunk.matrix.shape[1]
        _, table = native_table(codec, isa)
        codes = np.empty(library.codes_bytes(table=table, rows=rows, width=width), np.uint8)
        scales = np.empty(library.scales_count(rows=rows, width=width), np.uint16)
        expect(*library.chunk_decode(library.isas[isa], self._view, codes=codes, scales=scales), [self.chunk])
        return ChunkData(self.chunk, codes, scales)

    def rows(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Rows of the matrix by number, all of this chunk: `[count, in]`."""
        isa, library = native.isa(), native.library()
        numbers = np.ascontiguousarray(numbers - self.chunk.first_row, np.int64)
        if isa is None or library is None:
            from waterfill import kernels

            return kernels.rows(self.packed(), torch.from_numpy(numbers)).numpy()
        whole = self if self.arranged else self.arrange()
        rows = np.empty((len(numbers), self.chunk.matrix.shape[1]), np.float32)
        places = numbers.ctypes.data, rows.ctypes.data
        library.rows(library.isas[isa], whole.matrix_view, *places, count=len(numbers), rotated=False)
        return rows

    @property
    def matrix_view(self) -> native.MatrixView:
        """Arranged rows as a matrix of their own: pointers, alive as long as this object."""
        view = self._view
        return native.MatrixView(
            view.rows,
            view.width,
            view.step,
            view.unit,
            view.table,
            view.data,
            view.scales,
            view.data_bytes,
            view.scales_count,
        )

    def packed(self) -> Packed:
        """The chunk's rows as a matrix of their own, for the door of torch."""
        from waterfill import kernels

        matrix, layout = self.chunk.matrix, kernels.implementation()
        if layout == kernels.STORED:
            return self._as_stored()
        whole = self if self.arranged else self.arrange()
        assert whole._scales is not None
        codes, scales = torch.from_numpy(whole.data), torch.from_numpy(whole._scales.view(np.float16))
        shape = (self.chunk.rows, matrix.shape[1])
        return kernels.Packed(matrix.codec, scales, codes, matrix.exponent, shape, layout)

    def _as_stored(self) -> Packed:
        """The same, in the form in memory but not in the kernels' layout."""
        from waterfill import kernels

        matrix, shape = self.chunk.matrix, (self.chunk.rows, self.chunk.matrix.shape[1])
        memory = matrix.stored.to_memory(matrix.stored_rows(self.chunk, self.data), shape, matrix.exponent)
        return kernels.Packed(matrix.codec, memory["scales"], memory["codes"], matrix.exponent, shape)

    def _decoded(self) -> ChunkData:
        """A copy in the kernels' layout of what the library cannot decode."""
        from waterfill import kernels

        if self._unchecked:
            self.chunk.matrix.check(self.chunk, self.data)
        packed = kernels.arrange(self._as_stored())
        return ChunkData(self.chunk, packed.codes.numpy(), packed.scales.view(torch.int16).numpy().view(np.uint16))

    @cached_property
    def _view(self) -> native.ChunkView:
        """As the library sees it."""
        view = native.ChunkView.from_buffer_copy(self.chunk.view)
        view.data, view.data_bytes = self.data.ctypes.data, self.data.nbytes
        if self._scales is not None:
            view.scales, view.scales_count = self._scales.ctypes.data, self._scales.size
            view.states, view.row_bytes = 0, 0
        if not self._unchecked:
            view.sums = None
        return view


def decoding_bytes(matrices: Iterable[StreamedMatrix]) -> int:
    """Memory that decoding chunks of these in Python takes at most, one at a time (`Products`); 0 where none is."""
    return max(matrix.decoding_bytes for matrix in matrices)


def expect(status: int, flaw: native.Flaw, chunks: Sequence[Chunk]) -> None:
    """Raise what a status of the library says of `chunks`: ArtifactError for a part that is not what it should be."""
    if status == native.FLAWED:
        chunk = chunks[flaw.task]
        raise (chunk.matrix.changed if flaw.changed else chunk.matrix.damaged)(chunk, flaw.part)
    if status:
        raise ValueError(f"the library refused chunks of {chunks[0].matrix.name!r} (status {status})")
