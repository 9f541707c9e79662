"""native/include/waterfill_native.h in ctypes: its structures, callbacks, constants, and the types of its functions.

    waterfill_native.h ──by hand──► this file ──► native_calls.py, native_coding.py (with names and checks)

`HEADER` says which header this mirror is of. A library that was built from another one is refused when it is loaded,
and so is one whose structures have other sizes; a test compares every line with the header.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_float, c_int, c_int64, c_void_p
from pathlib import Path

from waterfill.base.errors import WaterfillError

HEADER = "0853bc0e29164fe0"  # of the header's SHA-256, without carriage returns; native/CMakeLists.txt computes it too
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2  # WF_FLOAT32 and so on
SILU, GELU_TANH = 0, 1  # WF_SILU, WF_GELU_TANH
UNANSWERED = -100  # WF_UNANSWERED: an exception came just as a callback was called
ENDED, FLAWED = 1, -3  # WF_ENDED, WF_FLAWED
MOST_HEAD_DIM = 512  # kMostHeadDim in native/src/matrix.hpp
LAYER_MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
LAYER_VECTORS = (
    *("input_norm", "post_norm", "q_norm", "k_norm", "q_bias", "k_bias", "v_bias", "o_bias", "o_norm", "down_norm"),
)


class MatrixView(ctypes.Structure):
    """wf_matrix: a packed matrix in the kernels' layout or, for `arrange`, as stored."""

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


class Vector(ctypes.Structure):
    """wf_vector: a norm's weight or a bias."""

    _fields_ = (("numbers", c_void_p), ("count", c_int64))


class LayerView(ctypes.Structure):
    """wf_layer: a decoder layer of the Llama kind. The header has the shapes."""

    _fields_ = (
        *((name, c_int64) for name in ("hidden", "heads", "kv_heads", "head_dim")),
        *((name, c_float) for name in ("epsilon", "scaling")),
        ("dtype", c_int),
        ("cache_dtype", c_int),
        *((name, POINTER(MatrixView)) for name in LAYER_MATRICES),
        *((name, Vector) for name in LAYER_VECTORS),
        ("window", c_int64),
        ("activation", c_int),
        ("rotary", c_int),
    )


class CodedView(ctypes.Structure):
    """wf_coded: keys or values by codes, and some of them as they are."""

    _fields_ = (
        ("bits", c_int),
        ("unit", c_float),
        ("levels", c_void_p),
        ("whole", POINTER(c_void_p)),
        ("bytes", c_int64),
        ("whole_bytes", c_int64),
    )


class CodingView(ctypes.Structure):
    """wf_coding: which tokens of a text are seen by codes."""

    _fields_ = (
        ("keys", CodedView),
        ("values", CodedView),
        *((name, c_int64) for name in ("first", "recent", "ring", "kept_from", "coded")),
    )


class SequenceView(ctypes.Structure):
    """wf_sequence: a text that a pass reads on in."""

    _fields_ = (
        *((name, c_int64) for name in ("tokens", "position", "capacity")),
        ("keys", POINTER(c_void_p)),
        ("values", POINTER(c_void_p)),
        ("layers", c_int64),
        ("bytes", c_int64),
        ("coding", POINTER(CodingView)),
    )


class StageView(ctypes.Structure):
    """wf_stage: streams of a stage of a nested matrix."""

    _fields_ = (
        ("data", c_void_p),
        ("ends", c_void_p),
        ("data_bytes", c_int64),
        ("parts", c_int64),
        ("wide", c_int),
    )


class ChunkView(ctypes.Structure):
    """wf_chunk: consecutive rows of a matrix."""

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
        ("gains", c_void_p),
        ("stages", POINTER(StageView)),
        ("stage_count", c_int64),
    )


class Task(ctypes.Structure):
    """wf_task: a chunk times prepared activations."""

    _fields_ = (("chunk", c_void_p), ("x", c_void_p), ("y", c_void_p), ("stride", c_int64))


class Flaw(ctypes.Structure):
    """wf_flaw: the first part that is not what it should be; `changed` since it was first read, or else damaged."""

    task: int
    part: int
    changed: int
    _fields_ = (("task", c_int64), ("part", c_int64), ("changed", c_int))


STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "wf_matrix": MatrixView,
    "wf_vector": Vector,
    "wf_layer": LayerView,
    "wf_coded": CodedView,
    "wf_coding": CodingView,
    "wf_sequence": SequenceView,
    "wf_stage": StageView,
    "wf_chunk": ChunkView,
    "wf_task": Task,
    "wf_flaw": Flaw,
}

PRODUCT = ctypes.CFUNCTYPE(  # wf_product
    None, c_void_p, c_int, c_int, c_int, c_void_p, c_int64, POINTER(c_void_p), POINTER(c_int)
)
READY = ctypes.CFUNCTYPE(None, c_void_p, c_int64, c_int, POINTER(c_int64))  # wf_ready
_MATRIX = POINTER(MatrixView)

# Pointers to numbers are void here: they are given as addresses.
SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "wf_header": (c_char_p, []),
    "wf_sizeof": (c_int64, [c_char_p]),
    "wf_isa": (c_char_p, [c_int]),
    "wf_usable": (c_int, [c_int]),
    "wf_set_threads": (c_int, [c_int]),
    "wf_set_team": (c_int, [c_void_p]),
    "wf_release_memory": (c_int, []),
    "wf_rotate": (c_int, [c_int, c_void_p, c_int64, c_int64, c_int]),
    "wf_table_new": (c_void_p, [c_int, c_int, c_int, c_int, c_void_p, c_void_p]),
    "wf_table_free": (None, [c_void_p]),
    "wf_window_table_new": (c_void_p, [c_int, c_int, c_void_p, c_void_p]),
    "wf_codes_bytes": (c_int64, [c_void_p, c_int64, c_int64]),
    "wf_scales_count": (c_int64, [c_int64, c_int64]),
    "wf_arrange": (c_int, [c_int, _MATRIX, c_int, c_int, c_int64, c_void_p, c_void_p]),
    "wf_matmul": (c_int, [c_int, POINTER(_MATRIX), c_int, c_void_p, c_int, c_int64, POINTER(c_void_p)]),
    "wf_matmul_float": (c_int, [c_int, _MATRIX, c_void_p, c_int, c_int64, c_void_p]),
    "wf_run_layers": (
        c_int,
        [
            *(c_int, POINTER(LayerView), c_int, POINTER(SequenceView), c_int64, c_void_p, c_int64),
            *(c_int, c_void_p, c_void_p, Vector, c_void_p, PRODUCT, c_void_p),
        ],
    ),
    "wf_decode_layer": (c_int, [c_int, POINTER(LayerView), *[c_void_p] * 5, c_int64, c_int64, c_void_p]),
    "wf_rows": (c_int, [c_int, _MATRIX, c_void_p, c_int64, c_int, c_void_p]),
    "wf_rans_encode": (c_int64, [c_void_p, c_int64, c_int, c_void_p, c_void_p, c_int64]),
    "wf_rans_decode": (c_int, [c_int, c_void_p, c_int64, c_int, c_void_p, c_int64, c_void_p]),
    "wf_trellis_search": (c_int, [c_int, c_int, c_void_p, c_int64, c_int, c_int, c_int, c_void_p]),
    "wf_bitshift_search": (
        c_int,
        [c_int, c_void_p, c_float, *[c_void_p] * 3, c_int, c_void_p, c_void_p, c_int64, c_int64, c_void_p],
    ),
    "wf_trellis_decode": (c_int64, [c_int, c_int, c_int, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p]),
    "wf_activations_new": (c_void_p, [c_int, c_void_p, c_void_p, c_int, c_int64, c_int64]),
    "wf_activations_free": (None, [c_void_p]),
    "wf_multiply_chunks": (
        c_int,
        [c_int, POINTER(Task), c_int64, c_int, READY, c_void_p, c_void_p, POINTER(Flaw)],
    ),
    "wf_chunk_decode": (c_int, [c_int, POINTER(ChunkView), c_void_p, c_void_p, POINTER(Flaw)]),
    "wf_checksums": (c_int, [c_int, c_void_p, c_int64, c_void_p, c_int64, c_void_p]),
    "wf_lossless_capacity": (c_int64, [c_int]),
    "wf_lossless_encode": (c_int, [c_int, c_void_p, c_int64, c_void_p, c_int64, c_void_p]),
    "wf_lossless_decode": (c_int64, [c_int, c_int, c_void_p, c_int64, c_void_p, c_int64, c_void_p]),
}


def bind(library: ctypes.CDLL, path: Path) -> None:
    """Give the functions of the library in `path` their types.

    Raises:
        WaterfillError: it was built from another header, or has structures of other sizes.
    """
    _expect_same_header(library, path)  # before anything else is called: others' functions have other arguments
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    for name, structure in STRUCTURES.items():
        theirs, ours = library.wf_sizeof(name.encode()), ctypes.sizeof(structure)
        if theirs != ours:
            raise WaterfillError(
                f"{path} has {theirs} bytes in a {name}, this waterfill needs {ours}; install waterfill again"
            )


def _expect_same_header(library: ctypes.CDLL, path: Path) -> None:
    try:
        library.wf_header.restype = c_char_p
        version = f"version {library.wf_header().decode()}"
    except AttributeError:  # it is older, or no library of ours
        version = "no version"
    if version != f"version {HEADER}":
        raise WaterfillError(f"{path} has {version}, this waterfill needs {HEADER}; install waterfill again")
