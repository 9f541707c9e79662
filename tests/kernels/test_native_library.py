"""The native library itself: chosen, found, refused; arguments that it refuses."""

from __future__ import annotations

import _ctypes
import ctypes
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.codec_samples import higgs
from tests.support.kernel_samples import (
    ISAS,
    LIBRARY,
    activations,
    needs_native,
    nothing_decided,
    same_bits,
    stored,
)
from waterfill import kernels
from waterfill.base import native, native_signatures
from waterfill.base.dtypes import TORCH_DTYPES
from waterfill.base.errors import WaterfillError
from waterfill.codecs import TableCodec, get_codec
from waterfill.codecs.hadamard import rotate_natively
from waterfill.kernels import cpu as native_kernels
from waterfill.kernels import reference
from waterfill.kernels.reference import STORED, Packed

pytestmark = pytest.mark.usefixtures("_ordinary")
SLOW = "torch computes in place of the native library, which is slow: "


def messages(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records if record.name.startswith("waterfill")]


# --------------------------------------------------------------------------------------------------------- environment


@needs_native
def test_the_best_instruction_set_is_used_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "waterfill.kernels")
    assert native.isa() == ISAS[0] == kernels.implementation()
    assert ISAS[-1] == "scalar", "everywhere, and last"
    assert kernels.arrange(stored("higgs-p2-n16", 7, 172)).layout == ISAS[0]
    for name in ISAS:
        with nothing_decided():
            monkeypatch.setenv(native.ISA_VARIABLE, name)
            caplog.clear()
            kernels.implementation()
            assert messages(caplog) == [], "it is said where a model is opened"
            for _ in range(2):
                kernels.set_up()
            matrices = [kernels.arrange(stored("higgs-p2-n16", rows, 172)) for rows in (7, 8)]
            assert [matrix.layout for matrix in matrices] == [name, name]
            assert messages(caplog) == [f"packed matrices are multiplied by the native kernels, {name}"]
    assert kernels.arrange(matrices[0]) is matrices[0], "arranged already"


def test_none_is_the_reference_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "waterfill.kernels")
    monkeypatch.setenv(native.ISA_VARIABLE, "none")
    packed, x = stored("higgs-p2-n16", 7, 172), activations(3, 172)
    assert rotate_natively(x, inverse=False) is None
    for _ in range(2):
        matrix = kernels.arrange(packed)
        assert matrix is packed
    assert same_bits(kernels.matmul(x, matrix), reference.matmul(x, packed))
    assert messages(caplog) == [f"{SLOW}WATERFILL_ISA is none"]


@pytest.mark.parametrize("name", ["avx1024", "AVX2", "none ", "stored", "neon" if "neon" not in ISAS else "avx2"])
def test_an_instruction_set_that_is_not_there_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.ISA_VARIABLE, name)
    choices = ", ".join([*ISAS, "none"])
    for _ in range(2):
        with pytest.raises(WaterfillError, match=f"WATERFILL_ISA is '{name}'.* choose one of {choices}$"):
            kernels.arrange(stored("higgs-p2-n16", 7, 172))


@needs_native
def test_slow_tables_are_mentioned_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    fast = ["higgs-p1-n2", "higgs-p1-n16", "higgs-p1-n256", "higgs-p2-n16", "higgs-p2-n256"]
    slow = ["higgs-p4-n4096", "higgs-p2-n1024", "higgs-p3-n4096", "higgs-p4-n4096"]  # on every machine
    caplog.set_level(logging.INFO, "waterfill.kernels")
    kernels.set_up()  # says a line of its own
    caplog.clear()
    kernels.log_slow(higgs(codec) for codec in fast)
    assert messages(caplog) == []
    kernels.log_slow(higgs(codec) for codec in [*fast, *slow])
    (line,) = messages(caplog)
    assert line.startswith("higgs-p2-n1024, higgs-p3-n4096, higgs-p4-n4096: tables too large for registers")


# ------------------------------------------------------------------------------------------------------------- library


def without_library(log: pytest.LogCaptureFixture) -> str:
    """The reason that is logged, once, while a product is computed twice without the library."""
    log.set_level(logging.INFO, "waterfill.kernels")
    packed, x = stored("higgs-p2-n16", 7, 172), activations(3, 172)
    for _ in range(2):
        matrix = kernels.arrange(packed)
        assert matrix.layout == STORED
        assert same_bits(kernels.matmul(x, matrix), reference.matmul(x, packed))
    assert native.library() is None
    (line,) = messages(log)
    assert line.startswith(SLOW)
    assert [record.levelname for record in log.records if record.getMessage() == line] == ["WARNING"]
    return line.removeprefix(SLOW)


def test_without_the_library_the_reference_multiplies(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "find", lambda: None)
    assert without_library(caplog).startswith("it was not built; install waterfill again")
    monkeypatch.setenv(native.ISA_VARIABLE, "scalar")
    native.isa.cache_clear()
    with pytest.raises(WaterfillError, match=r"choose one of none$"):
        native.isa()


@needs_native
def test_a_library_for_other_machines_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native.Native, "isas", {})
    caplog.set_level(logging.WARNING, "waterfill.kernels")
    assert native.isa() is None
    assert messages(caplog) == [f"{SLOW}it has no instruction set of this machine"]


@pytest.mark.parametrize("damage", ["text", "empty", "another library"])
def test_a_library_that_cannot_be_loaded_is_one_warning(
    damage: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    file = tmp_path / "libwaterfill_native.so"
    file.write_bytes({"text": b"not a library" * 9, "empty": b"", "another library": b""}[damage])
    monkeypatch.setattr(native, "find", lambda: Path(_ctypes.__file__) if damage == "another library" else file)
    assert re.search(
        "invalid ELF header|file too short|not a mach-o|has no version, this waterfill needs", without_library(caplog)
    )


@needs_native
def test_a_library_of_another_version_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = native_signatures.HEADER
    monkeypatch.setattr(native_signatures, "HEADER", "0123456789abcdef")
    assert without_library(caplog).endswith(
        f"has version {found}, this waterfill needs 0123456789abcdef; install waterfill again"
    )


@needs_native
def test_a_library_with_structures_of_other_sizes_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Longer(ctypes.Structure):
        _fields_ = (*native.Task._fields_, ("more", ctypes.c_int64))

    monkeypatch.setitem(native_signatures.STRUCTURES, "wf_task", Longer)
    size = ctypes.sizeof(native.Task)
    assert without_library(caplog).endswith(
        f"has {size} bytes in a wf_task, this waterfill needs {size + 8}; install waterfill again"
    )


@needs_native
def test_arrays_of_another_dtype_or_size_are_refused() -> None:
    assert LIBRARY is not None
    scalar, x, out = LIBRARY.isas["scalar"], np.zeros(64, np.float32), np.empty(64, np.int16)
    how = {"states": 8, "lanes": 1, "least": -2, "most": 1}
    LIBRARY.trellis_search(scalar, x, out, **how)
    for wrong in ((x.astype(np.float64), out), (x[::2], out), (x, out[:63]), (x, out.view(np.uint16))):
        with pytest.raises(ValueError, match=r"give it (float32|int16), \d+ numbers or more, one behind the other$"):
            LIBRARY.trellis_search(scalar, *wrong, **how)


@needs_native
def test_impossible_arguments_are_refused_not_obeyed() -> None:
    assert LIBRARY is not None
    scalar = LIBRARY.isas["scalar"]
    for isa, rows, width in ((99, 1, 1), (-1, 1, 1), (scalar, -1, 4), (scalar, 1, 0)):
        with pytest.raises(ValueError, match="wf_rotate refused its arguments"):
            LIBRARY.rotate(isa, 0, rows=rows, width=width, inverse=False)
    with pytest.raises(MemoryError, match="a grid of 2 points in 5 dimensions"):
        LIBRARY.table_new(scalar, precision=8, units=np.zeros((2, 5), np.int16), points=np.zeros((2, 5), np.float32))


@needs_native
@pytest.mark.parametrize(
    "name", ["higgs-p1-n16", "higgs-p1-n11", "higgs-p2-n64", "higgs-p4-n256", "levels-8", "levels-16"]
)
def test_matrices_that_are_larger_than_their_memory_are_refused(name: str) -> None:
    """By the library itself, as stored and as arranged."""
    codec, shape = get_codec(name), (12, 700)
    assert isinstance(codec, TableCodec)
    layout = codec.layout(shape)
    buffers = {key: torch.zeros(part.shape, dtype=TORCH_DTYPES[part.dtype]) for key, part in layout.items()}
    packed = Packed(codec, buffers["scales"], buffers["codes"], 0, shape)
    isa = native.isa()
    assert isa is not None
    arranged, x = native_kernels.arrange(packed, isa), torch.zeros(1, 700)
    assert native_kernels.matmul_many(x, [arranged])[0].shape == (1, 12)
    for lie in ((16, 700), (12, 2300), (1 << 40, 700), (12, 1 << 40), (1 << 62, 1 << 62)):
        with pytest.raises((ValueError, RuntimeError)):
            native_kernels.arrange(packed._replace(shape=lie), isa)
    half = arranged._replace(codes=arranged.codes[: len(arranged.codes) // 2 - 1])
    for small in (half, arranged._replace(scales=arranged.scales[:-1])):
        with pytest.raises(ValueError, match="wf_matmul refused its arguments"):
            native_kernels.matmul_many(x, [small])
        with pytest.raises(ValueError, match="wf_rows refused its arguments"):
            native_kernels.rows(small, torch.tensor([0]))
