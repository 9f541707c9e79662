"""Streamed models in tests: tiny chunks, no measuring, and a say in what is kept in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import waterfill
from waterfill.base import process
from waterfill.running.streaming import calibration, chunks, streamer
from waterfill.running.streaming.residency import Residency, Speeds

Keep = Callable[[Any], Residency]


def nothing(sequence: Any) -> Residency:
    return Residency((), (), 1.0)


def coded(sequence: Any) -> Residency:
    return Residency(tuple(sequence), (), 1.0)


def decoded(sequence: Any) -> Residency:
    return Residency((), tuple(sequence), 1.0)


def mixed(sequence: Any) -> Residency:
    """A third of each kind, in turn."""
    return Residency(tuple(sequence[1::3]), tuple(sequence[2::3]), 1.0)


def quick(
    monkeypatch: pytest.MonkeyPatch, keep: Keep = nothing, chunk_bytes: int = 4096, part_weights: int = 2048
) -> None:
    """Streams of many small chunks. Entropy-coded parts are as large as they were packed."""
    monkeypatch.setattr(calibration, "READING_S", 0.0)
    monkeypatch.setattr(calibration, "WORKING_S", 0.0)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(chunks, "PART_WEIGHTS", part_weights)
    monkeypatch.setattr(streamer, "choose", lambda sequence, budget, speeds: keep(sequence))


def load(artifact: Path, spare_bytes: int = 200_000_000, **options: Any) -> Any:
    """A streamed model, whatever its size."""
    return waterfill.load(artifact, memory=process.resident_bytes() + spare_bytes, streamed=True, **options)


__all__ = ["Speeds", "coded", "decoded", "load", "mixed", "nothing", "quick"]
