"""Models whose levels do not fit in memory: codes from storage, or in memory, are decoded whenever they are multiplied.

    artifact ──StreamedMatrix──► Streamer ──► what is read, kept, multiplied: View ──product──► View

A transformers model gets its streamer from `attach`, and its packed modules then multiply through a `Source`. Nothing
else here needs torch, but for the reference where there is no native library.
"""

from waterfill.running.streaming.chunks import StreamedMatrix
from waterfill.running.streaming.storage import Storage
from waterfill.running.streaming.streamer import Streamer
from waterfill.running.streaming.summary import Summary
from waterfill.running.streaming.tuning import Tuning
from waterfill.running.streaming.view import Activations, View

__all__ = ["Activations", "Storage", "StreamedMatrix", "Streamer", "Summary", "Tuning", "View"]
