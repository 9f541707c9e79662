"""Every function of the native library once, with names, types and checks.

    caller ──arrays, addresses──► Functions ──ctypes──► wf_NAME ──status──► result, or ValueError

`wf_NAME` is the method NAME. `isa` is always the number of an instruction set (`isas`). What has to be an array of
numpy's is checked: its dtype, that it is large enough, and that it lies one number behind the other. Where tensors of
torch are multiplied too there are addresses, of memory as large as the shapes say; the library checks matrices itself.
The GIL is released meanwhile.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from waterfill.base.native_arrays import (
    F32,
    I8,
    I16,
    I64,
    U8,
    U16,
    U32,
    U64,
    Bytes,
    Floats,
    Halves,
    at,
    expect,
    expect_size,
)
from waterfill.base.native_coding import Coding
from waterfill.base.native_signatures import (
    PRODUCT,
    READY,
    ChunkView,
    Flaw,
    LayerView,
    MatrixView,
    SequenceView,
    Task,
    Vector,
    bind,
)

if TYPE_CHECKING:
    Matrices = ctypes.Array[ctypes._Pointer[MatrixView]]  # of `matrices_of`
    Addresses = ctypes.Array[ctypes.c_void_p]  # of `addresses_of`


def matrices_of(views: Iterable[MatrixView]) -> Matrices:
    """Matrices as `matmul` takes them; keeps the views alive."""
    pointers = [ctypes.pointer(view) for view in views]
    return (ctypes.POINTER(MatrixView) * len(pointers))(*pointers)


def addresses_of(places: Iterable[int]) -> Addresses:
    """Addresses as `matmul` and `run_layers` take them."""
    addresses = list(places)
    return (ctypes.c_void_p * len(addresses))(*addresses)


class Functions(Coding):
    """The functions of the library in a file.

    Raises:
        OSError: it cannot be loaded.
        WaterfillError: it was built from another header than this package's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.raw = ctypes.CDLL(str(path))  # as C has them: unchecked, for tests of what they refuse
        bind(self.raw, path)

    # ------------------------------------------------------------------------------------ the library and its machine

    def header(self) -> str:
        """Which header it was built from: `HEADER` of native_signatures."""
        return str(self.raw.wf_header().decode())

    def sizeof(self, structure: str) -> int:
        """Bytes of a structure by its name in C, as the library has it; -1 for one that it does not know."""
        return int(self.raw.wf_sizeof(structure.encode()))

    def isa(self, number: int) -> str | None:
        """Name of an instruction set, best first; None when there are no more. Some cannot be used here: `usable`."""
        name = self.raw.wf_isa(number)
        return None if name is None else str(name.decode())

    def usable(self, number: int) -> bool:
        """Whether this build and this machine have an instruction set."""
        return bool(self.raw.wf_usable(number))

    @cached_property
    def isas(self) -> dict[str, int]:
        """Every instruction set that this build and this machine share, best first: name -> number."""
        return {name: number for number, name in enumerate(self.known()) if self.usable(number)}

    def known(self) -> Iterator[str]:
        """Names of all instruction sets, best first."""
        number = 0
        while name := self.isa(number):
            yield name
            number += 1

    def set_threads(self, count: int) -> None:
        """Threads that later calls share work among: 1 is the calling thread alone, 0 the default."""
        expect("set_threads", self.raw.wf_set_threads(count))

    def set_team(self, gomp_parallel: int | None) -> None:
        """Share the threads of an OpenMP runtime, given the address of its GOMP_parallel; None: own threads."""
        expect("set_team", self.raw.wf_set_team(gomp_parallel))

    def release_memory(self) -> None:
        """Give back the memory that the calling thread keeps from call to call."""
        expect("release_memory", self.raw.wf_release_memory())

    # ------------------------------------------------------------------------------------------------------- matrices

    def rotate(self, isa: int, x: int, *, rows: int, width: int, inverse: bool) -> None:
        """The block Hadamard transform of float32 `[rows, width]`, in place, or its inverse."""
        expect("rotate", self.raw.wf_rotate(isa, x, rows, width, inverse))

    def table_new(self, isa: int, *, precision: int, units: npt.NDArray[np.int16], points: Floats) -> int:
        """Address of the table of a grid, whose points are int16 `[n, p]` units, as numbers of `precision` bits, 8 or
        16, and exactly float32 `[n, p]`. Both are copied.

        Raises:
            MemoryError: there is no memory for it, or can be no such table.
        """
        n, p = points.shape
        table = self.raw.wf_table_new(isa, p, n, precision, at(units, I16, n * p), at(points, F32, n * p))
        if not table:
            raise MemoryError(f"no memory for the table of a grid of {n} points in {p} dimensions")
        return int(table)

    def window_table_new(
        self, isa: int, *, halves: int, hashed: npt.NDArray[np.uint8], levels: npt.NDArray[np.int8]
    ) -> int:
        """Address of the tables of a bitshift trellis of `halves` / 2 bits: of its hash, uint8 `[3, 16]`, and of the
        hash's halves, int8 `[2, 16]`.

        Raises:
            MemoryError: there is no memory for it, or can be no such table.
        """
        table = self.raw.wf_window_table_new(isa, halves, at(hashed, U8, 3 * 16), at(levels, I8, 2 * 16))
        if not table:
            raise MemoryError(f"no memory for the table of a bitshift trellis of {halves / 2:g} bits")
        return int(table)

    def table_free(self, table: int) -> None:
        """Free a table, which no matrix may point to any more."""
        self.raw.wf_table_free(table)

    def codes_bytes(self, *, table: int, rows: int, width: int) -> int:
        """Bytes of a matrix's codes in the kernels' layout, given its table's address.

        Raises:
            ValueError: there can be no such matrix.
        """
        return expect_size("codes_bytes", self.raw.wf_codes_bytes(table, rows, width))

    def scales_count(self, *, rows: int, width: int) -> int:
        """Scales of a matrix in the kernels' layout.

        Raises:
            ValueError: there can be no such matrix.
        """
        return expect_size("scales_count", self.raw.wf_scales_count(rows, width))

    def arrange(
        self,
        isa: int,
        stored: MatrixView,
        *,
        word_indices: int,
        word_bytes: int,
        row_bytes: int,
        codes: int,
        scales: int,
    ) -> None:
        """A matrix as an artifact has it -> `codes` and `scales` in the kernels' layout, as large as `codes_bytes` and
        `scales_count` say.

        Args:
            word_indices: indices of each radix word, of `word_bytes`; 0: bit fields.
            row_bytes: of a row's codes.
        """
        status = self.raw.wf_arrange(isa, stored, word_indices, word_bytes, row_bytes, codes, scales)
        expect("arrange", status)

    def matmul(self, isa: int, matrices: Matrices, x: int, y: Addresses, *, dtype: int, tokens: int) -> None:
        """y_i = x W_i^T for matrices of one width: x `[tokens, in]`, y_i `[tokens, out_i]`, all of `dtype`."""
        if len(y) != len(matrices):
            raise ValueError(f"{len(matrices)} matrices and {len(y)} results; give one result for each matrix")
        expect("matmul", self.raw.wf_matmul(isa, matrices, len(matrices), x, dtype, tokens, y))

    def matmul_float(self, isa: int, matrix: MatrixView, x: int, y: int, *, dtype: int, tokens: int) -> None:
        """y = x W^T from exact grid points and float activations: x `[tokens, in]` of `dtype`, y float32
        `[tokens, out]`."""
        expect("matmul_float", self.raw.wf_matmul_float(isa, matrix, x, dtype, tokens, y))

    def rows(self, isa: int, matrix: MatrixView, ids: int, out: int, *, count: int, rotated: bool) -> None:
        """Rows of W by number: ids int64 `[count]` -> out float32 `[count, in]`, in W's own basis or rotated."""
        expect("rows", self.raw.wf_rows(isa, matrix, ids, count, rotated, out))

    # --------------------------------------------------------------------------------------------------------- layers

    def run_layers(
        self,
        isa: int,
        layers: ctypes.Array[LayerView],
        sequences: ctypes.Array[SequenceView],
        hidden: Floats,
        out: Floats,
        *,
        cosine: Floats,
        sine: Floats,
        final_norm: Vector,
        product: Any = None,
    ) -> int:
        """Consecutive tokens of several texts through all layers, text after text; weights are read once.

        Args:
            sequences: the texts, each with the memory of its keys and values, `[kv_heads, capacity, head_dim]` of the
                layers' `cache_dtype` each; `position` positions are filled, and `tokens` more are written.
            hidden: float32 `[tokens, hidden]` of all texts, changed.
            out: the same shape: behind the last layer, normalised.
            cosine, sine: float32 `[tables, tokens, head_dim]`; each layer says which table it takes.
            product: a PRODUCT that multiplies with matrices that are not in memory; None where all are.

        Returns 0, or the status that `product` left: UNANSWERED where it did not set any.
        """
        tokens, count = len(hidden), len(layers)
        width, head_dim = (layers[0].hidden, layers[0].head_dim) if count else (0, 0)
        status = self.raw.wf_run_layers(
            *(isa, layers, count, sequences, len(sequences), at(hidden, F32, tokens * width), tokens),
            *(len(cosine), *(at(table, F32, len(cosine) * tokens * head_dim) for table in (cosine, sine))),
            *(final_norm, at(out, F32, tokens * width)),
            *(product or _NO_PRODUCT, None),
        )
        return int(status)

    def decode_layer(
        self,
        isa: int,
        layer: LayerView,
        x: int,
        out: int,
        *,
        cosine: int,
        sine: int,
        keys: int,
        values: int,
        capacity: int,
        position: int,
    ) -> None:
        """One token through one layer, all of the layer's dtype: x and out `[hidden]`, cosine and sine `[head_dim]`,
        keys and values `[kv_heads, capacity, head_dim]`, of which `position` is written."""
        status = self.raw.wf_decode_layer(isa, layer, x, cosine, sine, keys, values, capacity, position, out)
        expect("decode_layer", status)

    # --------------------------------------------------------------------------------------------------------- chunks

    def activations_new(self, isa: int, table: int, x: int, *, dtype: int, tokens: int, width: int) -> int:
        """Address of activations x `[tokens, width]` of `dtype`, rotated and rounded as matrices of a table take them.

        Raises:
            MemoryError: there is no memory for them.
        """
        made = self.raw.wf_activations_new(isa, table, x, dtype, tokens, width)
        if not made:
            raise MemoryError(f"no memory for {tokens} activations of width {width}")
        return int(made)

    def activations_free(self, activations: int) -> None:
        """Free what `activations_new` gave."""
        self.raw.wf_activations_free(activations)

    def multiply_chunks(
        self, isa: int, tasks: ctypes.Array[Task], *, dtype: int, ready: Any = None, nanoseconds: npt.NDArray[np.int64]
    ) -> tuple[int, Flaw]:
        """All tasks, y of `dtype`, as a READY `ready` lets them begin, or at once. What they point to stays alive.

        Time of all threads is added to `nanoseconds`, int64 `[2]`: checksums and decoding, multiplying.

        Returns a status and what it speaks of: 0; ENDED by `ready`; FLAWED, a part is not what it should be; or another
        negative number: the tasks cannot be.
        """
        flaw, spent = Flaw(), at(nanoseconds, I64, 2)
        status = self.raw.wf_multiply_chunks(
            *(isa, tasks, len(tasks), dtype, ready or _AT_ONCE, None, spent, ctypes.byref(flaw))
        )
        return int(status), flaw

    def chunk_decode(self, isa: int, chunk: ChunkView, *, codes: Bytes, scales: Halves) -> tuple[int, Flaw]:
        """A chunk to uint8 codes and uint16 scales in the kernels' layout, as large as `codes_bytes` and `scales_count`
        say. Returns a status as `multiply_chunks` does."""
        flaw = Flaw()
        places = at(codes, U8, 0), at(scales, U16, self.scales_count(rows=chunk.rows, width=chunk.width))
        status = self.raw.wf_chunk_decode(isa, chunk, *places, ctypes.byref(flaw))
        return int(status), flaw

    def checksums(self, isa: int, data: Bytes, ends: npt.NDArray[np.uint32], sums: npt.NDArray[np.uint64]) -> None:
        """Checksums of parts that end at `ends`, uint32 `[parts]`, bytes of `data` -> uint64 `[parts]`, never 0."""
        count = len(ends)
        places = at(data, U8, 0), data.nbytes, at(ends, U32, 0), count, at(sums, U64, count)
        expect("checksums", self.raw.wf_checksums(isa, *places))


_NO_PRODUCT, _AT_ONCE = PRODUCT(), READY()  # NULL
