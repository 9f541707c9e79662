"""The native library itself: found, refused, chosen; its rotation, its threads, its memory."""

from __future__ import annotations

import _ctypes
import ctypes
import logging
import math
import multiprocessing
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.support.codec_samples import encode, higgs
from tests.support.kernel_samples import (
    ISAS,
    LIBRARY,
    NOT_BUILT,
    activations,
    nothing_decided,
    one_thread,
    same_bits,
    stored,
)
from waterfill import kernels
from waterfill.base import native, native_signatures
from waterfill.base.dtypes import TORCH_DTYPES
from waterfill.base.errors import WaterfillError
from waterfill.codecs import TableCodec, get_codec, hadamard
from waterfill.codecs.hadamard import groups, rotate, rotate_natively, unrotate
from waterfill.kernels import cpu as native_kernels
from waterfill.kernels import reference
from waterfill.kernels.reference import STORED, Packed
from waterfill.running.hf.packed import PackedLinear, pack_linear

needs_native = pytest.mark.skipif(not ISAS, reason=NOT_BUILT)
every_isa = pytest.mark.parametrize("isa", ISAS or [pytest.param("", marks=pytest.mark.skip(reason=NOT_BUILT))])
WIDTHS = [
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    15,
    16,
    31,
    32,
    33,
    64,
    128,
    172,
    256,
    512,
    896,
    1000,
    1024,
    1028,
    1535,
    1536,
    2048,
    4100,
]


@pytest.fixture(autouse=True)
def _ordinary(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a new process without the variables; afterwards as in a new process again."""
    for variable in (native.ISA_VARIABLE, native.FLOAT_ACTIVATIONS):
        monkeypatch.delenv(variable, raising=False)
    with one_thread(), nothing_decided():
        yield


SLOW = "torch computes in place of the native library, which is slow: "


def messages(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records if record.name.startswith("waterfill")]


# ------------------------------------------------------------------------------------------------------------ rotation


def rotations(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.ISA_VARIABLE, isa)
    native.isa.cache_clear()


@every_isa
@pytest.mark.parametrize("width", WIDTHS)
def test_rotation_has_the_bits_of_the_one_in_torch(isa: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rotations(isa, monkeypatch)
    x = torch.randn(5, width)
    x[0, :1], x[1], x[2] = -0.0, x[1] * 1e-41, x[2] * 3e37  # subnormal numbers, and sums that overflow
    x[4] = 0
    kept = x.clone()
    for inverse, function in ((False, rotate), (True, unrotate)):
        assert rotate_natively(x, inverse=inverse) is not None
        assert same_bits(function(x).nan_to_num(), hadamard._transform_in_torch(x, inverse=inverse).nan_to_num())
        assert same_bits(x, kept), "its argument is only read"


@needs_native
@settings(max_examples=100)
@given(
    isa=st.sampled_from(ISAS or [""]),
    width=st.integers(1, 2600),
    rows=st.integers(1, 40),
    inverse=st.booleans(),
)
def test_rotation_of_any_shape(isa: str, width: int, rows: int, inverse: bool) -> None:
    assert LIBRARY is not None
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(width))
    y = x.clone()
    LIBRARY.rotate(LIBRARY.isas[isa], y.data_ptr(), rows=rows, width=width, inverse=inverse)
    assert same_bits(y, hadamard._transform_in_torch(x, inverse=inverse))


@needs_native
def test_rotation_of_views_and_the_cases_left_to_torch() -> None:
    base = torch.randn(6, 4, 344)
    kept = base.clone()
    for x in (base[..., ::2], base.transpose(0, 1), base[:, 0, 3:175], base[0, 0], base.flatten()[7:179]):
        assert same_bits(rotate(x), rotate(x.clone().contiguous()))
        torch.testing.assert_close(unrotate(rotate(x)), x, rtol=0, atol=1e-5)
    assert same_bits(base, kept)
    assert rotate_natively(base.double(), inverse=False) is None
    assert rotate_natively(base.half(), inverse=False) is None
    assert rotate_natively(base.to("meta"), inverse=False) is None
    assert rotate_natively(base[:0], inverse=False) is None
    assert rotate(base[:0]).shape == (0, 4, 344)
    leaf = base.clone().requires_grad_()
    rotate(leaf).square().sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, 2 * leaf.detach())


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
    kernels.implementation()  # says a line of its own
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


# ------------------------------------------------------------------------------------------------------------- threads


@pytest.fixture(params=["OpenMP", "own"])
def threads(request: pytest.FixtureRequest) -> Iterator[Callable[[int], None]]:
    """Set the number of threads, for this test: those of torch's OpenMP runtime, or the library's own."""
    assert LIBRARY is not None
    team = native.openmp_team() if request.param == "OpenMP" else None
    if request.param == "OpenMP" and team is None:
        pytest.skip("torch has no OpenMP runtime to share here")
    LIBRARY.set_team(team)

    def use(count: int) -> None:
        LIBRARY.set_threads(count)

    yield use
    use(0)  # the next one to load the library chooses again


CODECS = ["higgs-p2-n16", "higgs-p1-n88", "higgs-p4-n256", "higgs-p1-n3"]


@every_isa
@pytest.mark.parametrize("tokens", [1, 40])
def test_bits_do_not_depend_on_threads(isa: str, tokens: int, threads: Callable[[int], None]) -> None:
    results = []
    for count in (1, 2, 3, 1):
        threads(count)
        x = rotate(activations(tokens, 3000))
        matrices = [native_kernels.arrange(stored(codec, 300, 3000), isa) for codec in CODECS]
        ids = torch.arange(299, 0, -7)
        results.append([x, *kernels.matmul_many(x, matrices), *(kernels.rows(m, ids) for m in matrices)])
        results[-1] += [part for matrix in matrices for part in (matrix.codes.view(torch.int16), matrix.scales)]
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@every_isa
def test_several_python_threads_at_once(isa: str, threads: Callable[[int], None]) -> None:
    """Scratch memory belongs to a thread, helpers serve one caller at a time."""
    threads(2)
    jobs = []
    for i in range(8):
        packed, x = stored(CODECS[i % 4], 100 + i, 1500 + 64 * i), activations(1 + 2 * i, 1500 + 64 * i, seed=i)
        jobs.append((x, native_kernels.arrange(packed, isa), reference.matmul_integer(x, packed)))

    def work(job: int) -> bool:
        x, matrix, expected = jobs[job % 8]
        return same_bits(kernels.matmul(x, matrix), expected)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(200), timeout=120))


def _multiply_in_child(connection: multiprocessing.connection.Connection, isa: str) -> None:
    connection.send_bytes(_product(isa))


def _product(isa: str) -> bytes:
    matrix = native_kernels.arrange(stored("higgs-p2-n16", 300, 3000), isa)
    return bytes(kernels.matmul(activations(5, 3000), matrix).numpy().tobytes())


@pytest.mark.skipif(sys.platform == "win32" or sys.platform == "darwin", reason="fork")
@every_isa
def test_a_forked_child_multiplies_with_threads_of_its_own(isa: str, threads: Callable[[int], None]) -> None:
    threads(2)
    expected = _product(isa)  # the parent's helpers run
    context = multiprocessing.get_context("fork")
    for _ in range(3):
        here, there = context.Pipe(duplex=False)
        child = context.Process(target=_multiply_in_child, args=(there, isa))
        child.start()
        try:
            assert here.poll(60), "the child hangs"
            assert here.recv_bytes() == expected
        finally:
            child.kill()
            child.join()
    assert _product(isa) == expected, "and the parent still does"


# -------------------------------------------------------------------------------------------------------------- memory


@every_isa
@pytest.mark.parametrize("codec", ["higgs-p1-n2", "higgs-p1-n3", "higgs-p2-n16", "higgs-p1-n88", "higgs-p3-n4096"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 172), (64, 1024), (33, 2561)])
def test_arranged_matrices_have_the_documented_size(isa: str, codec: str, shape: tuple[int, int]) -> None:
    """native/src/layout.hpp: tiles of 4 rows, chunks of 128 codes (or pairs of codes), whole bit fields."""
    arranged = native_kernels.arrange(stored(codec, *shape), isa)
    p, bits, rows = arranged.codec.p, (arranged.codec.n - 1).bit_length(), 4 * math.ceil(shape[0] / 4)
    chunk = 128 * p if p > 1 or bits > 3 else 256  # weights
    assert arranged.codes.shape == (rows * math.ceil(shape[1] / chunk) * chunk // p * bits // 8,)
    assert arranged.scales.shape == (rows * len(groups(shape[1])),)
    assert (arranged.codes.dtype, arranged.scales.dtype) == (torch.uint8, torch.float16)


@every_isa
def test_arranging_reads_buffers_that_lie_in_any_way(isa: str) -> None:
    packed = stored("higgs-p1-n16", 300, 2100)
    scales = torch.stack([packed.scales, packed.scales * 2], dim=2)[..., 0]
    codes = torch.stack([packed.codes, packed.codes + 1], dim=1)[:, 0]
    assert not scales.is_contiguous()
    a, b = (native_kernels.arrange(matrix, isa) for matrix in (packed, packed._replace(scales=scales, codes=codes)))
    assert torch.equal(a.codes, b.codes)
    assert same_bits(a.scales, b.scales)


@needs_native
def test_arranged_buffers_survive_a_change_of_dtype() -> None:
    codec = "higgs-p1-n16"
    encoded = encode(codec, torch.randn(7, 172) * 1e-3)
    module: PackedLinear = pack_linear(nn.Linear(172, 7))
    module.attach(higgs(codec), encoded.shape, encoded.exponent, torch.float32)
    module.load_state_dict(dict(encoded.buffers), strict=False, assign=True)
    model = nn.Sequential(module)
    module.arrange()
    assert module.layout == ISAS[0]
    scales, codes, x = module.scales.clone(), module.codes.clone(), activations(3, 172)
    before = model(x)
    for dtype in (torch.bfloat16, torch.float64, torch.float16, torch.float32):
        model.to(dtype)
        assert module.dtype == model(x.to(dtype)).dtype == dtype
        assert torch.equal(module.codes, codes)
        assert same_bits(module.scales, scales)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-2, msg="but for the bias, which was rounded")
