"""Entropy-coded bytes, sound or not, and what every decoder makes of them: shared by the replay of the corpus and by
`benchmarks.fuzz_streams`, which looks for new ones.

A case has to be refused by all decoders or decoded by all to the same. Native decoders read it, and write, right before
and right behind pages that may not be touched, so that a byte too far ends the process.
"""

from __future__ import annotations

import base64
import ctypes
import json
import mmap
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from waterfill.base.errors import ArtifactError
from waterfill.base.native import Native
from waterfill.codecs.entropy import DamagedError, rans
from waterfill.codecs.trellis.codec import Trellis, _decode_reference

CORPUS = Path(__file__).parents[1] / "attacks" / "streams.jsonl"
PAGE = mmap.PAGESIZE


class DisagreementError(Exception):
    """Decoders that do not do the same, or one that does not refuse in the way it should."""


@dataclass(frozen=True)
class Case:
    """`rans`: numbers are lanes and count, data 256 frequencies of 16 bits, then states and words.

    `trellis`: numbers are states, 1 for wide levels, rows and width; data is the buffer of the artifact.
    """

    kind: str
    numbers: tuple[int, ...]
    data: bytes
    name: str = ""

    def line(self) -> str:
        text = base64.b64encode(self.data).decode()
        return json.dumps({"name": self.name, "kind": self.kind, "numbers": self.numbers, "data": text})


def read_cases(path: Path = CORPUS) -> list[Case]:
    found = map(json.loads, path.read_text("ascii").splitlines())
    return [Case(c["kind"], tuple(c["numbers"]), base64.b64decode(c["data"]), c["name"]) for c in found]


def write_cases(path: Path, cases: Iterable[Case]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{case.line()}\n" for case in cases), "ascii")


def judge(case: Case, library: Native | None) -> str:
    """What all decoders make of it: "decoded", or the reference's reason to refuse. Raises DisagreementError.

    Without a library the reference is alone.
    """
    run = _judge_rans if case.kind == "rans" else _judge_trellis
    return run(case, library)


def _judge_rans(case: Case, library: Native | None) -> str:
    lanes, count = case.numbers
    frequencies, data = np.frombuffer(case.data, "<u2", 256).astype(np.uint16), case.data[512:]
    said = "decoded"
    expected = None
    try:
        expected = rans.decode_reference(data, lanes, frequencies, count).tobytes()
    except DamagedError as error:
        said = str(error)
    for isa, number in library.isas.items() if library else ():
        for low in (False, True):
            source, out = _Guarded(len(data), low), _Guarded(count, low)
            source.write(data)
            table = frequencies.ctypes.data
            status = library.raw.wf_rans_decode(number, source.address, len(data), lanes, table, count, out.address)
            _same(f"rans {isa}", expected, None if status else out.read(), status)
    if library and expected is not None:
        symbols, out = np.frombuffer(expected, np.uint8), np.empty(4 * lanes + 2 * count, np.uint8)
        size = library.raw.wf_rans_encode(
            symbols.ctypes.data, count, lanes, frequencies.ctypes.data, out.ctypes.data, len(out)
        )
        if out[: max(size, 0)].tobytes() != data:
            raise DisagreementError("decoded symbols are not encoded to the same bytes")
    return said


def _judge_trellis(case: Case, library: Native | None) -> str:
    states, wide, rows, width = case.numbers
    codec = Trellis(states, 6.0 if wide else 3.0)
    layout = codec.levels.layout((rows, width))
    sizes = rows * width * (2 if wide else 1), 2 * layout["scales"].shape[0] * layout["scales"].shape[1]
    said, expected = "decoded", None
    codes, scales = np.zeros(sizes[0], np.uint8), np.zeros(layout["scales"].shape, np.float16)
    try:
        _decode_reference(codec, np.frombuffer(case.data, np.uint8), (rows, width), codes, scales)
        expected = codes.tobytes() + scales.tobytes()
    except ArtifactError as error:
        said = f"{error.__cause__ or error}"
        refused = str(error)
    for isa, number in library.isas.items() if library else ():
        for low in (False, True):
            source, out, out_scales = _Guarded(len(case.data), low), _Guarded(sizes[0], low), _Guarded(sizes[1], low)
            source.write(case.data)
            status = library.raw.wf_trellis_decode(
                number, states, wide, source.address, len(case.data), rows, width, out.address, out_scales.address
            )
            got = None if status else out.read() + out_scales.read()
            _same(f"trellis {isa}", expected, got, status)
            if status <= -3 and f"stream {-3 - status} of" not in refused:
                raise DisagreementError(f"trellis {isa}: status {status}, the reference says: {refused}")
    return said


def _same(who: str, expected: bytes | None, got: bytes | None, status: int) -> None:
    if status == -1 and who.startswith("trellis"):  # of rans it is also a table that does not sum to 4096
        raise DisagreementError(f"{who}: refuses its arguments")
    if (expected is None) != (got is None):
        raise DisagreementError(f"{who}: {'decodes' if expected is None else 'refuses'} what the reference does not")
    if expected != got:
        raise DisagreementError(f"{who}: decodes to something else than the reference")


class _Guarded:
    """Memory that ends (or, `low`, begins) at a page that may not be touched. Kept for the next of its size."""

    _kept: dict[tuple[int, int], tuple[mmap.mmap, int]] = {}  # noqa: RUF012
    _turn = 0

    def __init__(self, size: int, low: bool) -> None:
        pages = -(-max(size, 1) // PAGE)
        _Guarded._turn = (_Guarded._turn + 1) % 4  # several of one size at a time
        key = pages, _Guarded._turn
        if key not in _Guarded._kept:
            _Guarded._kept[key] = _guarded_pages(pages)
        first = _Guarded._kept[key][1]
        self.size, self.address = size, first if low else first + pages * PAGE - size

    def write(self, data: bytes) -> None:
        ctypes.memmove(self.address, data, len(data))

    def read(self) -> bytes:
        return ctypes.string_at(self.address, self.size)


def _guarded_pages(pages: int) -> tuple[mmap.mmap, int]:
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if sys.platform.startswith("linux"):
        protect = ctypes.CDLL(None).mprotect
        protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for page in (address, address + (pages + 1) * PAGE):
            if protect(page, PAGE, 0):
                raise OSError("mprotect failed")
    return memory, address + PAGE
