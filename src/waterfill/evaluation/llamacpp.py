"""GGUF files through llama.cpp, with as much of transformers' interface as evaluations use.

    load_gguf(path) -> GgufModel, GgufTokenizer
    model(input_ids=[sequences, tokens]).logits, and with use_cache and past_key_values, token by token

llama.cpp computes: its kernels, its 16-bit key-value cache, its tokenizer. Needs the extra `gguf`.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import finalize

import numpy as np
import torch
from torch import Tensor

from waterfill.base.errors import WaterfillError
from waterfill.files.ggml import silence

SUFFIX = ".gguf"
MICRO_BATCH = 512  # tokens that llama.cpp computes at a time


@dataclass(frozen=True)
class Past:
    """What a model has read: so many tokens of each of so many sequences. There is one at a time per model."""

    sequences: int
    tokens: int
    capacity: int

    def get_seq_length(self) -> int:
        return self.tokens


@dataclass(frozen=True)
class Output:
    """What a forward pass gives."""

    logits: Tensor  # float32 [sequences, tokens, vocab]
    past_key_values: Past | None


def load_gguf(path: Path) -> tuple[GgufModel, GgufTokenizer]:
    """A model and its tokenizer.

    Raises:
        WaterfillError: llama-cpp-python is missing or cannot read the file.
    """
    model = GgufModel(path)
    return model, GgufTokenizer(model)


class GgufModel:
    """A causal language model in one file."""

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, path: Path) -> None:
        self._api = _api()
        if not path.is_file():
            raise WaterfillError(f"{path} is no file; give a GGUF file")
        self.path = path
        self._context: Any = None
        self._release: Callable[[], object] = lambda: None  # frees the context, once
        self._shape = (0, 0)  # sequences, tokens that the context has room for
        self.handle = self._api.llama_model_load_from_file(str(path).encode(), self._api.llama_model_default_params())
        if not self.handle:
            raise WaterfillError(f"llama.cpp cannot load {path}; check that it is a whole GGUF file of a known kind")
        finalize(self, self._api.llama_model_free, self.handle)  # after those of contexts, which are younger
        self.vocabulary = self._api.llama_model_get_vocab(self.handle)
        text = SimpleNamespace(
            vocab_size=int(self._api.llama_vocab_n_tokens(self.vocabulary)),
            max_position_embeddings=int(self._api.llama_model_n_ctx_train(self.handle)) or None,
        )
        self.config = SimpleNamespace(**vars(text), get_text_config=lambda **_: text)

    @property
    def size_bytes(self) -> int:
        """Of the file."""
        return self.path.stat().st_size

    @property
    def weights(self) -> int:
        """How many numbers the tensors hold."""
        return int(self._api.llama_model_n_params(self.handle))

    def eval(self) -> GgufModel:
        """Nothing to do: llama.cpp does not train."""
        return self

    def __call__(
        self, input_ids: Tensor, *, past_key_values: Past | None = None, use_cache: bool = False, last: bool = False
    ) -> Output:
        """Predictions for token ids [sequences, tokens], after what `past_key_values` says was read before; with
        `last`, of the last token of each sequence only."""
        sequences, tokens = input_ids.shape
        if past_key_values is None:
            capacity = max(tokens, self.config.max_position_embeddings or tokens) if use_cache else tokens
            self._begin(sequences, capacity)
            past_key_values = Past(sequences, 0, capacity)
        start = past_key_values.tokens
        if past_key_values.sequences != sequences or start + tokens > past_key_values.capacity:
            raise WaterfillError(
                f"{tokens} tokens of {sequences} sequences do not fit after {start} of {past_key_values.sequences}, "
                f"with room for {past_key_values.capacity}; choose a shorter context"
            )
        logits = self._decode(input_ids.tolist(), start, last)
        return Output(logits, Past(sequences, start + tokens, past_key_values.capacity) if use_cache else None)

    def generate(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        ends: Sequence[int] = (),
        ended: Callable[[list[int]], bool] = lambda said: False,
    ) -> list[int]:
        """The likeliest continuation of token ids, greedily, up to one of the tokens `ends`, which is left out, or to
        where `ended` holds."""
        output = self(torch.tensor([list(ids)]), use_cache=True, last=True)
        said: list[int] = []
        while len(said) < max_new_tokens:
            token = int(output.logits[0, -1].argmax())
            if token in ends:
                break
            said.append(token)
            if ended(said):
                break
            assert output.past_key_values is not None
            if output.past_key_values.tokens >= output.past_key_values.capacity:
                break
            output = self(torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True)
        return said

    def _begin(self, sequences: int, capacity: int) -> None:
        """An empty context with room for so many tokens of each sequence."""
        api = self._api
        if self._shape != (sequences, capacity):
            self._free_context()
            settings = api.llama_context_default_params()
            settings.n_seq_max, settings.n_ctx = sequences, sequences * _padded(capacity)
            settings.n_batch, settings.n_ubatch = sequences * capacity, min(MICRO_BATCH, sequences * capacity)
            settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
            self._context = api.llama_init_from_model(self.handle, settings)
            if not self._context:
                raise WaterfillError(
                    f"llama.cpp has no memory for {sequences} sequences of {capacity} tokens; use fewer"
                )
            self._release = finalize(self, api.llama_free, self._context)
            self._shape = sequences, capacity
        api.llama_memory_clear(api.llama_get_memory(self._context), True)

    def _decode(self, ids: list[list[int]], start: int, last: bool) -> Tensor:
        """Logits [sequences, tokens, vocab], or [sequences, 1, vocab] with `last`."""
        api, tokens = self._api, len(ids[0])
        batch = api.llama_batch_init(len(ids) * tokens, 0, 1)
        try:
            for index in range(len(ids) * tokens):
                sequence, position = divmod(index, tokens)
                batch.token[index] = ids[sequence][position]
                batch.pos[index] = start + position
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = sequence
                batch.logits[index] = not last or position == tokens - 1
            batch.n_tokens = len(ids) * tokens
            if api.llama_decode(self._context, batch):
                raise WaterfillError(
                    f"llama.cpp could not compute {tokens} tokens of {self.path}; use a shorter context"
                )
            shape = len(ids), 1 if last else tokens, self.config.vocab_size
            data = ctypes.cast(api.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float))
            return torch.from_numpy(np.ctypeslib.as_array(data, (math.prod(shape),)).copy()).reshape(shape)
        finally:
            api.llama_batch_free(batch)

    def _free_context(self) -> None:
        if self._context is not None:
            self._release()
        self._context, self._shape = None, (0, 0)


class GgufTokenizer:
    """The tokenizer in a GGUF file."""

    def __init__(self, model: GgufModel) -> None:
        self._api, self._model, self._vocabulary = _api(), model, model.vocabulary
        self.bos_token_id = _token(self._api.llama_vocab_bos(self._vocabulary))
        self.eos_token_id = _token(self._api.llama_vocab_eos(self._vocabulary))
        self.name_or_path = str(model.path)

    def __call__(self, text: str, *, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        """{"input_ids": ids}; `add_special_tokens` adds what the file says that texts begin and end with."""
        data = text.encode()
        most = len(data) + 8  # a token has at least a byte
        ids = (ctypes.c_int32 * most)()
        count = self._api.llama_tokenize(self._vocabulary, data, len(data), ids, most, add_special_tokens, False)
        if count < 0:
            raise WaterfillError(f"llama.cpp cannot cut {len(data)} bytes of text into tokens; give less")
        return {"input_ids": ids[:count]}

    def encode(self, text: str, *, add_special_tokens: bool = True, **_: Any) -> list[int]:
        """Token ids of a text."""
        return self(text, add_special_tokens=add_special_tokens)["input_ids"]

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        """The text of token ids, without special tokens."""
        pieces = [self._piece(int(token)) for token in ids]
        return b"".join(pieces).decode(errors="replace")

    def _piece(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(256)
        count = self._api.llama_token_to_piece(self._vocabulary, token, buffer, len(buffer), 0, False)
        if count < 0:
            buffer = ctypes.create_string_buffer(-count)
            count = self._api.llama_token_to_piece(self._vocabulary, token, buffer, len(buffer), 0, False)
        return buffer.raw[: max(0, count)]


def _token(number: int) -> int | None:
    return int(number) if number >= 0 else None


def _padded(tokens: int) -> int:
    return -(-tokens // 256) * 256  # what llama.cpp would make of it


@cache
def _api() -> Any:
    """The module llama_cpp, kept from logging."""
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:  # the latter two where its library cannot be loaded
        raise WaterfillError(
            f"GGUF files need llama-cpp-python ({error}); install the extra with pip install 'waterfill[gguf]'"
        ) from error
    llama_cpp.llama_backend_init()
    silence(llama_cpp.llama_cpp)
    return llama_cpp
