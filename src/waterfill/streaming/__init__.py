"""Models that do not fit in memory: weights come from storage for every token, decoded and multiplied as they come.

    artifact ──attach──► model whose packed modules have a source ──► Streamer ──► what is read, kept, multiplied

`budget` says what of a limit on the process's memory is left for weights, `attach` builds the streamer.
"""

from waterfill.streaming.attach import attach, smallest_bytes
from waterfill.streaming.streamer import Streamer
from waterfill.streaming.summary import Summary

__all__ = ["Streamer", "Summary", "attach", "smallest_bytes"]
