"""Streams to begin with, and what the fuzzer does to them.

seeds ──► Mutator: bytes (flips, cuts, splices), lies (lengths, heads, tables, shapes) ──► Case
                   or streams made from nothing: any head, any table, symbols coded as they say
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
import torch

from tests.support.stream_cases import Case
from waterfill.codecs.entropy import from_counts, gaussian, lanes_for, rans
from waterfill.codecs.entropy.fields import pack_fields
from waterfill.codecs.hadamard import groups
from waterfill.codecs.trellis import bitstream
from waterfill.codecs.trellis.code import CODES, offset
from waterfill.codecs.trellis.codec import Trellis

EDGES = (0, 1, 2, 0x0F, 0x10, 0x1F, 0x20, 0x3F, 0x40, 0x7F, 0x80, 0xFE, 0xFF)
EDGES_32 = (0, 1, 0xFFFF, 0x10000, 0x10001, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
UNITS = (0.0, -0.0, 1e-45, 1e-38, 6e-8, 1.0, 65503.9, 65504.0, -1.0, float("inf"), float("nan"))
MATRICES = ((1, 1), (3, 5), (4, 96), (8, 700), (2, 1536), (5, 2500), (4, 33000))
SEVERAL = (5, 70_000)  # two streams
RATES = (0.4, 1.0, 2.0, 3.0, 4.4, 6.0, 8.5)


def seeds(rng: np.random.Generator) -> list[Case]:
    """Sound cases of every kind that an encoder writes."""
    found: list[Case] = []
    for states in CODES:
        shapes = MATRICES if states in (1, 64) else MATRICES[:6]
        found += [encoded(shape, states, float(rng.choice(RATES)), rng) for shape in shapes]
    found.append(encoded(SEVERAL, 8, 1.0, rng))
    return [*found, *(coded_symbols(rng) for _ in range(40))]


def encoded(shape: tuple[int, int], states: int, rate: float, rng: np.random.Generator) -> Case:
    codec = Trellis(states, rate)
    weight = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32) * np.float32(rng.choice((1e-3, 1.0, 30.0))))
    data = codec.encode(weight).buffers["streams"].numpy().tobytes()
    return Case("trellis", (states, int(codec.wide), *shape), data)


def coded_symbols(rng: np.random.Generator) -> Case:
    """Symbols of a random distribution, coded in 1 to 32 lanes."""
    lanes = 1 << int(rng.integers(0, 6))
    count = lanes * int(rng.integers(0, 120))
    frequencies = any_table(rng, int(rng.integers(1, 257)))
    symbols = draw(rng, frequencies, count)
    return Case("rans", (lanes, count), frequencies.astype("<u2").tobytes() + rans.encode(symbols, lanes, frequencies))


def any_table(rng: np.random.Generator, symbols: int) -> rans.Frequencies:
    counts = rng.geometric(float(rng.choice((0.5, 0.01, 1e-4))), symbols) - 1
    counts[rng.random(symbols) < rng.choice((0.0, 0.5, 0.95))] = 0
    if not counts.sum():
        counts[int(rng.integers(symbols))] = 1
    return from_counts(counts.astype(np.int64))


def draw(rng: np.random.Generator, frequencies: rans.Frequencies, count: int) -> rans.Symbols:
    return rng.choice(256, count, p=frequencies / frequencies.sum()).astype(np.uint8)


class Mutator:
    """Cases without end, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._seeds = seeds(self._rng)
        self._pool = list(self._seeds)

    def cases(self) -> Iterator[Case]:
        """The seeds, then what becomes of them."""
        yield from self._seeds
        while True:
            yield self._next()

    def _next(self) -> Case:
        """A seed, or what was interesting, changed once to four times; or a stream made from nothing."""
        if self._rng.random() < 0.2:
            return self._renamed("made", coded_symbols(self._rng) if self._rng.random() < 0.2 else self._made())
        case = self._one_of(self._pool)
        for _ in range(int(self._rng.integers(1, 5))):
            change = self._one_of(self._changes(case))
            case = self._renamed(change.__name__.lstrip("_"), change(case))
        return case

    def keep(self, case: Case) -> None:
        """Change this one, too."""
        self._pool.append(replace(case, name=""))
        if len(self._pool) > 400:
            del self._pool[len(self._seeds)]

    def _changes(self, case: Case) -> Sequence[Callable[[Case], Case]]:
        of_bytes = (
            self._flip,
            self._set,
            self._cut,
            self._extend,
            self._delete,
            self._insert,
            self._splice,
            self._copy,
        )
        if case.kind == "rans":
            return (*of_bytes, self._counts, self._frequencies)
        return (*of_bytes, self._shape, self._head, self._head, self._index, self._number)

    # Bytes

    def _flip(self, case: Case) -> Case:
        data = bytearray(case.data)
        for _ in range(int(self._rng.integers(1, 9)) if data else 0):
            data[self._place(data)] ^= 1 << int(self._rng.integers(8))
        return replace(case, data=bytes(data))

    def _set(self, case: Case) -> Case:
        data = bytearray(case.data)
        if data:
            data[self._place(data)] = self._one_of(EDGES)
        return replace(case, data=bytes(data))

    def _cut(self, case: Case) -> Case:
        return self._with(case, case.data[: int(self._rng.integers(len(case.data) + 1))])

    def _extend(self, case: Case) -> Case:
        more = self._rng.bytes(int(self._rng.integers(1, 65)))
        return self._with(case, case.data + (more if self._rng.random() < 0.5 else bytes(len(more))))

    def _delete(self, case: Case) -> Case:
        first, last = sorted(self._rng.integers(0, len(case.data) + 1, 2).tolist())
        return self._with(case, case.data[:first] + case.data[min(last, first + 16) :])

    def _insert(self, case: Case) -> Case:
        at = int(self._rng.integers(len(case.data) + 1))
        return self._with(case, case.data[:at] + self._rng.bytes(int(self._rng.integers(1, 17))) + case.data[at:])

    def _splice(self, case: Case) -> Case:
        other = self._one_of([c for c in self._pool if c.kind == case.kind]).data
        at = int(self._rng.integers(len(case.data) + 1))
        return self._with(case, case.data[:at] + other[int(self._rng.integers(len(other) + 1)) :])

    def _copy(self, case: Case) -> Case:
        data = bytearray(case.data)
        if data:
            size = int(self._rng.integers(1, min(64, len(data)) + 1))
            source, target = self._rng.integers(0, len(data) - size + 1, 2).tolist()
            data[target : target + size] = data[source : source + size]
        return replace(case, data=bytes(data))

    # Lies

    def _counts(self, case: Case) -> Case:
        lanes, count = case.numbers
        lanes = self._one_of((lanes, 1, 2, 4, 8, 16, 32))
        count = max(0, count // lanes + self._one_of((-1, 0, 1, 40))) * lanes
        return replace(case, numbers=(lanes, count))

    def _frequencies(self, case: Case) -> Case:
        table = np.frombuffer(case.data, "<u2", 256).copy()
        a, b = self._rng.integers(0, 256, 2)
        moved = min(int(table[a]), int(self._rng.integers(1, 5000)))
        table[a] -= moved
        table[b] = (int(table[b]) + self._one_of((moved, moved, moved + 1, 65535, 61440 + moved))) & 0xFFFF
        return self._with(case, table.tobytes() + case.data[512:])

    def _shape(self, case: Case) -> Case:
        states, wide, rows, width = case.numbers
        which = int(self._rng.integers(4))
        if which == 0:
            states = self._one_of(tuple(CODES))
        elif which == 1:
            wide = 1 - wide
        elif which == 2:
            rows = max(1, rows + self._one_of((-1, 1, 4)))
        else:
            width = max(1, width + self._one_of((-1, 1, 3, 1024)))
        return replace(case, numbers=(states, wide, rows, width))

    def _head(self, case: Case) -> Case:
        """One field of the head of a stream."""
        data, at = bytearray(case.data), self._stream(case)
        if at + bitstream.HEADER_BYTES > len(data):
            return case
        which = int(self._rng.integers(6))
        if which == 0:
            data[at] = self._one_of((0, 1, 2, 3, 4, 8, *range(0x10, 0x80, 0x10), 0xFF))
        elif which < 4:
            data[at + which] = self._one_of((*EDGES, int(self._rng.integers(256))))
        elif which == 4:
            struct.pack_into("<f", data, at + 4, self._one_of(UNITS))
        else:
            data[at + int(self._rng.integers(8))] ^= 1 << int(self._rng.integers(8))
        return replace(case, data=bytes(data))

    def _number(self, case: Case) -> Case:
        """A parameter, an entry of a table or a state."""
        data, at = bytearray(case.data), self._stream(case) + bitstream.HEADER_BYTES
        at += int(self._rng.integers(0, 48))
        if at + 4 > len(data):
            return case
        struct.pack_into("<I", data, at, self._one_of(EDGES_32))
        return replace(case, data=bytes(data))

    def _index(self, case: Case) -> Case:
        data, count = bytearray(case.data), self._streams(case)
        if 4 * count > len(data):
            return case
        end = self._one_of(
            (*EDGES_32, len(data), len(data) + 1, 4 * count, 4 * count - 1, int(self._rng.integers(1 << 32)))
        )
        struct.pack_into("<I", data, 4 * int(self._rng.integers(count)), end)
        return replace(case, data=bytes(data))

    def _made(self) -> Case:
        """A matrix of one stream that keeps the rules, or nearly, but that no encoder would write."""
        rng = self._rng
        states, wide = self._one_of(tuple(CODES)), int(rng.random() < 0.5)
        rows, width = self._one_of(((1, 1), (2, 7), (4, 300), (3, 1024), (7, 1600), (4, 32768)))
        small = rows * width < 20_000
        least, most = bitstream.bounds(states, bool(wide))
        raw_bits = self._one_of(range(7)) if wide and rng.random() < 0.6 else 0
        most_symbols = min(256, (most - least + 1) >> raw_bits)
        symbols = int(rng.integers(1, most_symbols + 1)) if small else self._one_of((1, 2, 3))
        low, high = max(0, symbols - ((most + 1) >> raw_bits)), min(symbols - 1, -least >> raw_bits)
        center = int(rng.integers(low, high + 1)) if low <= high else int(rng.integers(symbols))
        center = min(255, max(0, center + (self._one_of((-1, 1)) if rng.random() < 0.03 else 0)))
        with_levels = not raw_bits and symbols <= 16 and rng.random() < 0.3
        with_table = rng.random() < 0.5
        frequencies = any_table(rng, symbols)
        tables = pack_fields(frequencies[:symbols].astype(np.int64) & 4095, 12)
        if not with_table:
            parameter = self._one_of((*EDGES_32, int(rng.integers(1 << 32)), (1 << 32) - int(rng.integers(1, 1 << 20))))
            tables = struct.pack("<I", parameter)
            with suppress(ValueError):  # where there is no such table, any will do for the symbols
                frequencies = gaussian(parameter, symbols, min(center, symbols), offset(states))
        scale_bits = self._one_of((0, 0, 1, 3, 8))
        scale_codes = rng.integers(0, 1 << scale_bits, rows * len(groups(width)))
        count = bitstream.padded(rows * width)
        payload = rans.encode(draw(rng, frequencies, count), lanes_for(rows * width), frequencies)
        raw = pack_fields(rng.integers(0, 1 << raw_bits, count), raw_bits)
        flags = int(with_table) | 2 * with_levels | raw_bits << 4
        head = bitstream.HEADER.pack(flags, symbols - 1, center, scale_bits, self._one_of((*UNITS[:7], 0.02, 0.02)))
        levels = rng.integers(-128, 128, symbols).astype(np.int8).tobytes() if with_levels else b""
        body = head + pack_fields(scale_codes, scale_bits) + tables + levels + raw + payload
        return Case("trellis", (states, wide, rows, width), struct.pack("<I", 4 + len(body)) + body)

    # Helpers

    def _with(self, case: Case, data: bytes) -> Case:
        """The same with other bytes; for a matrix of one stream, half the time its index says so."""
        if case.kind == "rans":
            return replace(case, data=data) if len(data) >= 512 else case
        if self._streams(case) == 1 and len(data) >= 4 and self._rng.random() < 0.5:
            data = struct.pack("<I", len(data)) + data[4:]
        return replace(case, data=data)

    def _streams(self, case: Case) -> int:
        _, _, rows, width = case.numbers
        return -(-rows // bitstream.stream_rows(width))

    def _stream(self, case: Case) -> int:
        """Where one of the streams begins."""
        count = self._streams(case)
        which = int(self._rng.integers(count))
        if which == 0 or 4 * count > len(case.data):
            return 4 * count
        return min(struct.unpack_from("<I", case.data, 4 * (which - 1))[0], len(case.data))

    def _place(self, data: bytearray) -> int:
        """Half the time near the beginning, where the heads are."""
        near = min(len(data), 64) if self._rng.random() < 0.5 else len(data)
        return int(self._rng.integers(near))

    def _one_of(self, things):  # type: ignore[no-untyped-def]
        return things[int(self._rng.integers(len(things)))]

    @staticmethod
    def _renamed(name: str, case: Case) -> Case:
        return replace(case, name=f"{case.name}+{name}".lstrip("+"))
