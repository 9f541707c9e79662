"""What texts take of memory in a transformers model, found by running short ones: families differ too much to be told.

    passes of 16, 32 and 64 tokens ──► tensors alive at a time, and afterwards: the cache ──► Working

The model's own code is what counts: its packed modules need hold nothing yet (`Blank`).
"""

from __future__ import annotations

import inspect
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from waterfill.files.model_calls import output_cache
from waterfill.running.hf.packed import PackedMatrix
from waterfill.running.hf.stand_in import StandIn
from waterfill.running.streaming.limit import Working

LENGTHS = (16, 32, 64)  # tokens
BLOCK = 256  # tokens that some models round a pass up to
MARGIN = 1.25  # over the tensors of a pass and of a cache: scratch memory of operators, and what allocation wastes


@dataclass(frozen=True)
class Trial:
    """What was found: memory, and whether a text may be read in several passes."""

    working: Working
    pieces: bool


@dataclass(frozen=True)
class Blank:
    """Stands for a streamed matrix `[out, in]` before there is anything to stream: products and rows are zero."""

    shape: tuple[int, int]

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` -> `[..., out]`."""
        return x.new_zeros(*x.shape[:-1], self.shape[0])

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 `[...]` -> float32 `[..., in]`."""
        return torch.zeros(*ids.shape, self.shape[1])

    def dense(self) -> torch.Tensor:
        """float32 `[out, in]`."""
        return torch.zeros(self.shape)

    def scaled(self, power: int) -> Blank:
        """Of 2^power times the matrix, which is nothing as well."""
        return self


@torch.inference_mode()
def try_passes(model: Any) -> Trial:
    """Run a model on a few tokens."""
    runs = [_run(model, tokens) for tokens in LENGTHS]
    peaks, held, vocabulary = ([getattr(each, name) for each in runs] for name in ("peak", "held", "vocabulary"))
    slopes = [(b - a) / (n - m) for a, b, m, n in zip(peaks, peaks[1:], LENGTHS, LENGTHS[1:], strict=False)]
    scores = max(0.0, (slopes[1] - slopes[0]) / (LENGTHS[2] - LENGTHS[0]))  # a x + b x^2 through three points
    each = max(slopes[0] - scores * (LENGTHS[0] + LENGTHS[1]), peaks[-1] / BLOCK)
    token = (held[2] - held[1]) / (LENGTHS[2] - LENGTHS[1])
    fixed = max(peak - tokens * (each + scores * tokens) for peak, tokens in zip(peaks, LENGTHS, strict=True))
    working = Working(
        token=MARGIN * max(0.0, token),
        activations=MARGIN * each + _product_bytes(model, vocabulary[0]),
        logits=vocabulary[0] * (8 + model.dtype.itemsize),  # two float32 copies: what is chosen from, or scored
        scores=MARGIN * scores,
        fixed=MARGIN * max(0.0, fixed),
    )
    return Trial(working, runs[0].pieces)


def _product_bytes(model: Any, vocabulary: int) -> int:
    """Of the largest product of a token with packed weights, inside the native library: activations that are rotated
    (float32) and rounded (integers, and scales), and sums (float32)."""
    shapes = [module.shape for module in model.modules() if isinstance(module, PackedMatrix)]
    return max((8 * width + (4 * rows if rows != vocabulary else 0) for rows, width in shapes), default=0)


@dataclass(frozen=True)
class _TrialRun:
    peak: int  # bytes of tensors that were alive at a time
    held: int  # of those that are left: the cache, mostly
    vocabulary: int
    pieces: bool


def _run(model: Any, tokens: int) -> _TrialRun:
    ids = torch.zeros(1, tokens, dtype=torch.int64, device=model.device)
    wanted = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": True, "logits_to_keep": 1}
    known = inspect.signature(model.forward).parameters
    arguments = {name: value for name, value in wanted.items() if name in known}
    try:
        with _Alive() as alive:
            output = model(**arguments)
    except Exception:  # a class that can make no cache of its own, as BLT's cannot, fails in its own way
        with _Alive() as alive:
            output = model(**arguments | {"use_cache": False})
    return _TrialRun(alive.peak, alive.now, output.logits.shape[-1], _can_go_on(model, output, tokens))


def _can_go_on(model: Any, output: Any, tokens: int) -> bool:
    """Whether a text may be read in several passes: what one leaves behind is a cache that the next is appended to, and
    transformers' `generate` makes one."""
    makes = getattr(model, "_supports_default_dynamic_cache", lambda: True)
    uncached = getattr(getattr(model, "generation_config", None), "use_cache", None) is False
    if getattr(model, "_is_stateful", False) or uncached or not makes():
        return False
    length = getattr(output_cache(output), "get_seq_length", None)
    return length is not None and int(length()) == tokens


def _has_memory(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and not isinstance(x, StandIn)


class _Alive(TorchDispatchMode):
    """Counts the bytes of tensors made meanwhile: `now`, and `peak`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if _has_memory(x)}
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if _has_memory(made):
                self._count(made.untyped_storage(), inputs)
        return result

    def _count(self, storage: Any, inputs: set[int]) -> None:
        if storage.data_ptr() in inputs or storage in self._seen:
            return
        self._seen.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, storage.nbytes())

    def _forget(self, size_bytes: int) -> None:
        self.now -= size_bytes
