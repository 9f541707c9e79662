"""Streamed models in tests: tiny chunks, no measuring, and a say in what is kept in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import waterfill
from waterfill.base import process
from waterfill.running.streaming.chunks import Chunk
from waterfill.running.streaming.residency import Residency
from waterfill.running.streaming.tuning import Tuning

Keep = Callable[[Sequence[Chunk]], Residency]


def nothing(sequence: Sequence[Chunk]) -> Residency:
    return Residency((), (), 1.0)


def coded(sequence: Sequence[Chunk]) -> Residency:
    return Residency(tuple(sequence), (), 1.0)


def decoded(sequence: Sequence[Chunk]) -> Residency:
    return Residency((), tuple(sequence), 1.0)


def mixed(sequence: Sequence[Chunk]) -> Residency:
    """A third of each kind, in turn."""
    return Residency(tuple(sequence[1::3]), tuple(sequence[2::3]), 1.0)


def quick(keep: Keep = nothing, *, chunk_bytes: int = 4096, part_weights: int = 2048, **others: Any) -> Tuning:
    """Streams of many small chunks. Entropy-coded parts are as large as they were packed."""
    return Tuning(
        chunk_bytes=chunk_bytes,
        part_weights=part_weights,
        reading_s=0.0,
        working_s=0.0,
        choose_residency=lambda sequence, budget, speeds: keep(sequence),
        **others,
    )


def load(artifact: Path, keep: Keep = nothing, *, tuning: Tuning | None = None, **options: Any) -> Any:
    """A streamed model, whatever its size, of which chunks are kept as `keep` says."""
    memory = process.resident_bytes() + 200_000_000
    return waterfill.load(artifact, memory=memory, streamed=True, tuning=tuning or quick(keep), **options)
