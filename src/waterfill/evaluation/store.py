"""A reference's predictions on disk, in bounded space: computed once, window by window, and used by every evaluation.

    cache folder / references / KEY / meta.json, 00000.safetensors, …     KEY: weights, token ids, convention
    cache folder / scores / KEY                                           journals of evaluations under way

All logits where those of the text fit into the limit, else the likeliest k of each position, as many as fit, with a
sample of the rest (`expected.TopK`). References that have not been used for longest make room for new ones.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from waterfill.base.cache import cache_folder
from waterfill.base.errors import WaterfillError
from waterfill.base.progress import Step
from waterfill.base.writing import write_file
from waterfill.evaluation.conventions import Convention, Window
from waterfill.evaluation.expected import SAMPLED, Exact, Expected, TopK, condense
from waterfill.evaluation.scoring import check_finite, prepare, score_windows, window_logits
from waterfill.planning.budget import parse_size

LIMIT_VARIABLE = "WATERFILL_CACHE_SIZE"
LIMIT_BYTES = 4_000_000_000
FORGOTTEN_S = 30 * 24 * 3600.0
FREE_SHARE = 0.5  # of the disk's free space that references may take
LARGEST_KEPT = 4096
SMALLEST_KEPT = 64  # with fewer, a reference is not worth storing

META = "meta.json"
EXACT, TOP_K = "exact", "top-k"


@dataclass(frozen=True)
class EvaluationCache:
    """Where evaluations keep what they can use again, and how much of it."""

    folder: Path
    limit_bytes: int = LIMIT_BYTES  # of all references together

    @classmethod
    def default(cls) -> EvaluationCache:
        """The user's cache folder, or WATERFILL_CACHE; as much as WATERFILL_CACHE_SIZE says.

        Raises:
            WaterfillError: that is no size.
        """
        limit = os.environ.get(LIMIT_VARIABLE)
        return cls(cache_folder(), parse_size(limit) if limit else LIMIT_BYTES)

    def reference(self, key: str, most: int | None = None) -> ReferenceStore:
        """What is stored under a key: all, some or nothing of it; of `most` tokens of every position, where given."""
        return ReferenceStore(self.folder / "references" / key, self.limit_bytes, most)

    def journal_path(self, key: str) -> Path:
        """File for the scores of an evaluation under way. What nobody came back to for a month is removed."""
        scores = self.folder / "scores"
        for file in scores.iterdir() if scores.is_dir() else ():
            if file.stat().st_mtime < time.time() - FORGOTTEN_S:
                file.unlink(missing_ok=True)
        return scores / key


def evaluation_key(ids: Tensor, how: Convention, *whose: str) -> str:
    """A name for an evaluation of models with these fingerprints on these token ids."""
    digest = blake2b(ids.numpy().tobytes(), digest_size=16)
    digest.update(repr((how, whose)).encode())
    return digest.hexdigest()


class ReferenceStore:
    """The predictions of one reference on one text, in one folder."""

    def __init__(self, folder: Path, limit_bytes: int, most: int | None = None) -> None:
        """`most`: tokens to keep of every position, where fewer than all are wanted."""
        self.folder, self._limit_bytes, self._most = folder, limit_bytes, most
        self._meta: dict[str, Any] = {}
        try:
            self._meta = json.loads((folder / META).read_text("utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(folder, ignore_errors=True)  # what lies here without its description is of no use

    @property
    def form(self) -> str:
        """`exact` or `top-k`."""
        return str(self._meta["form"])

    @property
    def kept(self) -> int | None:
        """Tokens per position that are known, None for all."""
        return int(self._meta["kept"]) if self.form == TOP_K else None

    @property
    def vocabulary(self) -> int:
        return int(self._meta["vocabulary"])

    def complete(self, cut: Sequence[Window]) -> bool:
        """Whether every window is there."""
        return bool(self._meta) and all(self._file(window).exists() for window in cut)

    def fill(
        self, model: Any, cut: Sequence[Window], how: Convention, *, batch: int = 1, progress: Step | None = None
    ) -> bool:
        """Compute the windows that are missing. False, with nothing stored, where too little of them would fit."""
        prepare(model, cut)
        missing = [window for window in cut if not self._meta or not self._file(window).exists()]

        def compute(some: Sequence[Window]) -> list[Tensor]:
            for window, logits in zip(some, window_logits(model, some, how), strict=True):
                check_finite(logits, "the reference")
                if not self._meta:
                    self._begin(logits, sum(len(each.targets) for each in cut))
                if self.form != "none":
                    self._write(window, logits)
            return [torch.empty(0)] * len(some)

        if not self._meta and missing:
            compute(missing[:1])  # the first says how large the rest is
            if self.form == "none":
                return False
            missing = missing[1:]
        done = len(cut) - len(missing)
        score_windows(
            missing,
            compute,
            batch=batch,
            progress=None if progress is None else lambda some, _: progress(done + some, len(cut)),
        )
        return True

    def expected(self, window: Window) -> Expected:
        """The reference's predictions for a window.

        Raises:
            WaterfillError: they have gone or are damaged.
        """
        try:
            tensors = load_file(self._file(window))
            os.utime(self.folder / META)
            return Exact(tensors["logits"]) if self.form == EXACT else TopK(**tensors)
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise WaterfillError(
                f"the stored reference {self.folder} has lost window {window.number} ({error}); "
                "remove that folder and run again"
            ) from error

    def _begin(self, logits: Tensor, targets: int) -> None:
        """Choose a form, make room for it, and write it down."""
        vocabulary, entry_bytes = logits.shape[-1], logits.element_size()
        references = self.folder.parent
        references.mkdir(parents=True, exist_ok=True)
        limit = min(self._limit_bytes, FREE_SHARE * (shutil.disk_usage(references).free + _size_bytes(references)))
        form, kept, needed = EXACT, vocabulary, targets * vocabulary * entry_bytes
        if needed > limit or (self._most is not None and self._most < vocabulary):
            fixed = 8 * 3 + 4 + entry_bytes + SAMPLED * (4 + entry_bytes)
            room = int(limit / targets - fixed) // (4 + entry_bytes)
            kept = min(self._most or LARGEST_KEPT, room, vocabulary - SAMPLED)
            form, needed = (
                (TOP_K, targets * (fixed + kept * (4 + entry_bytes))) if kept >= SMALLEST_KEPT else ("none", 0)
            )
        self._meta = {"form": form, "kept": kept, "vocabulary": vocabulary}
        if form == "none":
            return
        _evict(references, int(limit - needed))
        write_file(self.folder / META, json.dumps(self._meta))

    def _write(self, window: Window, logits: Tensor) -> None:
        if self.form == EXACT:
            tensors = {"logits": logits.cpu().contiguous()}
        else:
            generator = torch.Generator().manual_seed(window.number)
            tensors = vars(condense(logits, window.targets, self._meta["kept"], generator))
        partial = self.folder / f"{window.number}.{os.getpid()}.partial"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
        partial.replace(self._file(window))

    def _file(self, window: Window) -> Path:
        return self.folder / f"{window.number:05d}.safetensors"


def _size_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _evict(references: Path, others_bytes: int) -> None:
    """Remove the references that have not been used for longest, until the others take no more than that."""
    folders = sorted(
        (folder for folder in references.iterdir() if (folder / META).exists()),
        key=lambda folder: (folder / META).stat().st_mtime,
    )
    sizes = [_size_bytes(folder) for folder in folders]
    while folders and sum(sizes) > others_bytes:
        shutil.rmtree(folders.pop(0), ignore_errors=True)
        sizes.pop(0)
