"""What a limit on a process's memory leaves for weights.

limit = what the process holds already + keys and values of a context + activations of a pass + ring + kept weights
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from waterfill import process
from waterfill.errors import MemoryLimitError
from waterfill.streaming.chunks import StreamedMatrix
from waterfill.streaming.streamer import SLOTS

CONTEXT = 2048  # tokens that room is kept for, where the model takes so many and memory allows
LEAST_CONTEXT = 256
LEAST_PASS = 16  # tokens
PASS_BYTES = 64 << 20  # of activations; longer prompts are read in several passes
LEAST_PASS_BYTES = 4 << 20
OVERHEAD_BYTES = 24 << 20  # what the interpreter, torch and the C library take beyond what is counted


class Room(NamedTuple):
    """Memory that is left over."""

    weights_bytes: int  # that may be kept
    pass_bytes: int  # activations of one pass


def held_bytes() -> int:
    """What the process takes now, when everything but streamed weights is loaded."""
    process.release()
    return process.resident_bytes()


def room(
    path: Path,
    matrices: Iterable[StreamedMatrix],
    limit_bytes: int,
    *,
    held: int,
    token_bytes: int,
    context: int | None,
    logit_bytes: int,
    yields: bool = False,
) -> Room:
    """Divide what is there beyond the least.

    Part of it is left for longer contexts and wider passes, unless kept weights yield to them when they come
    (`Streamer.make_room`).

    Args:
        path: of the artifact, for the message.
        limit_bytes: of the process's resident memory, everything included.
        held: bytes that it takes already (`held_bytes`), and is bound to take beyond what is counted here.
        token_bytes: keys and values of one token.
        context: tokens that the model takes at most; None where it does not say.
        logit_bytes: of all positions that logits are computed of at a time.

    Raises:
        MemoryLimitError: the limit is below what the model needs at least.
    """
    ring = SLOTS * max(chunk.region.size_bytes for matrix in matrices for chunk in matrix.chunks)
    most = longest(context)
    least_context = min(LEAST_CONTEXT, most)
    least = held + ring + least_context * token_bytes + logit_bytes + LEAST_PASS_BYTES
    spare = limit_bytes - least
    if spare < 0:
        smallest = math.ceil(least / 1e6)
        raise MemoryLimitError(
            f"{limit_bytes / 1e6:.0f} MB are too little for {path}: streamed, it takes {smallest} MB at least "
            f"({held / 1e6:.0f} MB of them the interpreter and what is kept, {least_context * token_bytes / 1e6:.0f} "
            f"MB a context of {least_context} tokens); give more",
            smallest_bytes=1_000_000 * smallest,
        )
    longer = 0 if yields else min((most - least_context) * token_bytes, spare // 3)
    wider = min(PASS_BYTES - LEAST_PASS_BYTES, (spare - longer) // 4)
    return Room(spare if yields else spare - longer - wider, LEAST_PASS_BYTES + wider)


def longest(context: int | None) -> int:
    """Tokens that room is kept for at most, of a model that takes `context`."""
    return CONTEXT if context is None else min(CONTEXT, context)


def pass_tokens(pass_bytes: int, hidden: int, inner: int) -> int:
    """How many tokens of a prompt are read in one pass, so that their activations fit."""
    return max(LEAST_PASS, pass_bytes // (4 * (6 * hidden + 4 * inner)))
