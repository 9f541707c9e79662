"""The binding against native/include/waterfill_native.h, line by line; exported functions are where their files say."""

from __future__ import annotations

import ctypes
import hashlib
import inspect
import re
from ctypes import POINTER, c_char_p, c_float, c_int, c_int64, c_void_p
from pathlib import Path

import pytest

from tests.support.kernel_samples import LIBRARY, needs_native
from waterfill.base import native_signatures as mirror
from waterfill.base.native_calls import Functions
from waterfill.base.native_coding import Coding

NATIVE = Path(__file__).parents[2] / "native"
HEADER = NATIVE / "include" / "waterfill_native.h"
TEXT = re.sub(r"/\*.*?\*/", "", HEADER.read_text("utf-8"), flags=re.DOTALL)
NUMBERS = {"void": None, "int": c_int, "int64_t": c_int64, "float": c_float}
CALLBACKS = {"wf_product": mirror.PRODUCT, "wf_ready": mirror.READY}


def parts(declaration: str) -> tuple[str, int, str]:
    """Type, stars and name of `const float* const* y`."""
    words = re.findall(r"\w+|\*", declaration.replace("const", ""))
    return words[0], words.count("*"), words[-1]


def mirrored(declaration: str, *, answers: bool = False) -> object:
    """The type in ctypes; with `answers` pointers to whole numbers are where a callback answers."""
    name, stars, _ = parts(declaration)
    if (name, stars) == ("char", 1):
        return c_char_p
    if stars == 0:
        return NUMBERS[name] if name in NUMBERS else CALLBACKS.get(name) or mirror.STRUCTURES[name]
    if stars == 2:
        return POINTER(POINTER(mirror.STRUCTURES[name]) if name in mirror.STRUCTURES else c_void_p)
    if answers and name in ("int", "int64_t"):
        return POINTER(c_int if name == "int" else c_int64)
    return POINTER(mirror.STRUCTURES[name]) if name in mirror.STRUCTURES else c_void_p


def prototypes() -> dict[str, tuple[object, list[object]]]:
    found = {}
    for result, name, arguments in re.findall(r"^WF_EXPORT ([\w* ]*?)(wf_\w+)\(([^)]*)\);", TEXT, flags=re.MULTILINE):
        given = [] if arguments == "void" else [mirrored(argument) for argument in arguments.split(",")]
        found[name] = (mirrored(f"{result} result"), given)
    return found


def structures() -> dict[str, list[str]]:
    """Declarations of the fields of each, one by one."""
    found = {}
    for body, name in re.findall(r"typedef struct \{(.*?)\} (wf_\w+);", TEXT, flags=re.DOTALL):
        fields = []
        for line in filter(None, map(str.strip, body.split(";"))):
            first, *others = line.split(",")
            kind = first.rsplit(maxsplit=1)[0]
            fields += [first, *(f"{kind} {other}" for other in others)]
        found[name] = fields
    return found


def test_the_mirror_is_of_this_header() -> None:
    """Whoever edits the header edits native_signatures.py, and then this constant of it."""
    digest = hashlib.sha256(HEADER.read_bytes().replace(b"\r", b"")).hexdigest()
    assert digest[:16] == mirror.HEADER


def test_every_function_has_the_types_of_its_prototype() -> None:
    assert len(prototypes()) == len(re.findall("^WF_EXPORT ", TEXT, flags=re.MULTILINE))
    assert prototypes() == mirror.SIGNATURES


def test_every_structure_has_the_fields_of_the_header_in_their_order() -> None:
    assert structures().keys() == mirror.STRUCTURES.keys()
    for name, fields in structures().items():
        ours = mirror.STRUCTURES[name]._fields_
        assert [parts(field)[2] for field in fields] == [field[0] for field in ours], name
        for field, (_, kind) in zip(fields, ours, strict=True):
            assert kind in (mirrored(field), c_void_p if "*" in field else None), field


@pytest.mark.parametrize("name", CALLBACKS)
def test_callbacks_take_what_the_header_says(name: str) -> None:
    (arguments,) = re.findall(rf"typedef void \(\*{name}\)\((.*?)\);", TEXT, flags=re.DOTALL)
    expected = [mirrored(argument, answers=True) for argument in arguments.split(",")]
    assert list(CALLBACKS[name]._argtypes_) == expected  # type: ignore[attr-defined]
    assert CALLBACKS[name]._restype_ is None  # type: ignore[attr-defined]


def test_constants_are_those_of_the_sources() -> None:
    for names in re.findall(r"^enum \{(.*?)\};", TEXT, flags=re.DOTALL | re.MULTILINE):
        for name, value in re.findall(r"WF_(\w+) = (-?\d+)", names):
            assert getattr(mirror, name) == int(value)
    matrix = (NATIVE / "src" / "matrix.hpp").read_text("utf-8")
    assert f"kMostHeadDim = {mirror.MOST_HEAD_DIM};" in matrix


def test_every_function_is_wrapped_once_with_types() -> None:
    for name in mirror.SIGNATURES:
        own = name.removeprefix("wf_")
        (method,) = (vars(kind)[own] for kind in (Functions, Coding) if own in vars(kind))
        signature = inspect.signature(method)
        assert method.__doc__
        assert signature.return_annotation is not signature.empty, name
        assert all(p.annotation is not p.empty for p in [*signature.parameters.values()][1:]), name


@needs_native
def test_structures_have_the_sizes_of_the_library() -> None:
    assert LIBRARY is not None
    assert LIBRARY.header() == mirror.HEADER
    for name, structure in mirror.STRUCTURES.items():
        assert LIBRARY.sizeof(name) == ctypes.sizeof(structure)
    assert LIBRARY.sizeof("wf_nothing") == -1


def test_exported_functions_are_in_files_called_api() -> None:
    sources = {path.name: path.read_text("utf-8") for path in (NATIVE / "src").iterdir()}
    defined = {
        name: file
        for file, text in sources.items()
        for name in re.findall(r"^[\w* ]*\b(wf_\w+)\([^;]*?\)\s*\{", text, flags=re.MULTILINE)
    }
    assert defined.keys() == mirror.SIGNATURES.keys()
    assert all(file.startswith("api") for file in defined.values())
