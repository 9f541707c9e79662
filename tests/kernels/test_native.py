"""What the native library computes: rotations, bits that do not depend on threads, and matrices in memory."""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.support.codec_samples import encode, higgs
from tests.support.kernel_samples import (
    ISAS,
    LIBRARY,
    activations,
    every_isa,
    needs_native,
    same_bits,
    stored,
)
from waterfill import kernels
from waterfill.base import native
from waterfill.codecs import hadamard
from waterfill.codecs.hadamard import groups, rotate, rotate_natively, unrotate
from waterfill.kernels import cpu as native_kernels
from waterfill.kernels import reference
from waterfill.running.hf.packed import PackedLinear, pack_linear

pytestmark = pytest.mark.usefixtures("_ordinary")
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


@needs_native
def test_threads_that_come_late_change_nothing() -> None:
    """Of more threads than there are processors, some find the work done, and some come in its midst."""
    assert LIBRARY is not None
    matrix, x = native_kernels.arrange(stored("higgs-p2-n16", 1000, 1024), ISAS[0]), activations(1, 1024)
    expected = reference.matmul_integer(x, stored("higgs-p2-n16", 1000, 1024))
    LIBRARY.set_team(None)
    LIBRARY.set_threads(4 * (os.cpu_count() or 1))
    try:
        assert all(same_bits(kernels.matmul(x, matrix), expected) for _ in range(300))
    finally:
        LIBRARY.set_team(native.openmp_team())
        LIBRARY.set_threads(0)


@needs_native
def test_own_threads_are_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    assert LIBRARY is not None
    teams: list[int | None] = []
    counts: list[int] = []
    monkeypatch.setattr(LIBRARY, "shares_threads", True, raising=False)
    monkeypatch.setattr(LIBRARY, "set_team", teams.append, raising=False)
    monkeypatch.setattr(LIBRARY, "set_threads", counts.append, raising=False)

    def interrupted() -> None:
        assert LIBRARY is not None
        with LIBRARY.own_threads():
            assert (teams, counts) == ([None], [torch.get_num_threads()])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    team = native.openmp_team()
    assert (teams, counts) == ([None, team], [torch.get_num_threads(), 0 if team else torch.get_num_threads()])


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
