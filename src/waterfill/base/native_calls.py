"""Every function of the native library once, with names, types and checks.

    caller ──arrays, addresses──► Functions ──ctypes──► wf_NAME ──status──► result, or ValueError

`wf_NAME` is the method NAME. `isa` is always the number of an instruction set (`isas`). What has to be an array of
numpy's is checked: its dtype, that it is large enough, and that it lies one number behind the other. Where tensors of
torch are multiplied too there are addresses, of memory as large as the shapes say; the library checks matrices itself.
The GIL is released meanwhile.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

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

_U8, _I8, _I16, _U16, _U32, _U64, _I64, _F32 = map(np.dtype, ("u1", "i1", "i2", "u2", "u4", "u8", "i8", "f4"))
_WINDOWS, _SIDE_BY_SIDE, _COEFFICIENTS = 4096, 16, 3  # of the bitshift trellis: kWindows, kSearchLanes, …
_DAMAGED = -3  # less the number of a stream

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.uint16]  # the bits of float16


def matrices_of(views: Iterable[MatrixView]) -> Matrices:
    """Matrices as `matmul` takes them; keeps the views alive."""
    pointers = [ctypes.pointer(view) for view in views]
    return (ctypes.POINTER(MatrixView) * len(pointers))(*pointers)


def addresses_of(places: Iterable[int]) -> Addresses:
    """Addresses as `matmul` and `run_layers` take them."""
    addresses = list(places)
    return (ctypes.c_void_p * len(addresses))(*addresses)


class Functions:
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
        _expect("set_threads", self.raw.wf_set_threads(count))

    def set_team(self, gomp_parallel: int | None) -> None:
        """Share the threads of an OpenMP runtime, given the address of its GOMP_parallel; None: own threads."""
        _expect("set_team", self.raw.wf_set_team(gomp_parallel))

    def release_memory(self) -> None:
        """Give back the memory that the calling thread keeps from call to call."""
        _expect("release_memory", self.raw.wf_release_memory())

    # ------------------------------------------------------------------------------------------------------- matrices

    def rotate(self, isa: int, x: int, *, rows: int, width: int, inverse: bool) -> None:
        """The block Hadamard transform of float32 `[rows, width]`, in place, or its inverse."""
        _expect("rotate", self.raw.wf_rotate(isa, x, rows, width, inverse))

    def table_new(self, isa: int, *, precision: int, units: npt.NDArray[np.int16], points: Floats) -> int:
        """Address of the table of a grid, whose points are int16 `[n, p]` units, as numbers of `precision` bits, 8 or
        16, and exactly float32 `[n, p]`. Both are copied.

        Raises:
            MemoryError: there is no memory for it, or can be no such table.
        """
        n, p = points.shape
        table = self.raw.wf_table_new(isa, p, n, precision, _at(units, _I16, n * p), _at(points, _F32, n * p))
        if not table:
            raise MemoryError(f"no memory for the table of a grid of {n} points in {p} dimensions")
        return int(table)

    def window_table_new(self, isa: int, *, halves: int, multiplier: int, coefficients: npt.NDArray[np.int16]) -> int:
        """Address of what stands for the table of a bitshift trellis of `halves` / 2 bits, with int16 `[3]`.

        Raises:
            MemoryError: there is no memory for it, or can be no such table.
        """
        table = self.raw.wf_window_table_new(isa, halves, multiplier, _at(coefficients, _I16, _COEFFICIENTS))
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
        return _expect_size("codes_bytes", self.raw.wf_codes_bytes(table, rows, width))

    def scales_count(self, *, rows: int, width: int) -> int:
        """Scales of a matrix in the kernels' layout.

        Raises:
            ValueError: there can be no such matrix.
        """
        return _expect_size("scales_count", self.raw.wf_scales_count(rows, width))

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
        _expect("arrange", status)

    def matmul(self, isa: int, matrices: Matrices, x: int, y: Addresses, *, dtype: int, tokens: int) -> None:
        """y_i = x W_i^T for matrices of one width: x `[tokens, in]`, y_i `[tokens, out_i]`, all of `dtype`."""
        if len(y) != len(matrices):
            raise ValueError(f"{len(matrices)} matrices and {len(y)} results; give one result for each matrix")
        _expect("matmul", self.raw.wf_matmul(isa, matrices, len(matrices), x, dtype, tokens, y))

    def matmul_float(self, isa: int, matrix: MatrixView, x: int, y: int, *, dtype: int, tokens: int) -> None:
        """y = x W^T from exact grid points and float activations: x `[tokens, in]` of `dtype`, y float32
        `[tokens, out]`."""
        _expect("matmul_float", self.raw.wf_matmul_float(isa, matrix, x, dtype, tokens, y))

    def rows(self, isa: int, matrix: MatrixView, ids: int, out: int, *, count: int, rotated: bool) -> None:
        """Rows of W by number: ids int64 `[count]` -> out float32 `[count, in]`, in W's own basis or rotated."""
        _expect("rows", self.raw.wf_rows(isa, matrix, ids, count, rotated, out))

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
            *(isa, layers, count, sequences, len(sequences), _at(hidden, _F32, tokens * width), tokens),
            *(len(cosine), *(_at(table, _F32, len(cosine) * tokens * head_dim) for table in (cosine, sine))),
            *(final_norm, _at(out, _F32, tokens * width)),
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
        _expect("decode_layer", status)

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
        flaw, spent = Flaw(), _at(nanoseconds, _I64, 2)
        status = self.raw.wf_multiply_chunks(
            *(isa, tasks, len(tasks), dtype, ready or _AT_ONCE, None, spent, ctypes.byref(flaw))
        )
        return int(status), flaw

    def chunk_decode(self, isa: int, chunk: ChunkView, *, codes: Bytes, scales: Halves) -> tuple[int, Flaw]:
        """A chunk to uint8 codes and uint16 scales in the kernels' layout, as large as `codes_bytes` and `scales_count`
        say. Returns a status as `multiply_chunks` does."""
        flaw = Flaw()
        places = _at(codes, _U8, 0), _at(scales, _U16, self.scales_count(rows=chunk.rows, width=chunk.width))
        status = self.raw.wf_chunk_decode(isa, chunk, *places, ctypes.byref(flaw))
        return int(status), flaw

    def checksums(self, isa: int, data: Bytes, ends: npt.NDArray[np.uint32], sums: npt.NDArray[np.uint64]) -> None:
        """Checksums of parts that end at `ends`, uint32 `[parts]`, bytes of `data` -> uint64 `[parts]`, never 0."""
        count = len(ends)
        places = _at(data, _U8, 0), data.nbytes, _at(ends, _U32, 0), count, _at(sums, _U64, count)
        _expect("checksums", self.raw.wf_checksums(isa, *places))

    # ------------------------------------------------------------------------------------------------- entropy coding

    def rans_encode(self, symbols: Bytes, out: Bytes, *, lanes: int, frequencies: Halves) -> int | None:
        """uint8 symbols, a multiple of `lanes`, to bytes; their number. `frequencies` is uint16 `[256]`.

        None where they do not fit `out`, a symbol has no frequency, or the frequencies do not sum to 4096.
        """
        places = _at(frequencies, _U16, 256), _at(out, _U8, 0), len(out)
        size = int(self.raw.wf_rans_encode(_at(symbols, _U8, 0), len(symbols), lanes, *places))
        return None if size < 0 else size

    def rans_decode(self, isa: int, data: Bytes, out: Bytes, *, lanes: int, frequencies: Halves) -> bool:
        """Bytes to as many symbols as `out` has, a multiple of `lanes`. `frequencies` is uint16 `[256]`.

        False where they are not those of so many symbols, or the frequencies do not sum to 4096.
        """
        places = _at(frequencies, _U16, 256), len(out), _at(out, _U8, 0)
        return not self.raw.wf_rans_decode(isa, _at(data, _U8, 0), len(data), lanes, *places)

    def trellis_search(
        self, isa: int, x: Floats, out: npt.NDArray[np.int16], *, states: int, lanes: int, least: int, most: int
    ) -> None:
        """The path of the trellis code nearest to float32 x, in units of a step: int16 levels, as many, whose j lie
        between `least` and `most`."""
        count = len(x)
        places = _at(x, _F32, 0), count, lanes, least, most, _at(out, _I16, count)
        _expect("trellis_search", self.raw.wf_trellis_search(isa, states, *places))

    def bitshift_search(
        self,
        isa: int,
        *,
        levels: npt.NDArray[np.int8],
        unit: float,
        before: Sequence[Halves],
        after: Sequence[Halves],
        x: Floats,
        start: Halves,
        windows: Halves,
    ) -> None:
        """Windows of the nearest paths, uint16 `[blocks, steps, 16]`, of float32 x as large, each from its window of
        `start` on; `before` and `after` uint16 `[groups, ways]` are lists of one array for each kind of steps. A
        squared error of one level counts as `unit`."""
        blocks, steps, lanes = x.shape
        if lanes != _SIDE_BY_SIDE:
            raise ValueError(f"{lanes} sequences side by side; the library searches {_SIDE_BY_SIDE}")
        kinds = np.array([part.shape[1] for part in before], np.int32)
        lists = [np.concatenate([part.reshape(-1) for part in parts]) for parts in (before, after)]
        places = [_at(levels, _I8, _WINDOWS), unit, *(_at(part, _U16, _WINDOWS * len(kinds)) for part in lists)]
        where = _at(x, _F32, 0), _at(start, _U16, blocks * lanes), blocks, steps, _at(windows, _U16, x.size)
        status = self.raw.wf_bitshift_search(isa, *places, kinds.ctypes.data, len(kinds), *where)
        _expect("bitshift_search", status)

    def trellis_decode(
        self, isa: int, arena: Bytes, *, states: int, wide: bool, shape: tuple[int, int], codes: Bytes, scales: Halves
    ) -> int | None:
        """All streams of a matrix -> codes, a byte or two (`wide`) for each weight, and scales uint16 `[rows, groups]`.

        Returns the number of the first stream that is damaged, or None.
        """
        (rows, width), groups = shape, _groups(shape[1])
        places = _at(codes, _U8, rows * width * (2 if wide else 1)), _at(scales, _U16, rows * groups)
        source = _at(arena, _U8, 0), len(arena)
        return _damaged("trellis_decode", self.raw.wf_trellis_decode(isa, states, wide, *source, rows, width, *places))

    def lossless_capacity(self, item_bytes: int) -> int:
        """Bytes that surely suffice for a stream of numbers of so many bytes, 2 or 4."""
        return int(self.raw.wf_lossless_capacity(item_bytes))

    def lossless_encode(self, numbers: Bytes, out: Bytes, sizes: npt.NDArray[np.int64], *, item_bytes: int) -> None:
        """The bytes of numbers of `item_bytes`, 2 or 4 -> one stream per 2^18 of them: stream i in row i of uint8 out
        `[streams, capacity]`, its bytes in int64 sizes `[streams]`."""
        capacity, streams = out.shape[1], min(len(out), len(sizes))
        count = numbers.size // item_bytes
        if count > streams << 18:
            raise ValueError(f"{count} numbers do not fit {streams} streams; give room for one per 2^18 of them")
        places = _at(out, _U8, 0), capacity, _at(sizes, _I64, 0)
        _expect("lossless_encode", self.raw.wf_lossless_encode(item_bytes, _at(numbers, _U8, 0), count, *places))

    def lossless_decode(
        self, isa: int, data: Bytes, sizes: npt.NDArray[np.uint32], out: Bytes, *, item_bytes: int
    ) -> int | None:
        """Streams, each behind the one before, of uint32 `sizes` bytes -> the bytes of as many numbers as `out` holds.

        Returns the number of the first stream that is damaged, or None.
        """
        count = out.size // item_bytes
        source = _at(data, _U8, 0), len(data), _at(sizes, _U32, -(-count >> 18))
        status = self.raw.wf_lossless_decode(isa, item_bytes, *source, count, _at(out, _U8, 0))
        return _damaged("lossless_decode", status)


_NO_PRODUCT, _AT_ONCE = PRODUCT(), READY()  # NULL


def _groups(width: int) -> int:
    """Of a row: `hadamard.groups`."""
    return 1 if width < 1536 else (width + 512) // 1024


def _at(array: npt.NDArray[Any], dtype: np.dtype[Any], least: int) -> int:
    """Address of an array of at least so many numbers of `dtype`."""
    if array.dtype != dtype or array.size < least or not array.flags.c_contiguous:
        raise ValueError(
            f"the native library was given {array.dtype} {array.shape} with strides {array.strides}; give it {dtype}, "
            f"{least} numbers or more, one behind the other"
        )
    return array.ctypes.data


def _expect(name: str, status: int) -> None:
    if status:
        raise ValueError(f"wf_{name} refused its arguments (status {status})")


def _expect_size(name: str, size: int) -> int:
    if size < 0:
        raise ValueError(f"wf_{name} refused its arguments (status {size})")
    return int(size)


def _damaged(name: str, status: int) -> int | None:
    """Which stream is damaged; -2: there is not even room for what says where streams end."""
    if status == -1:
        _expect(name, status)
    return max(0, _DAMAGED - status) if status else None
