"""What perplexity and divergence share: models run over windows in bounded memory, and error bars.

windows [windows, context] -> score_windows: logits [context - 1, vocab] of each model -> score, window by window
scores [windows, context - 1] -> standard_error
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from waterfill.errors import WaterfillError
from waterfill.evaluate.text import positions

Progress = Callable[[int, int], None]  # called with (windows done, windows in all)
Score = TypeVar("Score")

SCRATCH_BYTES = 64 << 20  # bound on the widened copies of logits that are alive at a time
ENOUGH_WINDOWS = 8  # fewer say too little about the spread between windows


def score_windows(
    models: Sequence[Any],
    parts: Tensor,
    score: Callable[..., Score],
    *,
    batch: int,
    progress: Progress | None,
) -> list[Score]:
    """Run windows [windows, context] through every model, `batch` at a time, and score them one by one.

    Each window becomes `score(logits of the first model, …, targets)` with logits [context - 1, vocab] in the model's
    dtype and on its device, and targets [context - 1]. One batch of logits per model is alive at a time. The models
    are put into evaluation mode. Raises WaterfillError when the windows do not fit a model, or vocabularies differ.
    """
    if batch < 1:
        raise WaterfillError(f"a batch of {batch} windows was asked for; choose at least 1")
    for model in models:
        _check_fits(model, parts)
        model.eval()
    scores: list[Score] = []
    for some in parts.split(batch):
        scores += _score_batch(models, some, score)
        if progress is not None:
            progress(len(scores), len(parts))
    return scores


def rows_in_scratch(vocabulary: int, entry_bytes: int) -> int:
    """Positions to score at a time when each needs `entry_bytes` of scratch per entry of the vocabulary."""
    return max(1, SCRATCH_BYTES // (vocabulary * entry_bytes))


def standard_error(scores: Tensor) -> float:
    """Standard error of the mean of scores [windows, targets], float64.

    Tokens of one window are correlated, so from 8 windows on the window means are the independent units; below that
    tokens are, which understates the error. NaN for a single score.
    """
    units = scores.mean(dim=1) if len(scores) >= ENOUGH_WINDOWS else scores.flatten()
    return float(units.std()) / math.sqrt(len(units)) if len(units) > 1 else math.nan


def check_finite(scores: Tensor, whose: str) -> None:
    """Raise WaterfillError when scores hold NaN or infinity, as NaN or infinite logits make them."""
    if not bool(torch.isfinite(scores).all()):
        raise WaterfillError(
            f"{whose} gives NaN or infinite logits; "
            "check its weights, and run it in float32 or bfloat16 rather than float16"
        )


def _score_batch(models: Sequence[Any], some: Tensor, score: Callable[..., Score]) -> list[Score]:
    """Scores of a batch of windows [batch, context]; the logits are freed on return."""
    with torch.inference_mode():
        logits = [model(input_ids=some.to(model.device), use_cache=False).logits for model in models]
        _check_same_vocabulary(logits)
        return [score(*(each[row, :-1] for each in logits), window[1:]) for row, window in enumerate(some)]


def _check_fits(model: Any, parts: Tensor) -> None:
    context, limit = parts.shape[1], positions(model)
    if limit is not None and context > limit:
        raise WaterfillError(f"a context of {context} tokens was asked for, but the model has {limit}; choose fewer")
    highest, vocabulary = int(parts.max()), int(model.config.get_text_config().vocab_size)
    if highest >= vocabulary:
        raise WaterfillError(
            f"the text holds token {highest}, but the model knows {vocabulary} tokens; use the model's own tokenizer"
        )


def _check_same_vocabulary(logits: Sequence[Tensor]) -> None:
    sizes = [each.shape[-1] for each in logits]
    if len(set(sizes)) > 1:
        raise WaterfillError(
            f"the models predict over {' and '.join(map(str, sizes))} tokens; compare models with one vocabulary"
        )
