"""Artifacts are read and multiplied in processes that never import torch, to the same bits as with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import waterfill
from tests.support import models
from tests.support.kernel_samples import NOT_BUILT
from tests.support.plans import plan_for
from waterfill.base import native
from waterfill.base.errors import MemoryLimitError
from waterfill.files.artifact import open_artifact
from waterfill.planning.budget import Budget
from waterfill.running.hf.packed import PackedMatrix
from waterfill.running.streaming import Activations, Storage, StreamedMatrix, Streamer, Tuning, View
from waterfill.running.streaming.limit import LEAST_CONTEXT, LEAST_PASS, Working, spare_bytes

TRELLIS, FIXED = "trellis-s8-r3.0000", "higgs-p2-n16"
TOKENS = 5
Packed = Callable[[str], Path]

needs_native = pytest.mark.skipif(native.library() is None, reason=NOT_BUILT)

IMPORTS = """
import sys
import waterfill.running.streaming
import waterfill.codecs
import waterfill.files.artifact
import waterfill.codecs.grids
import waterfill.codecs.hadamard
import waterfill.base.native
import waterfill.codecs.integers
import waterfill.running.streaming.limit
print({"torch", "transformers", "safetensors.torch", "tqdm"} & set(sys.modules))
"""

RUN = """
import sys
from pathlib import Path
import numpy as np
from waterfill.files.artifact import open_artifact
from waterfill.files.artifact import read_bytes
from waterfill.codecs import LOSSLESS, lossless
from waterfill.running.streaming import Storage
from waterfill.running.streaming import Streamer
from waterfill.running.streaming import View
from waterfill.running.streaming import Tuning

artifact, out, keep, tokens = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
tuning = Tuning(chunk_bytes=4096, part_weights=2048, reading_s=0.0, working_s=0.0)
opened, storage = open_artifact(artifact), Storage()
packed = [t for t in opened.tensors.values() if t.packed]
matrices = [tuning.matrix(tensor, storage, verify=True) for tensor in packed]
told = []
streamer = Streamer(
    storage, matrices, (), spare_bytes=keep, limit_bytes=1 << 40, verify=True, tuning=tuning,
    progress=lambda done, total: told.append((done, total)),
)
assert told[-1][0] == told[-1][1] > 0
found = {}
for width in sorted({matrix.shape[1] for matrix in matrices}):
    x = np.random.default_rng(width).standard_normal((tokens, width), np.float32)
    same = [matrix for matrix in matrices if matrix.shape[1] == width]
    ys = [np.full((tokens, matrix.shape[0]), np.nan, np.float32) for matrix in same]
    streamer.products(same, View.of_array(x), [View.of_array(y) for y in ys])
    for matrix, y in zip(same, ys, strict=True):
        alone = np.empty_like(y)
        streamer.product(matrix, View.of_array(x), View.of_array(alone))
        assert alone.tobytes() == y.tobytes()
        found[f"{matrix.name}:product"] = y
        ids = np.array([matrix.shape[0] - 1, 0, 3, 0])
        found[f"{matrix.name}:rows"] = streamer.rows(matrix, ids)
        found[f"{matrix.name}:dense"] = streamer.dense(matrix)
for tensor in opened.tensors.values():
    if tensor.codec == LOSSLESS:
        values = lossless.decode_floats(read_bytes(tensor.buffers[0]), tensor.shape, tensor.dtype)
    elif tensor.codec == "raw":
        values = lossless.floats(read_bytes(tensor.buffers[0]), tensor.dtype).reshape(tensor.shape)
    else:
        continue
    found[f"{tensor.name}:kept"] = values
assert streamer.summary().decode_s >= 0
streamer.close()
np.savez(out, **found)
print({"torch", "transformers", "safetensors.torch"} & set(sys.modules))
"""

THREADS = """
import sys
from waterfill.base import native
before = native.threads(), native.library().shares_threads
import torch
from waterfill import kernels
torch.set_num_threads(1)
kernels.set_up()
after = native.threads(), native.library().shares_threads
torch.set_num_threads(3)
native.share_threads()
import json
print(json.dumps([before, after, native.threads()]))
"""


def run(script: str, *arguments: object, **environment: str) -> str:
    """What a script prints, in a process that has imported nothing yet."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    root = tmp_path_factory.mktemp("without")
    checkpoint = models.tiny_llama(root / "model", hidden=96, intermediate=272, layers=2)

    def pack(codec: str) -> Path:
        out = root / codec
        if not out.exists():
            plan = plan_for(checkpoint, codecs=[codec], budget=Budget(bits=16.0), uniform=True)
            waterfill.pack(checkpoint, out, plan=plan)
        return out

    return pack


def test_the_bottom_and_streaming_import_nothing_large() -> None:
    assert run(IMPORTS) == "set()\n"


def resident(artifact: Path) -> dict[str, np.ndarray[Any, Any]]:
    """What the script computes, by torch."""
    model = waterfill.load(artifact)
    found = {f"{name}:kept": p.detach().float().numpy() for name, p in model.named_parameters() if p.numel()}
    for name, module in model.named_modules():
        if isinstance(module, PackedMatrix):
            x = np.random.default_rng(module.shape[1]).standard_normal((TOKENS, module.shape[1]), np.float32)
            ids = torch.tensor([module.shape[0] - 1, 0, 3, 0])
            found[f"{name}:product"] = module.multiply(torch.from_numpy(x)).numpy()
            found[f"{name}:rows"], found[f"{name}:dense"] = module.rows(ids).numpy(), module.dense().numpy()
    return found


@needs_native
@pytest.mark.parametrize("keep", [0, 40_000, 1 << 30])
@pytest.mark.parametrize("codec", [TRELLIS, FIXED])
def test_a_process_without_torch_computes_the_same_bits(packed: Packed, codec: str, keep: int, tmp_path: Path) -> None:
    out = tmp_path / "found.npz"
    assert run(RUN, packed(codec), out, keep, TOKENS, WATERFILL_ACTIVATIONS="") == "set()\n"
    expected = resident(packed(codec))
    with np.load(out) as found:
        names = {name.replace(".weight:", ":"): name for name in found.files}
        assert set(names) == {name.replace(".weight:", ":") for name in expected}
        assert len(names) > 3 * 14
        for name, values in expected.items():
            same = found[names[name.replace(".weight:", ":")]]
            assert (same.dtype, same.shape) == (np.float32, values.shape), name
            assert same.tobytes() == values.tobytes(), name


@pytest.fixture
def streamer(packed: Packed) -> Iterator[Streamer]:
    storage, tuning = Storage(), Tuning(reading_s=0.0, working_s=0.0)
    tensors = open_artifact(packed(FIXED)).tensors.values()
    matrices = [StreamedMatrix(t, storage, verify=False) for t in tensors if t.codec == FIXED]
    opened = Streamer(storage, matrices, (), spare_bytes=0, limit_bytes=1 << 40, verify=False, tuning=tuning)
    yield opened
    opened.close()


@needs_native
def test_matrices_of_one_codec_share_the_activations(streamer: Streamer) -> None:
    matrices = [matrix for matrix in streamer.sequence if matrix.shape[1] == 96][:2]
    x, nanoseconds = np.random.default_rng(0).standard_normal((3, 96), np.float32), np.zeros(2, np.int64)
    expected = [np.empty((3, matrix.shape[0]), np.float32) for matrix in matrices]
    streamer.products(matrices, View.of_array(x), [View.of_array(y) for y in expected])
    with Activations(View.of_array(x)) as shared:
        handle = shared.prepared(matrices[0].codec)
        x[:] = np.nan  # it was rotated and rounded before
        assert shared.prepared(matrices[1].codec) == handle
        for matrix, y in zip(matrices, expected, strict=True):
            found = np.empty_like(y)
            for chunk in matrix.chunks:
                streamer.on_demand.read(chunk).multiply(shared, View.of_array(found), nanoseconds)
            assert found.tobytes() == y.tobytes()


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_written_may_have_another_dtype_than_what_is_read(streamer: Streamer, dtype: torch.dtype) -> None:
    matrix = streamer.sequence[0]
    x = torch.randn(2, matrix.shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
    wide, y = np.empty((2, matrix.shape[0]), np.float32), torch.empty(2, matrix.shape[0], dtype=dtype)
    streamer.product(matrix, View.of_tensor(x), View.of_array(wide))
    streamer.product(matrix, View.of_tensor(x), View.of_tensor(y))
    assert torch.equal(torch.from_numpy(wide).to(dtype), y)
    assert wide.any()


def test_views_that_the_library_would_misread_are_refused(streamer: Streamer) -> None:
    for array in (np.zeros((4, 6))[:, ::2], np.zeros((4, 6), np.float32).T, np.zeros((2, 3), np.float16)):
        with pytest.raises(ValueError, match="expected contiguous float32"):
            View.of_array(array)  # type: ignore[arg-type]
    for tensor in (torch.zeros(4, 6).T, torch.zeros(2, 3).double(), torch.zeros(2, 3, device="meta")):
        with pytest.raises(ValueError, match="expected contiguous floats"):
            View.of_tensor(tensor)
    matrix = streamer.sequence[0]
    rows, width = matrix.shape
    for x, y in (((2, width), (3, rows)), ((2, width + 1), (2, rows)), ((2, width), (2, rows - 1))):
        views = [View.of_array(np.zeros(shape, np.float32)) for shape in (x, y)]
        with pytest.raises(ValueError, match=rf"multiplies x \[t, {width}\] into y \[t, {rows}\]"):
            streamer.product(matrix, *views)
    with pytest.raises(IndexError, match=f"outside a matrix of {rows} rows"):
        streamer.rows(matrix, np.array([0, rows]))


def test_a_limit_is_divided_and_one_too_small_is_refused(streamer: Streamer) -> None:
    working = Working(token=1000, activations=5000, logits=1_000_000, fixed=3_000)
    needs: dict[str, Any] = {"held": 50_000_000, "context": None, "logits": 1}
    path = Path("artifact")
    with pytest.raises(MemoryLimitError, match=r"for artifact: streamed, it takes [0-9]+ MB at least") as refused:
        spare_bytes(path, streamer.sequence, 50_000_000, working, **needs)
    smallest = refused.value.smallest_bytes
    assert 0 <= spare_bytes(path, streamer.sequence, smallest, working, **needs) < 1_000_000
    ample = spare_bytes(path, streamer.sequence, 1 << 30, working, **needs)
    assert 0 <= smallest - ((1 << 30) - ample) < 1_000_000, "everything beyond the least holds weights"
    shorter = spare_bytes(path, streamer.sequence, 1 << 30, working, **{**needs, "context": 64})
    assert shorter - ample == (LEAST_CONTEXT - 64) * working.token
    scored = spare_bytes(path, streamer.sequence, 1 << 30, working, **{**needs, "logits": 100})
    assert ample - scored == 99 * working.logits + (100 - LEAST_PASS) * working.activations


@needs_native
@pytest.mark.parametrize(("told", "threads"), [("2", 2), ("1", 1), ("0", None), ("many", None), ("", None)])
def test_threads_are_the_librarys_own_until_torch_comes(told: str, threads: int | None) -> None:
    before, after, later = json.loads(run(THREADS, OMP_NUM_THREADS=told))
    assert before == [threads or len(os.sched_getaffinity(0)), False]
    assert after == [1, True], "of torch, at the latest when it is decided who multiplies"
    assert later == 3
