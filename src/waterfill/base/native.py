"""The native library: found, its instruction set chosen, and called with raw pointers.

    libwaterfill_native (native/, C++) ──ctypes──► Native ──► hadamard.rotate, kernels/native.py

Everything works without it, slower. `WATERFILL_ISA` names an instruction set (`waterfill doctor` lists them), or is
`none` for the torch reference.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from ctypes import POINTER, c_char_p, c_float, c_int, c_int64, c_void_p
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path

from waterfill.base import process
from waterfill.base.errors import WaterfillError, first_line
from waterfill.base.lazy import LazyMapping, torch

ISA_VARIABLE = "WATERFILL_ISA"
FLOAT_ACTIVATIONS = "WATERFILL_ACTIVATIONS"
VERSION = 7  # WF_VERSION in native/include/waterfill_native.h
_NAME = {"darwin": "libwaterfill_native.dylib", "win32": "libwaterfill_native.dll"}.get(
    sys.platform, "libwaterfill_native.so"
)
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2  # WF_FLOAT32 and so on
DTYPES = LazyMapping(lambda: {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16})

_log = logging.getLogger("waterfill.kernels")


class MatrixView(ctypes.Structure):
    """wf_matrix."""

    _fields_ = (
        ("rows", c_int64),
        ("width", c_int64),
        ("step", c_float),
        ("unit", c_float),
        ("table", c_void_p),
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("codes_bytes", c_int64),
        ("scales_count", c_int64),
    )


class ChunkView(ctypes.Structure):
    """wf_chunk."""

    _fields_ = (
        ("rows", c_int64),
        ("width", c_int64),
        ("part_rows", c_int64),
        ("step", c_float),
        ("unit", c_float),
        ("table", c_void_p),
        ("data", c_void_p),
        ("scales", c_void_p),
        ("states", c_int),
        ("wide", c_int),
        ("ends", c_void_p),
        ("sums", c_void_p),
        ("word_indices", c_int),
        ("word_bytes", c_int),
        ("row_bytes", c_int64),
        ("data_bytes", c_int64),
        ("scales_count", c_int64),
        ("parts", c_int64),
    )


class Task(ctypes.Structure):
    """wf_task."""

    _fields_ = (("chunk", c_void_p), ("x", c_void_p), ("y", c_void_p), ("stride", c_int64))


LAYER_MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
MOST_HEAD_DIM = 512  # kMostHeadDim in native/src/matrix.hpp
LAYER_VECTORS = ("input_norm", "post_norm", "q_norm", "k_norm", "q_bias", "k_bias", "v_bias", "o_bias")


class Vector(ctypes.Structure):
    """wf_vector."""

    _fields_ = (("numbers", c_void_p), ("count", c_int64))


class LayerView(ctypes.Structure):
    """wf_layer."""

    _fields_ = (
        *((name, c_int64) for name in ("hidden", "heads", "kv_heads", "head_dim")),
        *((name, c_float) for name in ("epsilon", "scaling")),
        ("dtype", c_int),
        ("cache_dtype", c_int),
        *((name, POINTER(MatrixView)) for name in LAYER_MATRICES),
        *((name, Vector) for name in LAYER_VECTORS),
    )


class SequenceView(ctypes.Structure):
    """wf_sequence."""

    _fields_ = (
        *((name, c_int64) for name in ("tokens", "position", "capacity")),
        ("keys", POINTER(c_void_p)),
        ("values", POINTER(c_void_p)),
        ("layers", c_int64),
        ("bytes", c_int64),
    )


PRODUCT = ctypes.CFUNCTYPE(  # wf_product
    None, c_void_p, c_int, c_int, c_int, c_void_p, c_int64, POINTER(c_void_p), POINTER(c_int)
)
UNANSWERED = -100  # WF_UNANSWERED: an exception came just as a callback was called
READY = ctypes.CFUNCTYPE(None, c_void_p, c_int64, c_int, POINTER(c_int64))  # wf_ready
_MATRIX = POINTER(MatrixView)
_CHUNK = POINTER(ChunkView)
_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "wf_version": (c_int, []),
    "wf_isa": (c_char_p, [c_int]),
    "wf_usable": (c_int, [c_int]),
    "wf_set_threads": (c_int, [c_int]),
    "wf_set_team": (c_int, [c_void_p]),
    "wf_release_memory": (c_int, []),
    "wf_rotate": (c_int, [c_int, c_void_p, c_int64, c_int64, c_int]),
    "wf_table_new": (c_void_p, [c_int, c_int, c_int, c_int, c_void_p, c_void_p]),
    "wf_table_free": (None, [c_void_p]),
    "wf_codes_bytes": (c_int64, [c_int, c_int, c_int64, c_int64]),
    "wf_scales_count": (c_int64, [c_int64, c_int64]),
    "wf_arrange": (c_int, [c_int, _MATRIX, c_int, c_int, c_int64, c_void_p, c_void_p]),
    "wf_matmul": (c_int, [c_int, POINTER(_MATRIX), c_int, c_void_p, c_int, c_int64, POINTER(c_void_p)]),
    "wf_matmul_float": (c_int, [c_int, _MATRIX, c_void_p, c_int, c_int64, c_void_p]),
    "wf_run_layers": (
        c_int,
        [
            c_int,
            c_void_p,
            c_int,
            POINTER(SequenceView),
            c_int64,
            c_void_p,
            c_int64,
            c_void_p,
            c_void_p,
            Vector,
            c_void_p,
            PRODUCT,
            c_void_p,
        ],
    ),
    "wf_decode_layer": (c_int, [c_int, *[c_void_p] * 6, c_int64, c_int64, c_void_p]),
    "wf_rows": (c_int, [c_int, _MATRIX, c_void_p, c_int64, c_int, c_void_p]),
    "wf_rans_encode": (c_int64, [c_void_p, c_int64, c_int, c_void_p, c_void_p, c_int64]),
    "wf_rans_decode": (c_int, [c_int, c_void_p, c_int64, c_int, c_void_p, c_int64, c_void_p]),
    "wf_trellis_search": (c_int, [c_int, c_int, c_void_p, c_int64, c_int, c_int, c_int, c_void_p]),
    "wf_trellis_decode": (c_int64, [c_int, c_int, c_int, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p]),
    "wf_activations_new": (c_void_p, [c_int, c_void_p, c_void_p, c_int, c_int64, c_int64]),
    "wf_activations_free": (None, [c_void_p]),
    "wf_multiply_chunks": (c_int64, [c_int, POINTER(Task), c_int64, c_int, READY, c_void_p, c_void_p]),
    "wf_chunk_decode": (c_int64, [c_int, _CHUNK, c_void_p, c_void_p]),
    "wf_checksums": (c_int, [c_int, c_void_p, c_int64, c_void_p, c_int64, c_void_p]),
    "wf_lossless_capacity": (c_int64, [c_int]),
    "wf_lossless_encode": (c_int, [c_int, c_void_p, c_int64, c_void_p, c_int64, c_void_p]),
    "wf_lossless_decode": (c_int64, [c_int, c_int, c_void_p, c_int64, c_void_p, c_int64, c_void_p]),
}


class Native:
    """The loaded library. Raises OSError where it cannot be loaded, WaterfillError where it is of another version."""

    shares_threads = False  # with torch

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        if (version := self._library.wf_version()) != VERSION:
            raise WaterfillError(
                f"{path} has version {version}, this waterfill needs {VERSION}; install waterfill again"
            )
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.restype, function.argtypes = result, arguments

    def __getattr__(self, name: str) -> ctypes._FuncPointer:
        """The C function `wf_name`; one that returns a status is called through `call`."""
        return getattr(self._library, f"wf_{name}")  # type: ignore[no-any-return]

    @cached_property
    def isas(self) -> dict[str, int]:
        """Every instruction set that this build and this machine share, best first: name -> number."""
        return {name: number for number, name in self._named() if self._library.wf_usable(number)}

    def _named(self) -> Iterator[tuple[int, str]]:
        number = 0
        while name := self._library.wf_isa(number):
            yield number, name.decode()
            number += 1

    def call(self, name: str, *arguments: object) -> None:
        """Call a function that returns a status. The GIL is released meanwhile."""
        status = getattr(self._library, f"wf_{name}")(*arguments)
        if status:
            raise ValueError(f"wf_{name} refused its arguments (status {status})")

    def choose_threads(self) -> None:
        """Torch's threads, once torch is there, and until then as many of its own."""
        if self.shares_threads:
            return
        self.shares_threads = "torch" in sys.modules
        team = openmp_team() if self.shares_threads else None
        self.set_team(team)
        self.set_threads(0 if team else threads_wanted(shared=self.shares_threads))


@lru_cache(maxsize=1)
def library() -> Native | None:
    """The library, or None where it was not built or cannot be loaded."""
    try:
        native = load()
    except WaterfillError:
        return None
    native.choose_threads()
    return native


def load() -> Native:
    """The library, anew. Raises WaterfillError where there is none that can be used; says why."""
    path = find()
    if path is None:
        raise WaterfillError("it was not built; install waterfill again where there are CMake and a C++ compiler")
    try:
        return Native(path)
    except (OSError, AttributeError) as error:
        raise WaterfillError(first_line(error)) from error


def share_threads() -> None:
    """Have the library use torch's threads, where torch was imported after the library was loaded.

    The thread that calls this is the one whose products are divided among them.
    """
    if (native := library()) is not None:
        native.choose_threads()


def threads() -> int:
    """How many threads share the work of a product."""
    native = library()
    return threads_wanted(shared="torch" in sys.modules if native is None else native.shares_threads)


def threads_wanted(*, shared: bool) -> int:
    """As many as torch has been told to use or, without torch, as OpenMP would."""
    if shared:
        return torch.get_num_threads()
    told = os.environ.get("OMP_NUM_THREADS", "")
    if told.isdecimal() and int(told) > 0:
        return int(told)
    return process.usable_cpus()


def openmp_team() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that torch has loaded, or None.

    Idle threads of OpenMP spin for milliseconds; a second pool would run against them for the same cores.
    """
    if sys.platform == "win32":
        return None
    function = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    return None if function is None else ctypes.cast(function, c_void_p).value


def find() -> Path | None:
    """The library's file, in the package or, for an editable install, where the build put it."""
    spec = find_spec("waterfill")
    package = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    folders = [*package, *_site_packages()]
    return next((folder / _NAME for folder in folders if (folder / _NAME).is_file()), None)


def _site_packages() -> Sequence[Path]:
    return [Path(entry) / "waterfill" for entry in sys.path if entry.endswith("-packages")]


def float_activations() -> bool:
    """Whether the user wants activations as they are, for exactness, much slower."""
    return os.environ.get(FLOAT_ACTIVATIONS) == "float"


@lru_cache(maxsize=1)
def isa() -> str | None:
    """Name of the instruction set in use: the best one, or WATERFILL_ISA's. None is the torch reference; says why once.

    Raises WaterfillError for a name that this machine or build does not have.
    """
    wanted = os.environ.get(ISA_VARIABLE, "")
    native = library()
    names = list(native.isas) if native else []
    if wanted and wanted not in [*names, "none"]:
        raise WaterfillError(
            f"{ISA_VARIABLE} is {wanted!r}, which this machine or build does not have; choose one of "
            f"{', '.join([*names, 'none'])}"
        )
    chosen = None if wanted == "none" else wanted or next(iter(names), None)
    if chosen is None:
        _log.warning("torch computes in place of the native library, which is slow: %s", why_not())
    return chosen


def why_not() -> str:
    """Why `isa` is None: what keeps the library from being used."""
    if os.environ.get(ISA_VARIABLE) == "none":
        return f"{ISA_VARIABLE} is none"
    try:
        load()
    except WaterfillError as error:
        return str(error)
    return "it has no instruction set of this machine"
