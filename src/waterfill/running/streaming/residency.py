"""What stays in memory: how a budget of bytes is spent so that a pass over the model takes the least time.

A pass takes as long as the slower of storage, which reads what is not kept, and the processor, which decodes what is
not kept decoded, and multiplies everything. A byte of memory therefore buys different things:

    coded     saves reading the byte
    decoded   saves reading the weights' codes and decoding them, at one or two bytes per weight

Where all codes fit, nothing is read at all, and what is left over holds decoded ones (`keep_coded`).
Where storage limits, a byte kept coded saves the most; where decoding does, only decoded ones save anything. Between
the two the best mixture is where both take equally long.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from waterfill.running.streaming.chunks import Chunk


@dataclass(frozen=True)
class Speeds:
    """Of this machine, measured."""

    read_bytes_per_s: float
    decode_weights_per_s: float  # all threads
    multiply_weights_per_s: float  # one token; all threads

    def read_s(self, chunks: Iterable[Chunk]) -> float:
        return sum(chunk.region.size_bytes for chunk in chunks) / self.read_bytes_per_s

    def work_s(self, decoded: Iterable[Chunk], multiplied: Iterable[Chunk]) -> float:
        return (
            sum(chunk.weights for chunk in decoded) / self.decode_weights_per_s
            + sum(chunk.weights for chunk in multiplied) / self.multiply_weights_per_s
        )


@dataclass(frozen=True)
class Residency:
    """Which chunks are kept, and in which form. The others are read for every pass."""

    coded: tuple[Chunk, ...]
    decoded: tuple[Chunk, ...]
    expected_s: float  # of a pass with one token

    @property
    def kept(self) -> frozenset[Chunk]:
        return frozenset(self.coded) | frozenset(self.decoded)


def choose_residency(chunks: Sequence[Chunk], budget_bytes: int, speeds: Speeds, steps: int = 16) -> Residency:
    """The residency that fits in the budget and makes a pass shortest, of shares of the budget for decoded chunks.

    Kept chunks are spread evenly over the pass: storage reads ahead while they are multiplied.
    """
    best: Residency | None = None
    for step in range(steps + 1):
        decoded = _spread(chunks, {c: c.decoded_bytes for c in chunks}, budget_bytes * step // steps)
        used = sum(chunk.decoded_bytes for chunk in decoded)
        taken = set(decoded)
        rest = [chunk for chunk in chunks if chunk not in taken]
        coded = _spread(rest, {c: c.region.size_bytes for c in rest}, budget_bytes - used)
        kept = taken | set(coded)
        read_s = speeds.read_s(c for c in chunks if c not in kept)
        expected = max(read_s, speeds.work_s(rest, chunks))
        if best is None or expected < 0.99 * best.expected_s:
            best = Residency(tuple(coded), tuple(decoded), expected)
    assert best is not None
    return best


def keep_coded(chunks: Sequence[Chunk], others: Sequence[Chunk], budget_bytes: int, speeds: Speeds) -> Residency:
    """All codes in memory, those of `others` that no pass multiplies whole as well; what the budget has beyond them
    goes to decoded chunks.

    Codes that are multiplied as they are take the kernels' layout, which is no larger.
    """
    every = [*chunks, *others]
    as_they_are = [chunk for chunk in every if chunk.matrix.stored is chunk.matrix.codec]
    rest = [chunk for chunk in chunks if chunk.matrix.stored is not chunk.matrix.codec]
    left = budget_bytes - sum(chunk.region.size_bytes for chunk in every)
    decoded = {*as_they_are, *_spread(rest, {c: c.decoded_bytes - c.region.size_bytes for c in rest}, max(0, left))}
    coded = tuple(chunk for chunk in every if chunk not in decoded)
    expected_s = speeds.work_s((chunk for chunk in chunks if chunk not in decoded), chunks)
    return Residency(coded, tuple(chunk for chunk in every if chunk in decoded), expected_s)


def _spread(chunks: Sequence[Chunk], sizes: dict[Chunk, int], budget_bytes: int) -> list[Chunk]:
    """Chunks of about the budget's share of all bytes, evenly over the sequence."""
    total = sum(sizes.values())
    if total <= budget_bytes:
        return list(chunks)
    chosen, used, seen = [], 0, 0
    for chunk in chunks:
        seen += sizes[chunk]
        if used + sizes[chunk] <= seen * budget_bytes / total:
            chosen.append(chunk)
            used += sizes[chunk]
    return chosen
