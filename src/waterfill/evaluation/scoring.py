"""What perplexity and divergence share: models run over windows in bounded memory, and error bars.

windows -> score_windows: logits [targets, vocab] of each window -> score, window by window -> scores [columns, targets]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from waterfill.base.errors import WaterfillError, unknown_token
from waterfill.base.progress import Step
from waterfill.evaluation.conventions import Convention, Window, batches, stacked
from waterfill.evaluation.journal import Journal
from waterfill.files.context import context_length
from waterfill.files.model_calls import read, read_on

Score = Callable[[Sequence[Window]], list[Tensor]]

SCRATCH_BYTES = 64 << 20  # bound on the widened copies of logits that are alive at a time
ENOUGH_WINDOWS = 8  # fewer say too little about the spread between windows


def score_windows(
    cut: Sequence[Window], score: Score, *, batch: int, progress: Step | None, journal: Journal | None = None
) -> list[Tensor]:
    """Scores, float64 [columns, targets], of every window, in order: `score` gets some windows of one shape at a time.

    What the journal holds already is not computed again, and what is computed is added to it at once.

    Raises:
        WaterfillError: the batch is below 1.
    """
    if batch < 1:
        raise WaterfillError(f"a batch of {batch} windows was asked for; choose at least 1")
    scores: dict[int, Tensor] = dict(journal.read()) if journal is not None else {}
    missing = [window for window in cut if window.number not in scores]
    if progress is not None:
        progress(len(scores), len(cut))
    for some in batches(missing, batch):
        for window, result in zip(some, score(some), strict=True):
            scores[window.number] = result
            if journal is not None:
                journal.add(window.number, result)
        if progress is not None:
            progress(len(scores), len(cut))
    return [scores[window.number] for window in cut]


def window_logits(model: Any, some: Sequence[Window], how: Convention) -> list[Tensor]:
    """What a model predicts where windows of one shape are scored: logits [targets, vocab] of each, in the model's
    dtype and on its device."""
    ids, first = stacked(some).to(model.device), some[0].first
    with torch.inference_mode():
        if not how.decodes:
            return [row[first:-1] for row in read(model, ids)]
        past, steps = None, []
        for step in range(ids.shape[1] - 1):
            logits, past = read_on(model, ids[:, step : step + 1], past)
            if step >= first:
                steps.append(logits[:, -1])
        return list(torch.stack(steps, dim=1))


def prepare(model: Any, cut: Sequence[Window]) -> None:
    """Put a model into evaluation mode.

    Raises:
        WaterfillError: it cannot read the windows.
    """
    context, limit = max(len(window.ids) for window in cut), context_length(model.config)
    if limit is not None and context > limit:
        raise WaterfillError(f"a context of {context} tokens was asked for, but the model has {limit}; choose fewer")
    highest = max(int(window.ids.max()) for window in cut)
    vocabulary = int(model.config.get_text_config().vocab_size)
    if highest >= vocabulary:
        raise unknown_token("the text", highest, vocabulary)
    model.eval()


def rows_in_scratch(vocabulary: int, entry_bytes: int) -> int:
    """Positions to score at a time when each needs `entry_bytes` of scratch per entry of the vocabulary."""
    return max(1, SCRATCH_BYTES // (vocabulary * entry_bytes))


def standard_error(scores: Sequence[Tensor]) -> float:
    """Standard error of the mean over all targets of scores, float64 [targets] of each window.

    Tokens of one window are correlated, so from 8 windows on windows are the independent units; below that tokens are,
    which understates the error. NaN for a single score.
    """
    if len(scores) < ENOUGH_WINDOWS:
        return token_error(torch.cat(list(scores)))
    total = sum(len(window) for window in scores)
    mean = torch.cat(list(scores)).mean()
    squares = sum(float((window - mean).sum()) ** 2 for window in scores)
    return math.sqrt(squares * len(scores) / (len(scores) - 1)) / total


def token_error(scores: Tensor) -> float:
    """Standard error of the mean of scores, float64 [targets], as if they were independent, which understates it."""
    return float(scores.std()) / math.sqrt(len(scores)) if len(scores) > 1 else math.nan


def check_finite(scores: Tensor, whose: str) -> None:
    """Refuse scores that NaN or infinite logits have made.

    Raises:
        WaterfillError: they hold NaN or infinity.
    """
    if not bool(torch.isfinite(scores).all()):
        raise WaterfillError(
            f"{whose} gives NaN or infinite logits; "
            "check its weights, and run it in float32 or bfloat16 rather than float16"
        )
