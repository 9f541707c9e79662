"""A model's own text, written by the native engine from 8-bit codes of its weights.

    checkpoint ──pack──► codes, in a folder of the cache ──open──► LlamaModel ──sample──► tokens
                └─ not a model of the engine's: UnsupportedError, and transformers writes

A token of many sequences is one pass over the weights, which are multiplied as the bytes that they are stored in. Text
of a model this close is text of the original.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

import torch

from waterfill.base import process
from waterfill.base.cache import cache_folder
from waterfill.base.errors import CheckpointError, MemoryLimitError, UnsupportedError, WaterfillError
from waterfill.base.progress import Progress, Step, step_of
from waterfill.files.architecture import Architecture, describe
from waterfill.files.checkpoint import Checkpoint
from waterfill.packing.pack import pack_plan
from waterfill.planning.ancestral import TOGETHER, Read, sample
from waterfill.planning.budget import Budget
from waterfill.planning.loss import Coefficients
from waterfill.planning.plan import Plan
from waterfill.planning.planner import Request, make_plan
from waterfill.planning.probe_texts import HELD_WEIGHTS
from waterfill.planning.sensitivity import Sensitivity
from waterfill.running.engine.families.llama import LlamaModel, working
from waterfill.running.engine.families.llama_spec import config_of
from waterfill.running.engine.opening import check_library, open_model

_log = logging.getLogger(__name__)

CODEC = "levels-8"
TEXTS_SHARE = 0.25  # of the free memory that keys and values of all texts of a pass may take


class OwnText:
    """Who writes a checkpoint's own text; use it in a `with` statement, which tidies up. Asked first, it packs.

        with OwnText(checkpoint, architecture) as text:
            tokens = text.sample(range(32), 512, seed=0)

    Args:
        progress: told of packing.
    """

    def __init__(self, checkpoint: Checkpoint, architecture: Architecture, progress: Progress | None = None) -> None:
        self._checkpoint, self._architecture, self._progress = checkpoint, architecture, progress
        self._model: LlamaModel | None = None
        self._refusal: str | None = None
        self._weights = sum(math.prod(matrix.shape) for matrix in architecture.matrices)
        self._texts_bytes = 0.0  # of the texts of a pass, at most
        self._files = ExitStack()

    def __enter__(self) -> OwnText:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._model = None
        self._files.close()

    def sample(
        self, numbers: Sequence[int], length: int, seed: int, progress: Step | None = None, *, start: int | None = None
    ) -> torch.Tensor:
        """Sequences of these numbers, int64 `[numbers, length]`, at temperature 1; each depends on the seed and its
        number alone, and goes on from a random token, or from `start` and a random token.

        Raises:
            UnsupportedError: the engine cannot run the model; the log has said why, once.
            CheckpointError: a weight is NaN or infinite.
            WaterfillError: logits are NaN or infinite; more tokens than the model has positions.
        """
        try:
            return self._sample(self._opened(), numbers, length, seed, start, progress)
        except MemoryLimitError as error:
            raise self._refused(error) from error
        finally:
            if self._model is not None and self._model.streaming is None and self._weights > HELD_WEIGHTS:
                self._model = None  # whoever measures on the text needs the memory

    def _sample(
        self,
        model: LlamaModel,
        numbers: Sequence[int],
        length: int,
        seed: int,
        start: int | None,
        progress: Step | None,
    ) -> torch.Tensor:
        return sample(
            lambda count: _begin(model, count, length),
            numbers,
            length,
            seed,
            start=start,
            vocabulary=model.vocabulary,
            together=self._together(model, length),
            progress=progress,
        )

    def _opened(self) -> LlamaModel:
        if self._refusal is not None:
            raise UnsupportedError(self._refusal)
        if self._model is None:
            try:
                self._model = self._open()
            except CheckpointError:
                raise
            except (WaterfillError, OSError) as error:
                raise self._refused(error) from error
        return self._model

    def _open(self) -> LlamaModel:
        check_library()
        config_of(self._checkpoint.config)  # before minutes of packing
        artifact = self._pack(_all_packed(self._checkpoint, self._architecture))
        self._texts_bytes = TEXTS_SHARE * process.free_bytes()
        model = open_model(artifact, verify=False)
        if model.streaming is None:
            self._files.close()  # at once: whatever ends the process later leaves nothing behind
        return model

    def _pack(self, architecture: Architecture) -> Path:
        cache_folder().mkdir(parents=True, exist_ok=True)
        folder = self._files.enter_context(TemporaryDirectory(prefix="own-text-", dir=cache_folder()))
        step = step_of(self._progress, "packing it to sample from")
        progress = None if step is None else lambda _, done, total: step(done, total)
        plan = _plan(self._checkpoint, architecture)
        return pack_plan(plan, self._checkpoint, architecture, Path(folder) / "packed", progress=progress)

    def _together(self, model: LlamaModel, length: int) -> int:
        most = int(min(self._texts_bytes / working(model.spec).text_bytes(length), TOGETHER))
        return max(1, most)

    def _refused(self, error: Exception) -> UnsupportedError:
        """What the engine cannot do is said once, and is so from then on."""
        self._refusal, self._model = str(error), None
        self._files.close()
        _log.info("%s writes its own text by transformers, slower: %s", self._checkpoint.path, error)
        return UnsupportedError(self._refusal)


def _begin(model: LlamaModel, count: int, length: int) -> Read:
    """New texts, each with memory for all of its tokens."""
    sequences = [model.sequence() for _ in range(count)]
    for sequence in sequences:
        sequence.expected = length
    return lambda last: [rows[0] for rows in model.forward(sequences, last[:, None].tolist())]


def _all_packed(checkpoint: Checkpoint, architecture: Architecture) -> Architecture:
    """The same, with all matrices as such, whichever of them the user keeps: the engine has to have them packed."""
    keeps = any(len(tensor.shape) > 1 for tensor in architecture.kept)
    return describe(checkpoint) if keeps else architecture


def _plan(checkpoint: Checkpoint, architecture: Architecture) -> Plan:
    """One codec for all matrices, which any coefficients give."""
    coefficients = {matrix.name: Coefficients(1.0, 1.0) for matrix in architecture.matrices}
    probe = {"kind": "none"}
    made_up = Sensitivity(checkpoint.fingerprint, "fisher", probe, nll=0.0, tokens=1, tensors=coefficients)
    request = Request(gain="unbiased", uniform=True, codecs=(CODEC,), purpose="memory")
    return make_plan(checkpoint.path.name, architecture, made_up, Budget(bits=16.0), request)
