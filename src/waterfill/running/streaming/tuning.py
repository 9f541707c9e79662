"""Sizes and times of streaming in one place: the usual ones, and how to be given others.

    waterfill.load, Engine, open_model ──Tuning──┬── matrix ──► chunks and parts
                                                 ├── Streamer: calibration, ring, what is kept
                                                 └── Limit: how wide a pass may be

Results do not depend on them. Tests cut small models into many chunks and measure nothing:

    waterfill.load(artifact, streamed=True, tuning=Tuning(chunk_bytes=4096, reading_s=0.0, working_s=0.0))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from waterfill.base.arguments import Check
from waterfill.base.errors import WaterfillError
from waterfill.files.artifact import StoredTensor
from waterfill.running.streaming.ahead import SLOTS
from waterfill.running.streaming.calibration import READING_S, WORKING_S
from waterfill.running.streaming.chunks import CHUNK_BYTES, PART_WEIGHTS, Chunk, StreamedMatrix
from waterfill.running.streaming.residency import Residency, Speeds, choose_residency
from waterfill.running.streaming.storage import Storage

CACHE_SHARE = 0.9  # of what is left over, for experts
PASS_BYTES = 64 << 20  # of activations; longer prompts are read in several passes

ChooseResidency = Callable[[Sequence[Chunk], int, Speeds], Residency]  # chunks of a pass, bytes that they may take


@dataclass(frozen=True)
class Tuning:
    """What may be chosen about streaming.

    Raises:
        WaterfillError: nothing could be read with such sizes and times.
    """

    chunk_bytes: int = CHUNK_BYTES  # read at once, about
    part_weights: int = PART_WEIGHTS  # of codes of a fixed rate, decoded by one thread
    slots: int = SLOTS  # of the ring
    reading_s: float = READING_S  # of measuring, for each way of reading
    working_s: float = WORKING_S  # of measuring
    cache_share: float = CACHE_SHARE
    pass_bytes: int = PASS_BYTES
    choose_residency: ChooseResidency = choose_residency  # what is kept in memory

    def __post_init__(self) -> None:
        least = dict.fromkeys(("chunk_bytes", "part_weights", "slots", "pass_bytes"), 1)
        for name, value in (least | dict.fromkeys(("reading_s", "working_s", "cache_share"), 0)).items():
            if getattr(self, name) < value:
                raise WaterfillError(f"{name} is {getattr(self, name)}; choose at least {value}")

    def matrix(self, tensor: StoredTensor, storage: Storage, *, verify: bool) -> StreamedMatrix:
        """A matrix in chunks and parts of these sizes.

        Raises:
            ArtifactError: as `StreamedMatrix` does.
        """
        sizes = {"chunk_bytes": self.chunk_bytes, "part_weights": self.part_weights}
        return StreamedMatrix(tensor, storage, verify=verify, **sizes)


USUAL = Tuning()
GIVEN = Check("a Tuning", lambda value: isinstance(value, Tuning))  # as an argument of a public function
