"""What a plan's options say about speed: how fast storage is, and what this machine makes of each codec."""

from __future__ import annotations

from collections.abc import Sequence

from waterfill.base.errors import WaterfillError
from waterfill.base.progress import Progress
from waterfill.files.architecture import Architecture
from waterfill.files.checkpoint import Checkpoint
from waterfill.planning.budget import parse_rate
from waterfill.planning.options import PlanOptions
from waterfill.planning.speed import Timing
from waterfill.running.codec_speeds import codec_speeds
from waterfill.running.storage_speed import storage_speed

MEASURED = "measured"


def check_speed(options: PlanOptions) -> None:
    """Refuse what only plans for another purpose have.

    Raises:
        WaterfillError: a speed of storage without streaming, or a speed of what is not run as it is stored.
    """
    purpose, disk = options.get("purpose", "storage"), options.get("disk")
    if disk is not None and purpose != "stream":
        raise WaterfillError(f"--disk {disk} is for what is streamed; add --for stream, or leave it out")
    if disk is not None and disk != MEASURED:
        parse_rate(disk)
    if options.get("speed") is not None and purpose == "storage":
        raise WaterfillError(
            "--speed is for a plan that says how it is run; add --for memory or --for stream, or leave it out"
        )


def timing_of(
    checkpoint: Checkpoint,
    architecture: Architecture,
    codecs: Sequence[str],
    progress: Progress | None,
    options: PlanOptions,
) -> Timing | None:
    """How long products of this model take here, by any of these codecs; None for a plan for storage alone.

    What storage gives is measured on the model's own files, where nobody says it.
    """
    purpose, disk = options.get("purpose", "storage"), options.get("disk", MEASURED)
    if purpose == "storage":
        return None
    speeds = codec_speeds(codecs, kept=options.get("cache", True), progress=progress)
    if purpose == "memory":
        return Timing(speeds, None, architecture.tied_head)
    files = sorted({tensor.file for tensor in checkpoint.tensors.values()})
    rate = storage_speed(files, progress) if disk == MEASURED else parse_rate(disk)
    return Timing(speeds, rate, architecture.tied_head)
