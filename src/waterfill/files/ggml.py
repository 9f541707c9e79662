"""ggml's C libraries, as llama-cpp-python or xllamacpp brings them along: found, loaded, and told what their functions
take.

    functions = load_ggml()            functions.ggml_row_size(TENSOR_TYPES["Q4_0"], 4096) ──► bytes of a row

Signatures are those of ggml.h. Needs nothing but Python and one of these packages.
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


_PACKAGES = {"llama_cpp": "llama-cpp-python", "xllamacpp": "xllamacpp"}  # by module, the first one preferred

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
        ModuleNotFoundError: neither llama-cpp-python nor xllamacpp is installed.
        ImportError: it brings no such library.
    """
    loaded = [ctypes.CDLL(str(file)) for file in _files(libraries)]
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


def package() -> str:
    """The package whose libraries are loaded, as it is installed.

    Raises:
        ModuleNotFoundError: neither llama-cpp-python nor xllamacpp is installed.
    """
    return _PACKAGES[_module()]


def _module() -> str:
    for module in _PACKAGES:
        if find_spec(module):
            return module
    raise ModuleNotFoundError(f"No module named {' or '.join(map(repr, _PACKAGES))}")


def _files(libraries: Sequence[str]) -> list[Path]:
    """Of these libraries, of which xllamacpp has all in one."""
    module = _module()
    spec = find_spec(module)
    assert spec is not None
    folder = Path((spec.submodule_search_locations or [""])[0])
    patterns = [f"lib/*{library}.*[!0-9]" for library in libraries] if module == "llama_cpp" else [f"{module}.*"]
    found = [sorted(file for file in folder.glob(pattern) if file.suffix != ".py") for pattern in patterns]
    if not all(found):
        raise ImportError(f"this build of {_PACKAGES[module]} brings no ggml library that can be called")
    return [files[0] for files in found]
