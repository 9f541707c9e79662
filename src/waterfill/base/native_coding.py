"""The coding functions of the native library, with names and checks: entropy coding, and searches of trellises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from waterfill.base.native_arrays import F32, I8, I16, I64, U8, U16, U32, Bytes, Floats, Halves, at, expect, groups_of

_WINDOWS, _SIDE_BY_SIDE = 4096, 16  # of the bitshift trellis: kWindows, kSearchLanes
_DAMAGED = -3  # less the number of a stream


class Coding:
    """Of a library that is loaded as `raw`."""

    raw: Any

    def rans_encode(self, symbols: Bytes, out: Bytes, *, lanes: int, frequencies: Halves) -> int | None:
        """uint8 symbols, a multiple of `lanes`, to bytes; their number. `frequencies` is uint16 `[256]`.

        None where they do not fit `out`, a symbol has no frequency, or the frequencies do not sum to 4096.
        """
        places = at(frequencies, U16, 256), at(out, U8, 0), len(out)
        size = int(self.raw.wf_rans_encode(at(symbols, U8, 0), len(symbols), lanes, *places))
        return None if size < 0 else size

    def rans_decode(self, isa: int, data: Bytes, out: Bytes, *, lanes: int, frequencies: Halves) -> bool:
        """Bytes to as many symbols as `out` has, a multiple of `lanes`. `frequencies` is uint16 `[256]`.

        False where they are not those of so many symbols, or the frequencies do not sum to 4096.
        """
        places = at(frequencies, U16, 256), len(out), at(out, U8, 0)
        return not self.raw.wf_rans_decode(isa, at(data, U8, 0), len(data), lanes, *places)

    def trellis_search(
        self, isa: int, x: Floats, out: npt.NDArray[np.int16], *, states: int, lanes: int, least: int, most: int
    ) -> None:
        """The path of the trellis code nearest to float32 x, in units of a step: int16 levels, as many, whose j lie
        between `least` and `most`."""
        count = len(x)
        places = at(x, F32, 0), count, lanes, least, most, at(out, I16, count)
        expect("trellis_search", self.raw.wf_trellis_search(isa, states, *places))

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
        places = [at(levels, I8, _WINDOWS), unit, *(at(part, U16, _WINDOWS * len(kinds)) for part in lists)]
        where = at(x, F32, 0), at(start, U16, blocks * lanes), blocks, steps, at(windows, U16, x.size)
        status = self.raw.wf_bitshift_search(isa, *places, kinds.ctypes.data, len(kinds), *where)
        expect("bitshift_search", status)

    def trellis_decode(
        self, isa: int, arena: Bytes, *, states: int, wide: bool, shape: tuple[int, int], codes: Bytes, scales: Halves
    ) -> int | None:
        """All streams of a matrix -> codes, a byte or two (`wide`) for each weight, and scales uint16 `[rows, groups]`.

        Returns the number of the first stream that is damaged, or None.
        """
        (rows, width), groups = shape, groups_of(shape[1])
        places = at(codes, U8, rows * width * (2 if wide else 1)), at(scales, U16, rows * groups)
        source = at(arena, U8, 0), len(arena)
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
        places = at(out, U8, 0), capacity, at(sizes, I64, 0)
        expect("lossless_encode", self.raw.wf_lossless_encode(item_bytes, at(numbers, U8, 0), count, *places))

    def lossless_decode(
        self, isa: int, data: Bytes, sizes: npt.NDArray[np.uint32], out: Bytes, *, item_bytes: int
    ) -> int | None:
        """Streams, each behind the one before, of uint32 `sizes` bytes -> the bytes of as many numbers as `out` holds.

        Returns the number of the first stream that is damaged, or None.
        """
        count = out.size // item_bytes
        source = at(data, U8, 0), len(data), at(sizes, U32, -(-count >> 18))
        status = self.raw.wf_lossless_decode(isa, item_bytes, *source, count, at(out, U8, 0))
        return _damaged("lossless_decode", status)


def _damaged(name: str, status: int) -> int | None:
    """Which stream is damaged; -2: there is not even room for what says where streams end."""
    if status == -1:
        expect(name, status)
    return max(0, _DAMAGED - status) if status else None
