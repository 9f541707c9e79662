"""How fast files are read as a streamed model's are: past the page cache, by some threads, for a second or less."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from waterfill.base.errors import WaterfillError
from waterfill.base.progress import Progress, stage
from waterfill.running.streaming import Storage
from waterfill.running.streaming.calibration import READING_S, WAYS, fastest_reading
from waterfill.running.streaming.chunks import CHUNK_BYTES
from waterfill.running.streaming.storage import Region, make_slots


def storage_speed(files: Sequence[Path], progress: Progress | None = None) -> float:
    """Bytes per second that chunks of these files are read with.

    Raises:
        ArtifactError: one cannot be read.
        WaterfillError: there is nothing to be read.
    """
    regions = [
        Region(file, start, min(CHUNK_BYTES, size - start))
        for file in files
        for size in [file.stat().st_size]
        for start in range(0, size, CHUNK_BYTES)
    ]
    if not regions:
        raise WaterfillError("there are no files to measure storage by; say how fast it is, as in --disk 0.5GB/s")
    storage = Storage()
    slots = make_slots(max(threads for threads, _ in WAYS), max(region.size_bytes for region in regions))
    try:
        with stage(progress, "measuring storage"):
            return fastest_reading(storage, itertools.cycle(regions), slots, READING_S)[0]
    finally:
        storage.close()
