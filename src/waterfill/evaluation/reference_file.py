"""A reference's predictions in one file, to measure others by where the reference itself is not at hand.

    text ──► windows ──► the reference's logits ──condense──► ReferenceRecorder ──► FILE ──► ReferenceFile ──► scores

It is a safetensors file: the text's `tokens`, and of every scored position what `expected.TopK` knows, window after
window. Its metadata says how the text is cut, and whose predictions they are.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from waterfill.base import typed
from waterfill.base.errors import WaterfillError
from waterfill.base.typed import Count, Positive
from waterfill.base.writing import write_file
from waterfill.evaluation.conventions import Convention, Window, convention
from waterfill.evaluation.expected import SAMPLED, Expected, TopK, condense
from waterfill.evaluation.scoring import check_finite

VERSION = 1
META = "waterfill-reference"
KEPT = 64  # likeliest tokens of a position: half of the bytes that the other entries take
TOKENS = "tokens"
MOST_NATS = 1e6  # that a token may be improbable by
ROUNDING = 0.5  # nats that a logarithm may be off, in any of the dtypes
FLOATS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
NUMBERS = frozenset({torch.int32})
# What `expected.TopK` knows of a position: how often, and of which dtypes.
FIELDS = {
    "logits": (None, FLOATS),
    "tokens": (None, NUMBERS),
    "log_sum": (0, FLOATS),
    "rest": (0, FLOATS),
    "rest_entropy": (0, FLOATS),
    "sampled_logits": (SAMPLED, FLOATS),
    "sampled": (SAMPLED, NUMBERS),
    "top": (0, NUMBERS),
    "target_logits": (0, FLOATS),
}


@dataclass(frozen=True)
class _Meta:
    version: Positive
    fingerprint: str  # of the reference's weights
    vocabulary: Positive
    convention: str
    context: Positive
    stride: Positive | None
    bos: Count | None


class ReferenceRecorder:
    """Collects what a reference predicts, window by window, in order; it is in memory until it is written."""

    def __init__(self) -> None:
        self._known: list[TopK] = []
        self._vocabulary = 0

    def add(self, window: Window, logits: Tensor) -> None:
        """Logits `[targets, vocab]` of the scored positions of a window.

        Raises:
            WaterfillError: they are not finite.
        """
        check_finite(logits, "the reference")
        self._vocabulary = logits.shape[-1]
        generator = torch.Generator().manual_seed(window.number)
        self._known.append(condense(logits, window.targets, min(KEPT, self._vocabulary - 1), generator))

    def write(self, path: Path, ids: Tensor, how: Convention, fingerprint: str) -> None:
        """Put all of it into a file, with the text's tokens `[tokens]`.

        Raises:
            WaterfillError: it cannot be written.
        """
        tensors = {name: torch.cat([getattr(known, name) for known in self._known]) for name in FIELDS}
        tensors = {f"top-k.{name}": tensor.contiguous() for name, tensor in tensors.items()}
        meta = _Meta(VERSION, fingerprint, self._vocabulary, how.name, how.context, how.stride, how.bos)
        write_file(path, save({TOKENS: ids.int(), **tensors}, {META: json.dumps(asdict(meta))}))


def _possible(known: TopK, vocabulary: int) -> bool:
    """Whether these can be the probabilities of a model, but for rounding. NaN is within no bounds."""
    log_sum = known.log_sum.double()[:, None]
    logits = (known.logits, known.sampled_logits, known.target_logits[:, None])
    bounds = [(each.double() - log_sum, -MOST_NATS, ROUNDING) for each in logits]
    bounds += [(known.rest, 0, 1 + ROUNDING), (known.rest_entropy, 0, math.log(vocabulary) + 1)]
    return all(bool(((each >= low) & (each <= high)).all()) for each, low, high in bounds)


class ReferenceFile:
    """Such a file, opened; predictions are read window by window.

    Raises:
        WaterfillError: it is none, of another version, or damaged.
    """

    form = "top-k"

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            file: Any = safe_open(path, "pt")
            self._file = file
            meta = self._described()
            names = {TOKENS, *(f"top-k.{name}" for name in FIELDS)}
            if set(file.keys()) != names:
                raise ValueError(f"its tensors are not {', '.join(sorted(names))}")
            self.ids: Tensor = self._tokens(meta.vocabulary)
        except (OSError, SafetensorError, ValueError, RecursionError) as error:
            raise WaterfillError(
                f"{path} is no reference of this version ({error}); write one with `waterfill eval --save-reference`"
            ) from error
        self.vocabulary, self.fingerprint = meta.vocabulary, meta.fingerprint
        self.how = convention(meta.convention, context=meta.context, stride=meta.stride, bos=meta.bos)
        cut = self.how.cut(self.ids)
        ends = accumulate((len(window.targets) for window in cut), initial=0)
        self._places = [slice(*pair) for pair in pairwise(ends)]
        self.kept: int | None = self._check_shapes(self._places[-1].stop)

    def expected(self, window: Window) -> Expected:
        """The reference's predictions for a window.

        Raises:
            WaterfillError: they name tokens that there are not, or are no probabilities.
        """
        here = self._places[window.number]
        known = TopK(**{name: self._file.get_slice(f"top-k.{name}")[here] for name in FIELDS})
        for numbers in (known.tokens, known.sampled, known.top):
            if int(numbers.min()) < 0 or int(numbers.max()) >= self.vocabulary:
                raise self._damaged(f"window {window.number} has tokens beyond its vocabulary of {self.vocabulary}")
        if not _possible(known, self.vocabulary):
            raise self._damaged(f"window {window.number} has numbers that are no probabilities")
        return known

    def _described(self) -> _Meta:
        meta = typed.read(_Meta, json.loads((self._file.metadata() or {}).get(META, "null")))
        assert isinstance(meta, _Meta)
        if meta.version != VERSION:
            raise ValueError(f"version {meta.version}")
        return meta

    def _tokens(self, vocabulary: int) -> Tensor:
        tokens: Tensor = self._file.get_tensor(TOKENS)
        if tokens.dtype != torch.int32 or tokens.dim() != 1 or not len(tokens):
            raise ValueError("its tokens are no list of 32-bit numbers")
        if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
            raise ValueError(f"its text has tokens beyond its vocabulary of {vocabulary}")
        return tokens.long()

    def _check_shapes(self, positions: int) -> int:
        """How many tokens of a position are known."""
        shape = self._file.get_slice("top-k.logits").get_shape()
        kept = shape[1] if len(shape) == 2 else 0
        if not 0 < kept < self.vocabulary:
            raise self._damaged(f"{kept} likeliest tokens of {self.vocabulary} are known")
        for name, (count, dtypes) in FIELDS.items():
            given = self._file.get_slice(f"top-k.{name}")
            wanted = [positions] if count == 0 else [positions, count or kept]
            if given.get_shape() != wanted or given[:0].dtype not in dtypes:
                raise self._damaged(f"{name} is {given.get_dtype()} {given.get_shape()}, expected {wanted}")
        return int(kept)

    def _damaged(self, how: str) -> WaterfillError:
        return WaterfillError(f"{self.path} is damaged: {how}; write it again with `waterfill eval --save-reference`")
