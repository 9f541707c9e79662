"""Models as lm-evaluation-harness wants them. Import this module only where the extra `eval` is installed.

transformers models, packed or not, go through the harness's own `hf` model; GGUF models through one of ours that does
the same with llama.cpp's logits and tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm.std import tqdm

from waterfill.evaluation.llamacpp import GgufModel
from waterfill.files.context import context_length

AT_A_TIME = 32  # requests between two reports of progress
USUAL_LENGTH = 2048  # tokens at a time, of models that do not say

_KINDS = {"loglikelihood": "choices", "loglikelihood_rolling": "documents", "generate_until": "answers"}


def harness_model(model: Any, tokenizer: Any, batch: int, progress: Callable[[str, int, int], None] | None) -> Any:
    """A model and its tokenizer for `lm_eval.simple_evaluate`. `progress` is told of requests done, by kind."""
    if isinstance(model, GgufModel):
        return Gguf(model, tokenizer, progress)
    return Transformers(model, tokenizer, batch, progress)


class _NoBar(tqdm):  # type: ignore[misc]  # tqdm is untyped
    """Counts, and draws nothing."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{**options, "disable": True})


@contextmanager
def without_bars() -> Iterator[None]:
    """Keeps the harness, and what it reads its data with, from drawing bars; those of anybody else are left alone."""
    drawing = [
        module
        for name, module in sys.modules.copy().items()
        if name.startswith("lm_eval.") and vars(module).get("tqdm") is tqdm
    ]
    data_bars = not datasets.are_progress_bars_disabled()
    try:
        datasets.disable_progress_bars()
        for module in drawing:
            vars(module)["tqdm"] = _NoBar
        yield
    finally:
        for module in drawing:
            vars(module)["tqdm"] = tqdm
        if data_bars:
            datasets.enable_progress_bars()


class _Reporting:
    """Hands requests on some at a time, so that progress can be told and answers are kept as they come."""

    progress: Callable[[str, int, int], None] | None
    cache_hook: Any  # the harness's: takes answers where they are kept

    def some_at_a_time(self, kind: str, answer: Callable[[Any], list[Any]], requests: Sequence[Any]) -> list[Any]:
        results: list[Any] = []
        self._tell(kind, 0, len(requests))
        for start in range(0, len(requests), AT_A_TIME):
            some = list(requests[start : start + AT_A_TIME])
            answers = answer(some)
            for request, reply in zip(some, answers, strict=True):
                self.cache_hook.add_partial(kind, request.args, reply)
            results += answers
            self._tell(kind, len(results), len(requests))
        return results

    def _tell(self, kind: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(f"tasks: {_KINDS[kind]}", done, total)


class Transformers(_Reporting, HFLM):  # type: ignore[misc]  # the harness is untyped
    """A loaded transformers model."""

    def __init__(
        self, model: Any, tokenizer: Any, batch: int, progress: Callable[[str, int, int], None] | None
    ) -> None:
        HFLM.__init__(self, pretrained=model, tokenizer=tokenizer, batch_size=batch)
        self.progress = progress

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return self.some_at_a_time("loglikelihood", super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        return self.some_at_a_time("loglikelihood_rolling", super().loglikelihood_rolling, requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        return self.some_at_a_time("generate_until", super().generate_until, requests)


class Gguf(_Reporting, TemplateLM):  # type: ignore[misc]
    """A model that llama.cpp runs."""

    def __init__(self, model: GgufModel, tokenizer: Any, progress: Callable[[str, int, int], None] | None) -> None:
        TemplateLM.__init__(self)
        self.model, self.tokenizer, self.progress = model, tokenizer, progress
        self.max_length = context_length(model.config) or USUAL_LENGTH

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return int(bos) if bos is not None else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        added = True if add_special_tokens is None else add_special_tokens
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=added)
        return ids

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return self.some_at_a_time("loglikelihood", super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        return self.some_at_a_time(
            "loglikelihood_rolling", lambda some: [self._rolling(*each.args) for each in some], requests
        )

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        return self.some_at_a_time(
            "generate_until", lambda some: [self._continue(*each.args) for each in some], requests
        )

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        return [self._score(context, continuation) for _, context, continuation in requests]

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Log-probability of a continuation, and whether greedy decoding would have given it."""
        ids = (context + continuation)[-(self.max_length + 1) :]
        targets = torch.tensor(ids[-len(continuation) :])
        logits: Tensor = self.model(torch.tensor([ids[:-1]])).logits[0, -len(targets) :]
        log_p = F.log_softmax(logits, dim=-1).gather(1, targets[:, None]).sum()
        return float(log_p), bool(torch.equal(logits.argmax(dim=-1), targets))

    def _rolling(self, text: str) -> float:
        ids = self.tok_encode(text)
        rolled = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
        return sum(self._score(*make_disjoint_window(window))[0] for window in rolled)

    def _continue(self, context: str, options: dict[str, Any]) -> str:
        """Greedy, whatever the options say of sampling."""
        until = options.get("until") or []
        ends = [until] if isinstance(until, str) else list(until)
        most = int(options.get("max_gen_toks", 256))
        ids = self.tok_encode(context)[-max(1, self.max_length - most) :]

        def ended(answer: list[int]) -> bool:
            text = self.tokenizer.decode(answer)
            return any(end in text for end in ends)

        text: str = self.tokenizer.decode(self.model.generate(ids, most, [self.eot_token_id], ended))
        for end in ends:
            text = text.partition(end)[0]
        return text
