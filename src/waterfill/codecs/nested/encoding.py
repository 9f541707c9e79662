"""Encoding a matrix by a ladder of trellises: each stage codes what the ones below it leave.

    rows ──rotate──► targets ──trellis──► restored ──────────────► level 1
                        │                    │ sum ──────────────► level 2, …
                        └── minus ◄──────────┘
                              └── what is left ──trellis──► restored

Each stage is scaled so that it leaves least, which makes what is restored too short for whoever stops there. A level
has a gain of its own for every stream, by which its sum is multiplied (design.md §5).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from waterfill.base.lazy import torch
from waterfill.codecs.contract import Encoder, Piece
from waterfill.codecs.feedback import Feedback
from waterfill.codecs.hadamard import rotate
from waterfill.codecs.trellis.encoding import StreamEncoder, gain_of


class NestedEncoder(Encoder):
    """Encodes a matrix stage by stage, a block of rows after the other.

    Args:
        stages: encoders of the stages, by their number, from the lowest on.
        rows_per_stream: of all but the last.
    """

    def __init__(
        self,
        stages: Mapping[int, StreamEncoder],
        rows_per_stream: int,
        exponent: int,
        rho: float,
        feedback: Feedback | None,
    ) -> None:
        self._stages, self._rows, self._exponent = stages, rows_per_stream, exponent
        self._rho, self._feedback = rho, feedback
        self._gains: dict[int, list[float]] = {stage: [] for stage in stages}
        self.block_rows = min(stage.block_rows for stage in stages.values())
        if feedback is not None:
            feedback.remembered = max(feedback.remembered, len(stages))

    def add(self, rows: torch.Tensor) -> Iterator[Piece]:
        rotated = rotate(rows.to(torch.float32) * 2.0**-self._exponent)
        total, gains = torch.zeros_like(rotated), list[float]()
        for number, stage in self._stages.items():
            pieces, restored = stage.restored(rotated - total)
            yield from (piece._replace(key=streams_key(number)) for piece in pieces)
            total += restored
            gains = self._level_gains(rotated, total)
            self._gains[number] += gains
        level = _by_stream(total, gains, self._rows)
        unit_power = 4.0**self._exponent
        self.noise_power += float((rotated - level).double().square().sum()) * unit_power
        self.power += float(rotated.double().square().sum()) * unit_power

    def _level_gains(self, rotated: torch.Tensor, total: torch.Tensor) -> list[float]:
        pairs = zip(rotated.split(self._rows), total.split(self._rows), strict=True)
        return [float(np.float16(gain_of(w, some, self._rho, self._feedback))) for w, some in pairs]

    def finish(self) -> Iterator[Piece]:
        for number, stage in self._stages.items():
            yield from (piece._replace(key=streams_key(number)) for piece in stage.finish())
            yield Piece(gains_key(number), 0, np.array(self._gains[number], "<f2").tobytes())


def streams_key(stage: int) -> str:
    """Of the buffer with a stage's streams."""
    return f"streams{stage}"


def gains_key(stage: int) -> str:
    """Of the buffer with the gains of the level that ends with a stage."""
    return f"gains{stage}"


def _by_stream(rows: torch.Tensor, gains: Sequence[float], rows_per_stream: int) -> torch.Tensor:
    """Rows, each stream's multiplied by its gain."""
    return torch.cat([some * gain for some, gain in zip(rows.split(rows_per_stream), gains, strict=True)])
