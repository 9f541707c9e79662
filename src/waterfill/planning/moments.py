"""Second moments of what flows into each matrix, on calibration tokens: what calibrated rounding wants to know.

    tokens ──► block after block (`Passage`) ──► x of each matrix ──► sum of x x', of each half of the tokens

Matrices that are multiplied with the same share theirs. Memory holds the moments of as many blocks as it may; those of
further ones are taken as they are asked for, in the model's order.

A token whose x is far longer than usual, as the first of a text often is, counts as if it were shorter: in the sum it
would be all there is, while what follows normalises it away.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from waterfill.base.progress import Progress, step_of
from waterfill.codecs.groups import TINY
from waterfill.files.architecture import Architecture, Matrix
from waterfill.files.blockwise import load_blockwise
from waterfill.files.checkpoint import Checkpoint
from waterfill.files.model_calls import read
from waterfill.files.passage import Passage
from waterfill.planning.head import weighed_moments

PART_TOKENS = 1024  # that are read together, about
LONGEST = 16.0  # times the median squared length of x, that a token counts with at most
HEAD_SEQUENCES, HEAD_LENGTH = 4, 160  # that tell what the loss of a head is of: logits of a few tokens
PIECES = 4  # of the columns: only products of a piece with itself and later ones are computed, as moments are symmetric
TAKING = "taking moments of inputs"


def module_of(architecture: Architecture, model: Any, matrix: Matrix) -> nn.Module | None:
    """The linear module that multiplies with a matrix; the head for a tied embedding; None for what is looked up."""
    if matrix.expert is not None:
        return None
    if matrix.role == "embedding":
        head = model.get_output_embeddings()
        tied = architecture.tied_head and model.get_submodule(matrix.name) is model.get_input_embeddings()
        return head if tied and isinstance(head, nn.Module) else None
    module = model.get_submodule(matrix.name)
    return module if isinstance(module, nn.Module) else None


@torch.no_grad()
def second_moments(model: Any, architecture: Architecture, tokens: Tensor) -> dict[str, Tensor]:
    """Mean square of each input, float32 [in], by matrix, on token ids [sequences, length]. llama.cpp's importance
    matrix."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2).to(torch.float32)
            sums[name] = sums.get(name, torch.zeros(x.shape[1])) + x.square().sum(0)
            counts[name] = counts.get(name, 0) + len(x)

        return hook

    handles = []
    for matrix in architecture.matrices:
        module = module_of(architecture, model, matrix)
        # llama.cpp measures no moments for token embeddings, and looks them up without
        if module is not None and matrix.role != "embedding":
            handles.append(module.register_forward_pre_hook(watch(matrix.name)))
    try:
        for sequence in tokens:
            read(model, sequence[None])
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / counts[name] for name, total in sums.items()}


class Halves(NamedTuple):
    """Second moments of either half of the tokens, float32 `[in, in]`."""

    first: Tensor
    second: Tensor

    @property
    def both(self) -> Tensor:
        """Of all tokens."""
        return self.first + self.second


class _Seen(NamedTuple):
    """What a matrix was multiplied with in the trial; it is held, so that nothing else takes its place in memory."""

    name: str
    block: int
    x: Tensor
    version: int


class _Met(NamedTuple):
    """Where a matrix was met."""

    block: int  # by its call
    leader: str  # the first matrix that is multiplied with the same


class InputMoments:
    """Of all linear matrices of a model that have an input of their own: not of experts, nor of an embedding that is
    looked up alone. Those of one that is the head too are of what the head multiplies.

    Args:
        tokens: int64 `[sequences, length]`.
        dtype: that the model computes in.
        limit_bytes: that moments may take in memory; those of one block are there together whatever they take.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        tokens: Tensor,
        *,
        dtype: torch.dtype = torch.float32,
        limit_bytes: float = math.inf,
        progress: Progress | None = None,
    ) -> None:
        self._checkpoint, self._some = checkpoint, tokens[-HEAD_SEQUENCES:, :HEAD_LENGTH]
        self._model = model = load_blockwise(checkpoint, dtype)
        self._head = model.get_output_embeddings()
        self._of_head: Matrix | None = None  # what it multiplies with
        together = max(1, PART_TOKENS // tokens.shape[1])
        halves = [half.split(together) for half in tokens.chunk(2)]
        self._of_first = len(halves[0])  # parts of the first half
        self._passage = Passage(model, [part for half in halves for part in half])
        self._limit, self._step = limit_bytes, step_of(progress, TAKING)
        self._modules: dict[str, nn.Module] = {}
        self._widths: dict[str, int] = {}
        for matrix in architecture.matrices:
            if (module := module_of(architecture, model, matrix)) is not None:
                self._modules[matrix.name], self._widths[matrix.name] = module, matrix.shape[1]
                self._of_head = matrix if module is self._head else self._of_head
        self._met: dict[str, _Met] = {}
        self._recent: list[_Seen] = []
        with self._watched(self._meet, self._modules):
            self._passage.trial()
        self._recent = []
        self._sums: dict[str, Halves] = {}  # by leader, of the blocks that are in memory
        self._here = range(0)  # those blocks
        self._part = 0  # that is under way

    @property
    def names(self) -> frozenset[str]:
        """The matrices that there are moments of."""
        return frozenset(self._met)

    @property
    def operations(self) -> int:
        """Per token, of taking moments; running the model comes to it."""
        upper = (1 + 1 / PIECES) / 2  # share of the products that is computed
        return int(2 * upper * sum(self._widths[name] ** 2 for name in {met.leader for met in self._met.values()}))

    def leader(self, name: str) -> str:
        """The first matrix that is multiplied with the same as this one."""
        return self._met[name].leader

    def of(self, name: str) -> Halves:
        """Of a matrix; cheapest in the model's order."""
        met = self._met[name]
        while met.block not in self._here:
            self._advance(self._here.stop if met.block >= self._here.stop else 0)
        return self._sums[met.leader]

    def weighed(self, name: str) -> Tensor | None:
        """Of a head, moments that its loss is of (`planning.head`), on some tokens of the second half. Else None."""
        matrix = self._of_head
        if matrix is None or matrix.name != name:
            return None
        return weighed_moments(self._model, self._checkpoint, matrix, self._some)

    def _advance(self, first: int) -> None:
        """Take moments of the next blocks from the first one on, as many as memory has room for."""
        if first == 0:
            self._passage.restart()
        blocks = 1 + max(met.block for met in self._met.values())
        sizes = Counter[int]()
        for name in {met.leader for met in self._met.values()}:
            sizes[self._met[name].block] += 8 * self._widths[name] ** 2
        stop, taken = first + 1, sizes[first]
        while stop < blocks and taken + sizes[stop] <= self._limit:
            taken, stop = taken + sizes[stop], stop + 1
        here = {met.leader for met in self._met.values() if first <= met.block < stop}
        self._sums = {}  # before there are new ones
        self._sums = {name: Halves(*torch.zeros(2, self._widths[name], self._widths[name])) for name in here}
        self._take(first, stop, blocks)
        self._here = range(first, stop)

    def _take(self, first: int, stop: int, blocks: int) -> None:
        parts, self._part = len(self._passage), 0
        step = self._step or (lambda done, total: None)
        step(first * parts, blocks * parts)

        def done() -> None:
            self._part += 1
            step(first * parts + self._part * (stop - first), blocks * parts)

        with self._watched(self._add, self._sums):
            self._passage.advance(stop, done)
        for halves in self._sums.values():
            for half in halves:
                _mirror(half)

    @contextmanager
    def _watched(self, see: Callable[[str, Tensor], None], names: Iterable[str]) -> Iterator[None]:
        """Tell of what these matrices are multiplied with, inside of the block."""

        def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda _, inputs: see(name, inputs[0])

        handles = [self._modules[name].register_forward_pre_hook(hook(name)) for name in names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _meet(self, name: str, x: Tensor) -> None:
        """In the trial: which block a matrix is in, and who is multiplied with the same there."""
        block = self._passage.call
        self._recent = [seen for seen in self._recent if seen.block == block]
        same = (seen.name for seen in self._recent if seen.x is x and seen.version == x._version)
        self._met.setdefault(name, _Met(block, next(same, name)))
        self._recent.append(_Seen(name, block, x, x._version))

    def _add(self, name: str, x: Tensor) -> None:
        first, second = self._sums[name]
        _accumulate(first if self._part < self._of_first else second, x.flatten(0, -2).to(torch.float32))
        if self._modules[name] is self._head:
            self._passage.end()  # nobody asks for logits


def _accumulate(total: Tensor, x: Tensor) -> None:
    """Add the upper triangle of x'x, and some of the lower one, of x `[tokens, in]`."""
    squares = x.square().sum(1, keepdim=True)
    x = x * (LONGEST * squares.median() / squares.clamp_min(TINY)).clamp_max(1).sqrt()
    for piece in _pieces(len(total)):
        total[piece, piece.start :].addmm_(x[:, piece].T, x[:, piece.start :])


def _mirror(total: Tensor) -> None:
    """The lower triangle from the upper one."""
    for piece in _pieces(len(total)):
        total[piece.stop :, piece] = total[piece, piece.stop :].T


def _pieces(width: int) -> list[slice]:
    step = -(-width // PIECES)
    return [slice(start, min(start + step, width)) for start in range(0, width, step)]
