"""What stays in memory of a nested matrix whose last stage is streamed: streams of the stages below it, and gains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from waterfill.base import native
from waterfill.base.errors import ArtifactError
from waterfill.codecs import Codec, Shape

Bytes = npt.NDArray[np.uint8]


class Stage(NamedTuple):
    """Streams of a whole matrix, and where each begins and the last one ends."""

    data: Bytes
    bounds: npt.NDArray[np.int64]
    wide: bool


class HeldStages(NamedTuple):
    """Of a whole matrix."""

    below: tuple[Stage, ...]  # from the lowest on
    gains: npt.NDArray[np.uint16]  # fp16, of each stream


def held_stages(codec: Codec, shape: Shape, held: Mapping[str, Bytes], where: str) -> HeldStages | None:
    """Of the buffers of a matrix that are not cut into parts; None of a codec without stages.

    Raises:
        ArtifactError: an index is damaged; `where` begins the sentence.
    """
    stages = codec.native_stages()
    if stages is None:
        return None
    parts, rows, below = codec.parts(shape, 0), shape[0], []
    for key, wide in stages.wide.items():
        data = held[key]
        bounds = parts.bounds(rows, data[: parts.index_bytes(rows)].tobytes())
        if len(bounds) != -(-rows // parts.rows) + 1 or (np.diff(bounds) < 0).any() or bounds[-1] > len(data):
            raise ArtifactError(f"{where}: the index of its {key} is damaged; fetch the artifact again, or pack again")
        below.append(Stage(data, bounds, wide))
    return HeldStages(tuple(below), held[stages.gains].view(np.uint16))


class StageViews:
    """The stages of some parts, as the library sees them; it reads their memory."""

    def __init__(self, held: HeldStages, first_part: int, last_part: int) -> None:
        self._ends: list[npt.NDArray[np.uint32]] = []
        self._gains = held.gains[first_part:last_part]
        self._views = (native.StageView * max(1, len(held.below)))()
        self._count, self._held = len(held.below), held
        for view, stage in zip(self._views, held.below, strict=False):
            bounds = stage.bounds[first_part : last_part + 1]
            ends = np.ascontiguousarray(bounds[1:] - bounds[0], np.uint32)
            self._ends.append(ends)
            view.data, view.ends = stage.data[bounds[0] :].ctypes.data, ends.ctypes.data
            view.data_bytes, view.parts, view.wide = int(bounds[-1] - bounds[0]), len(ends), int(stage.wide)

    def put(self, view: native.ChunkView) -> None:
        """Have a chunk made of these."""
        view.gains, view.stages, view.stage_count = self._gains.ctypes.data, self._views, self._count
