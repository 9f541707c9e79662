"""The native library: found, its instruction set chosen, its threads shared with torch.

    libwaterfill_native (native/, C++) ──ctypes──► Native ──► hadamard.rotate, kernels/native.py
                       native_signatures.py: its header      native_calls.py: its functions

Everything works without it, slower. `WATERFILL_ISA` names an instruction set (`waterfill doctor` lists them), or is
`none` for the torch reference.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from ctypes import c_void_p
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from waterfill.base import process
from waterfill.base.errors import WaterfillError, first_line
from waterfill.base.lazy import LazyMapping, torch
from waterfill.base.native_calls import Functions, addresses_of, matrices_of
from waterfill.base.native_signatures import (
    BFLOAT16,
    ENDED,
    FLAWED,
    FLOAT16,
    FLOAT32,
    GELU_TANH,
    MOST_HEAD_DIM,
    PRODUCT,
    READY,
    SILU,
    UNANSWERED,
    ChunkView,
    CodedView,
    CodingView,
    Flaw,
    LayerView,
    MatrixView,
    SequenceView,
    StageView,
    Task,
    Vector,
)

__all__ = [  # and what is defined here
    "BFLOAT16",
    "ENDED",
    "FLAWED",
    "FLOAT16",
    "FLOAT32",
    "GELU_TANH",
    "MOST_HEAD_DIM",
    "PRODUCT",
    "READY",
    "SILU",
    "UNANSWERED",
    "ChunkView",
    "CodedView",
    "CodingView",
    "Flaw",
    "LayerView",
    "MatrixView",
    "SequenceView",
    "StageView",
    "Task",
    "Vector",
    "addresses_of",
    "matrices_of",
]

ISA_VARIABLE = "WATERFILL_ISA"
FLOAT_ACTIVATIONS = "WATERFILL_ACTIVATIONS"
_NAME = {"darwin": "libwaterfill_native.dylib", "win32": "libwaterfill_native.dll"}.get(
    sys.platform, "libwaterfill_native.so"
)
DTYPES = LazyMapping(lambda: {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16})

_log = logging.getLogger("waterfill.kernels")


class Native(Functions):
    """The loaded library, and whose threads it uses."""

    shares_threads = False  # with torch

    def choose_threads(self) -> None:
        """Torch's threads, once torch is there, and until then as many of its own."""
        if self.shares_threads:
            return
        self.shares_threads = "torch" in sys.modules
        self._use(openmp_team() if self.shares_threads else None)

    def _use(self, team: int | None) -> None:
        self.set_team(team)
        self.set_threads(0 if team else threads_wanted(shared=self.shares_threads))

    @contextmanager
    def own_threads(self) -> Iterator[None]:
        """Threads of its own, as where there is no torch: they do not wait for those that other programs keep busy."""
        self._use(None)
        try:
            yield
        finally:
            self._use(openmp_team() if self.shares_threads else None)


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
    """The library, anew.

    Raises:
        WaterfillError: there is none that can be used; says why.
    """
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


def own_threads() -> AbstractContextManager[None]:
    """See `Native.own_threads`; nothing where there is no library."""
    native = library()
    return nullcontext() if native is None else native.own_threads()


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

    Raises:
        WaterfillError: the name is of none that this machine or build has.
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
