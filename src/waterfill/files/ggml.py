"""ggml's C libraries, as llama-cpp-python brings them along: found, loaded, and told what their functions take.

    functions = load_ggml()            functions.ggml_row_size(TENSOR_TYPES["Q4_0"], 4096) ──► bytes of a row

Signatures are those of ggml.h. Needs nothing but Python and that package.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias


class TypeTraits(ctypes.Structure):
    """The beginning of ggml_type_traits."""

    _fields_ = (
        ("type_name", c_char_p),
        ("block", c_int64),  # weights in a block
        ("interleave", c_int64),
        ("block_bytes", c_size_t),
        ("quantised", c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)),
    )


Signatures: TypeAlias = Mapping[str, tuple[Any, Sequence[Any]]]
"""Result and arguments of functions, by their C names."""

OF_ROWS: Signatures = {  # what encodes and decodes rows of weights
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "ggml_get_type_traits": (POINTER(TypeTraits), [c_int]),
}


def load_ggml(signatures: Signatures = OF_ROWS, libraries: Sequence[str] = ("ggml-base",)) -> Any:
    """Functions by their C names, each from the first of the libraries that has it.

    Raises:
        ModuleNotFoundError: llama-cpp-python is not installed.
        ImportError: it brings no such library.
    """
    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'llama_cpp'")
    loaded = [ctypes.CDLL(str(_file(Path(spec.origin).parent / "lib", name))) for name in libraries]
    functions = SimpleNamespace()
    for name, (result, arguments) in signatures.items():
        function = next(getattr(library, name) for library in loaded if hasattr(library, name))
        function.restype, function.argtypes = result, arguments
        setattr(functions, name, function)
    return functions


@cache
def silence(api: Any) -> Any:
    """Keep llama.cpp from logging; `api` is the module llama_cpp.llama_cpp. Returns the callback, which llama.cpp calls
    for as long as the process lives, so that it is kept here."""
    quiet = api.llama_log_callback(lambda *_: None)
    api.llama_log_set(quiet, ctypes.c_void_p(0))
    return quiet


def _file(folder: Path, library: str) -> Path:
    files = sorted(folder.glob(f"*{library}.*[!0-9]"))
    if not files:
        raise ImportError("this build of llama-cpp-python brings no ggml library that can be called")
    return files[0]
