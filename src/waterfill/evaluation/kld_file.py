"""Reference predictions from a file of `llama-perplexity --kl-divergence-base`: the text's tokens are in it too.

"_logits_", context, vocabulary, windows (32-bit integers), tokens (32-bit) [windows, context], then for each scored
position of each window a scale and a least log-probability (32-bit floats) and one 16-bit number per token.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from waterfill.base.errors import WaterfillError
from waterfill.evaluation.conventions import Convention, Window
from waterfill.evaluation.expected import Expected, Rounded

MAGIC = b"_logits_"
_HEADER = struct.Struct("<8s3i")


class KldFile:
    """The file, opened; predictions are read window by window.

    Raises:
        WaterfillError: the file is of another kind.
    """

    form = "llama.cpp"
    kept: int | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise WaterfillError(f"{path} is no file; give one of `llama-perplexity --kl-divergence-base`")
        with path.open("rb") as file:
            head = file.read(_HEADER.size)
            if len(head) < _HEADER.size or not head.startswith(MAGIC):
                raise WaterfillError(f"{path} is no file of `llama-perplexity --kl-divergence-base`; give one")
            _, self.context, self.vocabulary, self.windows = _HEADER.unpack(head)
            tokens = np.frombuffer(file.read(4 * self.context * self.windows), "<i4")
        self._scored = self.context - 1 - self.context // 2
        self._row = 2 * ((self.vocabulary + 1) // 2) + 4  # 16-bit numbers of a position
        self._start = _HEADER.size + tokens.nbytes
        expected_bytes = self._start + 2 * self._row * self._scored * self.windows
        if min(self.context, self.vocabulary, self.windows) < 1 or path.stat().st_size < expected_bytes:
            raise WaterfillError(f"{path} is cut off: expected {expected_bytes} bytes; write it again")
        self.ids: Tensor = torch.from_numpy(tokens.astype(np.int64))

    def convention(self, bos: int | None) -> Convention:
        """The convention that the file was written in; `bos` as the model's vocabulary adds it."""
        return Convention("llama.cpp", self.context, bos=bos)

    def expected(self, window: Window) -> Expected:
        """The reference's predictions for a window."""
        with self.path.open("rb") as file:
            file.seek(self._start + 2 * self._row * self._scored * window.number)
            rows = np.fromfile(file, "<u2", self._row * self._scored).reshape(self._scored, self._row)
        scale, least = rows[:, :4].copy().view("<f4").T
        log_p = scale[:, None] * rows[:, 4 : 4 + self.vocabulary].astype(np.float32) + least[:, None]
        return Rounded(torch.from_numpy(log_p))
