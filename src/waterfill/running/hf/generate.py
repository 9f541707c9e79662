"""Text from a model, piece by piece as it is generated.

    prompt or messages -> token ids -> model.generate in a thread of its own -> queue of text -> `HfGeneration` iterates

The model may be any transformers causal language model, packed or not: all of the sampling is transformers' own.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from waterfill.base.errors import WaterfillError, first_line, unknown_token
from waterfill.files.context import context_length
from waterfill.files.settings.choices import FILE
from waterfill.files.settings.messages import Message, check_messages, check_text, plain_lines, refused
from waterfill.files.settings.templates import conversation_text
from waterfill.files.settings.tokenizing import failed, in_words
from waterfill.running.hf.turns import Turn
from waterfill.running.text.sampling import (
    DRAFT_TOKENS,
    GenerationStats,
    Sampling,
    begun,
    check_speculation,
    free_positions,
)

# What a generation_config.json says besides how to choose.
_NO_CHOICES = {"_from_model_config", "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id"}
_NO_BLAME = (WaterfillError, MemoryError, torch.OutOfMemoryError)

PIECE_SHARE = 0.5  # of free memory: pieces are all of one width, and what is free differs

__all__ = ["DRAFT_TOKENS", "GenerationStats", "HfGeneration", "Message", "Sampling", "drafted_by", "generate"]


class HfGeneration(Iterator[str]):
    """Pieces of text, as they come. Stopping early (`close`, or letting go of the object) stops the model too."""

    def __init__(self, model: Any, streamer: _Streamer, arguments: dict[str, Any], seed: int | None) -> None:
        self._streamer = streamer
        # The generator does not know this object: without a cycle, dropping the one closes the other at once.
        self._pieces = _stream(model, streamer, arguments, seed)

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stop the model after the token that it is working on, and wait for it."""
        self._pieces.close()

    @property
    def stats(self) -> GenerationStats:
        """Counts and times up to now; complete once the iteration has ended."""
        return self._streamer.stats()


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str | Sequence[Message],
    sampling: Sampling | None = None,
    *,
    draft: Any = None,
    lookup: int | None = None,
    **overrides: Any,
) -> HfGeneration:
    """Continue a text, or answer a conversation, and stream what the model says.

    A string is continued as it is. Messages go through the tokenizer's chat template; without one they become lines
    "User: …", "Assistant: …" with a final "Assistant:" for the model to continue. Special tokens are left out of the
    text. Generation ends at the end-of-text token, after `max_new_tokens`, or when the model's positions are used up.

    `overrides` replace fields of `sampling`: `generate(model, tokenizer, "Once", temperature=0.7, seed=1)`. With a
    seed, torch's random state is the caller's own again afterwards; without, samples come from the state as it is.

    Several tokens can be verified in one pass over the weights, which pays where reading those takes the time. They are
    drafted by a smaller model of the same tokenizer (`draft`), or found behind an earlier occurrence of the last tokens
    (`lookup`: how many at most). What is said follows the model's own distribution all the same.

    Several threads may generate with one model: their texts take turns, token by token.

    Generation starts with the first piece asked for; an exception of the model is raised from the iteration.

    Raises:
        WaterfillError: a sampling value is outside its range, messages are malformed, a prompt is not valid UTF-8,
            leaves no room or holds tokens that the model does not know, or a text does not fit in the memory that the
            model was loaded with; from the iteration, transformers refuses choices of the model's
            generation_config.json.
    """
    sampling = replace(sampling or Sampling(), **overrides)
    ids = _prompt_ids(tokenizer, prompt)
    known = getattr(model.config.get_text_config(), "vocab_size", None)
    if known is not None and (highest := int(ids.max())) >= known:
        raise unknown_token("the prompt", highest, known)
    most = min(sampling.max_new_tokens, free_positions(ids.shape[1], context_length(model.config)))
    drafted = DRAFT_TOKENS if draft is not None else lookup or 0
    arguments = {
        "input_ids": ids.to(model.device),
        "attention_mask": torch.ones_like(ids, device=model.device),
        "max_new_tokens": most,
        "num_beams": 1,  # beams have no text to stream before the end
        "num_return_sequences": 1,
        "tokenizer": tokenizer,  # for stop strings
        **sampling.arguments(),
        **_speculation(draft, lookup),
        **_within_memory(model, draft, ids.shape[1], most, drafted),
    }
    return HfGeneration(model, _Streamer(tokenizer), arguments, sampling.seed)


def _speculation(draft: Any, lookup: int | None) -> dict[str, Any]:
    check_speculation(draft, lookup)
    if draft is not None:
        return drafted_by(draft)
    return {} if lookup is None else {"prompt_lookup_num_tokens": lookup}


def _within_memory(model: Any, draft: Any, prompt: int, most: int, drafted: int) -> dict[str, Any]:
    """How a model with a limit of memory reads a prompt: in pieces, unless tokens are drafted, where transformers reads
    it at once. Raises MemoryLimitError where the text does not fit."""
    limit = getattr(model, "memory_limit", None)
    if limit is None:
        return {}
    limit.admit(
        prompt + most, prompt, logits=drafted + 1, whole=drafted > 0, draft=getattr(draft, "memory_limit", None)
    )
    if drafted or not limit.pieces:
        return {}
    text_bytes = limit.working.text_bytes(prompt + most)
    return {"prefill_chunk_size": limit.widest(prompt, prompt, growth_bytes=text_bytes, share=PIECE_SHARE)}


def drafted_by(draft: Any) -> dict[str, Any]:
    """The arguments of transformers' `generate` that have a model draft the same number of tokens every time.

    As many as are worth it depend on the speed of storage, not on the draft's confidence; and to judge that,
    transformers imports scikit-learn in the middle of a generation: 100 MB, and seconds.
    """
    guesses = draft.generation_config
    guesses.num_assistant_tokens, guesses.num_assistant_tokens_schedule = DRAFT_TOKENS, "constant"
    guesses.assistant_confidence_threshold = 0.0
    return {"assistant_model": draft}


def _stream(model: Any, streamer: _Streamer, arguments: dict[str, Any], seed: int | None) -> Generator[str, None, None]:
    """Run `model.generate` in a thread and yield what it streams; end the thread however the iteration ends."""
    stop = _Stop()
    samples = bool(arguments.get("do_sample", model.generation_config.do_sample))
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with Turn(model, samples=samples, seed=seed) as turn:
                model.generate(**arguments, streamer=streamer, stopping_criteria=StoppingCriteriaList([stop, turn]))
        except BaseException as error:
            errors.append(failed(error) or (error if streamer.begun else _blamed(model, error)))
            streamer.on_finalized_text("", stream_end=True)  # the consumer is waiting for text that will not come

    thread = threading.Thread(target=work, name="waterfill-generate", daemon=True)
    streamer.start()
    thread.start()
    try:
        yield from filter(None, streamer)
    finally:
        stop.requested.set()
        thread.join()
    if errors:
        raise errors[0]


class _Streamer(TextIteratorStreamer):  # type: ignore[misc]
    """Text queue between the two threads that also counts tokens and takes the time."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._tokens = 0
        self._start_s = self._first_s = self._last_s = math.nan

    def start(self) -> None:
        self._start_s = time.perf_counter()

    @property
    def begun(self) -> bool:
        """Whether a token has come."""
        return self._tokens > 0

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self._last_s = time.perf_counter()
            if self._tokens == 0:
                self._first_s = self._last_s
            self._tokens += value.numel()
        super().put(value)

    def stats(self) -> GenerationStats:
        return GenerationStats(self._tokens, self._first_s - self._start_s, self._last_s - self._start_s)


class _Stop(StoppingCriteria):  # type: ignore[misc]
    """Ends the generation at the next token once the consumer has gone."""

    def __init__(self) -> None:
        self.requested = threading.Event()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.requested.is_set(), device=input_ids.device)


def _blamed(model: Any, error: BaseException) -> BaseException:
    """An error before the first token: transformers looks at most of a model's own choices as late as that."""
    choices = sorted(model.generation_config.to_diff_dict().keys() - _NO_CHOICES)
    if not choices or not isinstance(error, Exception) or isinstance(error, _NO_BLAME):
        return error
    blamed = WaterfillError(
        f"the model cannot generate as its {FILE} wants, which sets {', '.join(choices)} ({first_line(error)}); "
        "change it"
    )
    blamed.__cause__ = error
    return blamed


def _prompt_ids(tokenizer: Any, prompt: str | Sequence[Message]) -> Tensor:
    """Token ids, int64 [1, tokens], of a text or a conversation."""
    with in_words():
        if isinstance(prompt, str):
            check_text(prompt)
            ids = tokenizer(prompt)["input_ids"]
        else:
            ids = _conversation_ids(tokenizer, prompt)
    return torch.tensor([begun(ids, tokenizer.bos_token_id)], dtype=torch.int64)


def _conversation_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    check_messages(messages)
    if tokenizer.chat_template is not None:
        return _templated_ids(tokenizer, messages)
    ids: list[int] = tokenizer(plain_lines(messages))["input_ids"]
    return ids


def _templated_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:  # several, none of them the default
        raise refused(error) from error
    text = conversation_text(template, messages, tokenizer.special_tokens_map)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]  # the template writes them itself
    return ids
