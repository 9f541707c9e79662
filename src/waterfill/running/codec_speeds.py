"""How fast this machine multiplies with each codec: some seconds of measuring, once, and kept.

    codec ──a matrix in a file──► StreamedMatrix ──┬── as it was read: checked, decoded or arranged, multiplied
                                                   └── as it lies in memory: multiplied

It goes the way that a streamed model's chunks go, so whatever the library does with a codec is what is measured.
Products take turns: each matrix comes round again after all the others, which few caches hold, and what other programs
take for a while is taken from all of them. They only slow products down, so the best of its rounds counts; where they
have much of the processors, nothing is kept. Threads are the library's own, as the engine's are.

    cache folder / speeds / KEY.json     of a machine, an instruction set, so many threads and a build of the library
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch

from waterfill import kernels
from waterfill.base import machine, native, typed
from waterfill.base.cache import cache_folder
from waterfill.base.dtypes import ITEM_BYTES
from waterfill.base.errors import WaterfillError, first_line
from waterfill.base.progress import Progress, stage
from waterfill.base.reading import read_text
from waterfill.base.version import __version__
from waterfill.base.writing import write_file
from waterfill.codecs import MemoryForm, get_codec
from waterfill.files.artifact.header import StoredBuffer, StoredTensor
from waterfill.planning.speed import CodecSpeed, Speeds, timed_codecs
from waterfill.running.streaming import Activations, Storage, StreamedMatrix, View
from waterfill.running.streaming.chunks import PART_WEIGHTS, ChunkData

VERSION = 1  # of what is kept: another way to measure is another one
WIDTH = 4096  # of rows, as in large models: narrow ones take longer per weight
PARTS = 8  # of a matrix, or as many as keep all threads busy: 2^18 weights each
PARTS_PER_THREAD = 2
ROUNDS, ENOUGH_S = 8, 2.5  # at most; at least one round
CALM = 0.6  # share of the processors' time that is ours, for speeds to be kept
MEASURING = "timing products"

_log = logging.getLogger(__name__)


def codec_speeds(names: Sequence[str], *, kept: bool = True, progress: Progress | None = None) -> Speeds:
    """Speeds of these codecs on this machine, with the instruction set in use; what was measured before is read.

    Args:
        kept: whether what is measured is kept on disk, and used again.
    """
    native.share_threads()  # as many as torch has been told to use
    cpu, isa, threads = machine.cpu_name(), native.isa() or kernels.STORED, native.threads()
    file = speeds_file(cpu, isa, threads) if kept else None
    known = {} if file is None else _load(file)
    wanted = timed_codecs(names)
    if missing := [name for name in wanted if name not in known]:
        found, share = measure(missing, progress)
        known |= found
        if share < CALM:
            _log.warning(
                "other programs have %.0f %% of the processors: products may be faster than was measured now, and are "
                "measured again the next time",
                100 * (1 - share),
            )
        elif file is not None:
            _write(file, known)
    return Speeds(cpu, isa, threads, {name: known[name] for name in wanted})


def speeds_file(cpu: str, isa: str, threads: int) -> Path:
    """Where speeds are kept; it need not exist."""
    library = native.find()
    build = b"" if library is None else library.read_bytes()
    key = (VERSION, __version__, cpu, machine.memory_bytes(), isa, threads, native.float_activations())
    digest = blake2b(repr(key).encode() + build, digest_size=8).hexdigest()
    return cache_folder() / "speeds" / f"{digest}.json"


def measure(names: Sequence[str], progress: Progress | None = None) -> tuple[dict[str, CodecSpeed], float]:
    """Seconds per weight of each of these, and the share of the processors' time that measuring them got."""
    parts = 1 if native.isa() is None else max(PARTS, PARTS_PER_THREAD * native.threads())
    nothing = np.zeros(2, np.int64)
    with (
        stage(progress, MEASURING, len(names) + ROUNDS) as advance,
        native.own_threads(),
        tempfile.TemporaryDirectory() as folder,
        Activations(View.of_array(np.ones((1, WIDTH), np.float32))) as x,
    ):
        products: list[tuple[ChunkData, View]] = []
        for name in names:
            products += _products(name, parts, Path(folder) / "matrix")
            advance()
        times = np.empty((0, len(products)))
        begun_s, worked_s = time.perf_counter(), time.process_time()
        for number in range(1 + ROUNDS):  # tables are made in the first, which does not count
            taken = []
            for data, y in products:
                start_s = time.perf_counter()
                data.multiply(x, y, nothing)
                taken.append((time.perf_counter() - start_s) / data.chunk.weights)
            if number:
                times = np.vstack([times, taken])
                advance()
            if number and time.perf_counter() - begun_s > ENOUGH_S:
                break
        elapsed_s, worked_s = time.perf_counter() - begun_s, time.process_time() - worked_s
    pairs = zip(names, times.min(0).reshape(-1, 2).tolist(), strict=True)
    found = {name: CodecSpeed(resident, streamed) for name, (streamed, resident) in pairs}
    return found, worked_s / (elapsed_s * native.threads())  # threads that wait for one another spin


def _products(name: str, parts: int, file: Path) -> list[tuple[ChunkData, View]]:
    """A matrix of a codec as it was read, and as it lies in memory, and where their products go."""
    matrix = _stored(name, parts, file)
    whole = matrix.whole(verify=False)
    matrix.check(whole.chunk, whole.data)
    read = ChunkData(whole.chunk, whole.data, unchecked=True)
    y = View.of_array(np.empty((1, matrix.shape[0]), np.float32))
    return [(read, y), (whole.arrange(), y)]


def _stored(name: str, parts: int, file: Path) -> StreamedMatrix:
    """A matrix of so many equal parts, in a file that is there for as long as nobody writes another one."""
    codec, place = get_codec(name), 0
    cut = codec.parts((WIDTH, WIDTH), PART_WEIGHTS)
    buffers: list[StoredBuffer] = []
    with file.open("wb") as out:
        for key, (dtype, content) in _part(name, cut.rows).items():
            if key == cut.key and not cut.row_bytes:
                size = len(content)
                ends = 4 * parts + size * np.arange(1, parts + 1)
                content = ends.astype("<u4").tobytes() + parts * content
            else:
                content = parts * content
            out.write(content)
            shape = (len(content) // ITEM_BYTES[dtype],)
            buffers.append(StoredBuffer(f"{name}.{key}", dtype, shape, file, place, ""))
            place += len(content)
    tensor = StoredTensor(name, name, (parts * cut.rows, WIDTH), "F32", tuple(buffers), exponent=0, t2=0.0)
    return StreamedMatrix(tensor, Storage(direct=False), verify=False, part_weights=PART_WEIGHTS)


def _part(name: str, rows: int) -> dict[str, tuple[str, bytes]]:
    """Dtype and bytes of every buffer of one part, without the index: any codes where codes are multiplied as they are,
    else of encoded noise."""
    codec, shape = get_codec(name), (rows, WIDTH)
    layout = codec.layout(shape)
    if isinstance(codec, MemoryForm):
        draw = np.random.default_rng(0)
        some = {"scales": np.ones(layout["scales"].shape, np.float16).tobytes()}
        some["codes"] = draw.bytes(rows * layout["codes"].row_bytes)
        return {key: (part.dtype, some[key]) for key, part in layout.items()}
    encoded = codec.encode(torch.randn(shape, generator=torch.Generator().manual_seed(0))).buffers
    found = {}
    for key, part in layout.items():
        content = encoded[key].contiguous().view(torch.uint8).numpy().tobytes()
        if part.row_bytes:
            found[key] = part.dtype, content[: rows * part.row_bytes]
        else:  # one part, behind its end
            found[key] = part.dtype, content[4 : int.from_bytes(content[:4], "little")]
    return found


@dataclass(frozen=True)
class _Kept:
    codecs: Mapping[str, CodecSpeed]


def _load(file: Path) -> dict[str, CodecSpeed]:
    try:
        kept: _Kept = typed.read(_Kept, json.loads(read_text(file)))
    except (OSError, ValueError, RecursionError):
        return {}
    return dict(kept.codecs)


def _write(file: Path, known: Mapping[str, CodecSpeed]) -> None:
    try:
        write_file(file, json.dumps(asdict(_Kept(known)), indent=1) + "\n")
    except WaterfillError as error:
        _log.warning("how fast products are cannot be kept in %s (%s)", file.parent, first_line(error))
