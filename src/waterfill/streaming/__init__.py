"""Models that do not fit in memory: weights come from storage for every token, decoded and multiplied as they come.

    artifact ──attach──► model whose packed modules have a source ──► Streamer ──► what is read, kept, multiplied

`attach` sees what a limit on the process's memory leaves for weights, and builds the streamer.
"""

from waterfill.streaming.limit import attach
from waterfill.streaming.measure import measure_stages
from waterfill.streaming.streamer import Streamer
from waterfill.streaming.summary import Summary

__all__ = ["Streamer", "Summary", "attach", "measure_stages"]
