"""A limit on a process's memory: what it leaves for weights, and how it is held while texts are read.

limit = what the process holds already + keys and values of a text + activations of a pass + ring
        + a chunk that Python decodes, of codecs that the library does not know + kept weights

`spare_bytes` divides it when a streamed model is loaded. Afterwards a `Limit` looks at every text before it is begun,
and has kept weights yield before every pass.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from waterfill.base import process
from waterfill.base.errors import MemoryLimitError
from waterfill.running.streaming.ahead import SLOTS, ring_bytes
from waterfill.running.streaming.chunks import StreamedMatrix, decoding_bytes
from waterfill.running.streaming.streamer import Streamer
from waterfill.running.streaming.tuning import PASS_BYTES

LEAST_CONTEXT = 256  # tokens that a model has to be able to read
LEAST_PASS = 16  # tokens
OVERHEAD_BYTES = 24 << 20  # what the interpreter, torch and the C library take beyond what is counted


@dataclass(frozen=True)
class Working:
    """What running a model takes beside its weights, in bytes."""

    token: float  # of a text: keys and values
    activations: float  # of a token of a pass
    logits: int  # of a position whose logits are computed
    scores: float = 0.0  # of a token of a pass, for each token of the text that it may look at
    fixed: float = 0.0  # of every pass and text, however short
    text: int = 0  # of every text, however short, beside `fixed`

    def text_bytes(self, tokens: int) -> int:
        return math.ceil(tokens * self.token) + (self.text if tokens else 0)

    def pass_bytes(self, tokens: int, context: int, logits: int) -> int:
        """Of a pass whose last token is the text's token `context`."""
        return math.ceil(self.fixed + tokens * (self.activations + context * self.scores) + logits * self.logits)

    def widest(self, size_bytes: float, context: int) -> int:
        """Tokens of a pass that takes so much; LEAST_PASS at least."""
        return max(LEAST_PASS, int((size_bytes - self.fixed) / (self.activations + context * self.scores)))


class Limit:
    """Memory of the process that a model is run in.

    Args:
        path: of the artifact, for messages.
        limit_bytes: resident memory that the process is to stay below, everything included.
        working: what texts take.
        overhead_bytes: what the process is bound to take beyond what is counted; half of it has been taken by now.
        streamer: whose kept weights yield; None where all weights are in memory.
        binding: whether what does not fit is refused, as where somebody gave the limit.
        pieces: whether a prompt can be read in several passes.
        pass_bytes: that activations of a pass may take; longer prompts are read in several passes.
    """

    def __init__(
        self,
        path: Path,
        limit_bytes: int,
        working: Working,
        *,
        overhead_bytes: int,
        streamer: Streamer | None = None,
        binding: bool = True,
        pieces: bool = True,
        pass_bytes: int = PASS_BYTES,
    ) -> None:
        self.path, self.working, self.pieces = path, working, pieces
        self._overhead_bytes = overhead_bytes // 2
        self._limit_bytes = limit_bytes - self._overhead_bytes
        self._streamer, self._binding, self._pass_bytes = streamer, binding, pass_bytes
        self._draft_bytes = 0  # that a draft is to take for its text yet
        self._leader: Limit | None = None  # of the model that this one is the draft of
        self._whole_bytes = 0

    def admit(
        self,
        text: int,
        prompt: int,
        *,
        held: int = 0,
        logits: int = 1,
        whole: bool = False,
        draft: Limit | None = None,
        others_bytes: int = 0,
    ) -> None:
        """Before a text of `text` tokens, of which `prompt` are read first, in one pass if that is to be `whole`, and
        `held` have been read already.

        A draft's text counts as well, and kept weights yield to it from now on; so does what texts that were admitted
        before are to take yet (`others_bytes`).

        Raises:
            MemoryLimitError: the text does not fit, even with all kept weights given up and in the narrowest passes.
        """
        self._draft_bytes, self._leader = 0, None
        if draft is not None:
            draft._leader, draft._streamer = self, self._streamer
            draft._whole_bytes = self._draft_bytes = draft._text_bytes(text, prompt, 1)
        needed = self._text_bytes(text, prompt, logits, whole=whole) - self.working.text_bytes(held)
        needed += others_bytes + self._overhead_bytes // 2  # what is begun should come to its end
        if self._binding and not self._fits(needed):
            what = f"reading {prompt} tokens and writing {text - prompt}"
            raise self._refusal(what, needed, "shorten the text")
        self._yield(0)

    def widest(self, tokens: int, context: int, *, logits: int = 1, growth_bytes: int = 0, share: float = 1.0) -> int:
        """How many of the next `tokens` are best read in one pass, with a share of what is free; other arguments as of
        `begin_pass`."""
        left = self._limit_bytes - self._firm_bytes() - growth_bytes - logits * self.working.logits
        return min(tokens, self.working.widest(min(share * left, self._pass_bytes), context))

    def begin_pass(self, tokens: int, context: int, *, logits: int, growth_bytes: int, whole: bool = False) -> int:
        """Before the next `tokens`, the last of which is the text's token `context`: have kept weights yield to a pass,
        and to a cache of keys and values that grows by `growth_bytes`.

        Returns:
            How many of the tokens to read in this pass: all of them if it is to be a `whole` one.

        Raises:
            MemoryLimitError: there is too little memory for that.
        """
        count = tokens if whole else self.widest(tokens, context, logits=logits, growth_bytes=growth_bytes)
        self._yield(growth_bytes + self.working.pass_bytes(count, context, logits))
        if not whole:  # once more: what was given up is not always the system's at once
            count = self.widest(count, context, logits=logits, growth_bytes=growth_bytes)
        needed = growth_bytes + self.working.pass_bytes(count, context, logits)
        if whole:  # it was looked at when its width was chosen: only what would exceed the limit itself is refused
            needed -= self._overhead_bytes
        if self._binding and not self._fits(needed):
            raise self._refusal(f"{count} tokens at a time", needed, "choose fewer")
        if self._leader is not None:
            self._leader._draft_bytes = max(0, self._whole_bytes - self.working.text_bytes(context))
        return count

    def _refusal(self, what: str, needed_bytes: int, instead: str) -> MemoryLimitError:
        limit_bytes = self._limit_bytes + self._overhead_bytes
        smallest = math.ceil((self._firm_bytes() + needed_bytes + self._overhead_bytes) / 1e6)
        return MemoryLimitError(
            f"{limit_bytes / 1e6:.0f} MB are too little for {what} with {self.path}: that takes {smallest} MB at "
            f"least; give more, or {instead}",
            smallest_bytes=1_000_000 * smallest,
        )

    def _yield(self, needed_bytes: int) -> None:
        if self._streamer is not None:
            self._streamer.make_way(needed_bytes + self._draft_bytes)

    def _text_bytes(self, text: int, prompt: int, logits: int, *, whole: bool = False) -> int:
        piece = min(prompt, LEAST_PASS) if self.pieces and not whole else prompt
        return self.working.text_bytes(text) + self.working.pass_bytes(piece, text, logits)

    def _fits(self, needed_bytes: int) -> bool:
        if self._firm_bytes() + needed_bytes <= self._limit_bytes:
            return True
        process.release()  # what was freed may count as held
        return self._firm_bytes() + needed_bytes <= self._limit_bytes

    def _firm_bytes(self) -> int:
        """What the process holds, or is bound to, and cannot give up for a text."""
        held = process.resident_bytes() + self._draft_bytes
        return held if self._streamer is None else held + self._streamer.firm_bytes


def held_bytes() -> int:
    """What the process takes now, when everything but streamed weights is loaded."""
    process.release()
    return process.resident_bytes()


def spare_bytes(
    path: Path,
    matrices: Collection[StreamedMatrix],
    limit_bytes: int,
    working: Working,
    *,
    held: int,
    context: int | None,
    logits: int,
    slots: int = SLOTS,
    codes_bytes: int = 0,
) -> int:
    """Bytes of weights that may be kept: all that is there beyond the least, until longer texts or wider passes come.

    Args:
        path: of the artifact, for the message.
        limit_bytes: of the process's resident memory, everything included.
        held: bytes that it takes already (`held_bytes`), and is bound to take beyond what is counted here.
        context: tokens that the model takes at most; None where it does not say.
        logits: positions whose logits are computed at a time.
        slots: of the ring that chunks are read into.
        codes_bytes: of weights that are to be in memory in any case, and are not in what is returned.

    Raises:
        MemoryLimitError: the limit is below what the model needs at least.
    """
    tokens = LEAST_CONTEXT if context is None else min(LEAST_CONTEXT, context)
    text, piece = working.text_bytes(tokens), working.pass_bytes(max(LEAST_PASS, logits), tokens, logits)
    least = held + codes_bytes + ring_bytes(matrices, slots) + decoding_bytes(matrices) + text + piece
    if limit_bytes < least:
        smallest = math.ceil(least / 1e6)
        how = "with its codes in memory" if codes_bytes else "streamed"
        raise MemoryLimitError(
            f"{limit_bytes / 1e6:.0f} MB are too little for {path}: {how}, it takes {smallest} MB at least "
            f"({held / 1e6:.0f} MB of them the interpreter and what is kept, {text / 1e6:.0f} MB a context of "
            f"{tokens} tokens); give more{', or let it be streamed' if codes_bytes else ''}",
            smallest_bytes=1_000_000 * smallest,
        )
    return limit_bytes - least
