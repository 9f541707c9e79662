"""A streamer within a limit of memory: of codes that are all in memory where they fit, else of storage."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from waterfill.base.errors import MemoryLimitError
from waterfill.base.progress import Step
from waterfill.running.streaming.chunks import StreamedMatrix
from waterfill.running.streaming.fit import Fit
from waterfill.running.streaming.limit import Working, held_bytes, spare_bytes
from waterfill.running.streaming.storage import Storage
from waterfill.running.streaming.streamer import Streamer
from waterfill.running.streaming.tuning import Tuning


def open_streamer(
    path: Path,
    storage: Storage,
    sequence: Sequence[StreamedMatrix],
    others: Sequence[StreamedMatrix],
    chosen: Fit,
    working: Working,
    *,
    overhead_bytes: int,
    context: int | None,
    logits: int,
    verify: bool,
    progress: Step | None = None,
    tuning: Tuning,
) -> Streamer:
    """A streamer of a model whose other parts are in memory by now.

    Args:
        path: of the artifact, for messages.
        storage, sequence, others, verify, progress, tuning: as of `Streamer`.
        chosen: what the process may take, and whether codes are to be in memory.
        working, context, logits: as of `spare_bytes`.
        overhead_bytes: what the process is bound to take beyond what is counted.

    Raises:
        MemoryLimitError: the limit is below what the model needs at least.
        ArtifactError: a matrix is damaged.
    """
    matrices = (*sequence, *others)
    spare = partial(
        spare_bytes,
        path,
        matrices,
        chosen.limit_bytes,
        working,
        held=held_bytes() + overhead_bytes,
        context=context,
        logits=logits,
    )
    codes_bytes = sum(matrix.coded_bytes for matrix in matrices)
    in_memory, kept_bytes = chosen.codes is not False, 0
    if in_memory:
        try:
            left = spare(slots=1, codes_bytes=codes_bytes)
            kept_bytes = codes_bytes + (0 if chosen.codes else left)  # somebody who asks for codes wants no more
        except MemoryLimitError:
            if chosen.codes:
                raise
            in_memory = False
    return Streamer(
        storage,
        sequence,
        others,
        spare_bytes=kept_bytes if in_memory else spare(slots=tuning.slots),
        limit_bytes=chosen.limit_bytes - overhead_bytes // 2,
        in_memory=in_memory,
        verify=verify,
        progress=progress,
        tuning=tuning,
    )
