"""A model of the Llama kind, run by the native library: numpy instead of torch, one call for all layers of a pass.

    ids ──rows──► hidden states ──wf_run_layers (cache of keys and values)──► normalised ──head──► logits

What torch and transformers take in memory is weights here that need not be read again; and a token has no Python
between its layers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from waterfill.base import native
from waterfill.base.errors import WaterfillError
from waterfill.running.engine.families.llama_spec import FINAL_NORM, NORMS, OPTIONAL, PROJECTIONS, Spec
from waterfill.running.engine.weights import Weights, kernels
from waterfill.running.streaming.limit import Limit, Working
from waterfill.running.streaming.streamer import Streamer

NARROW = 16  # tokens of a pass whose working memory is kept for the next one
FIRST_CAPACITY = 256  # positions of the cache to begin with; it grows by doubling
HUGE_ARRAY_BYTES = 4 << 20  # from here on numpy asks for huge pages: what is not written may be resident too

Floats = npt.NDArray[np.float32]


class Cache:
    """Keys and values `[kv_heads, capacity, head_dim]` of each layer: bfloat16 where the checkpoint is that, else
    float32. Memory counts when it is written to."""

    def __init__(self, spec: Spec) -> None:
        self._spec, self._dtype = spec, np.dtype(np.uint16 if spec.dtype == "BF16" else np.float32)
        self.capacity, self.length = 0, 0
        self.written = 0  # positions that are in memory: what is truncated stays there
        self.expected = 0  # tokens of the text; 0 where that is not known
        self._keys: list[npt.NDArray[np.generic]] = []
        self._values: list[npt.NDArray[np.generic]] = []
        self.reserve(FIRST_CAPACITY)

    @property
    def dtype(self) -> int:
        """A C code."""
        return native.BFLOAT16 if self._dtype.itemsize == 2 else native.FLOAT32

    @staticmethod
    def token_bytes(spec: Spec) -> int:
        """Of keys and values of one token."""
        return spec.layers * 2 * spec.kv_heads * spec.head_dim * (2 if spec.dtype == "BF16" else 4)

    def growth_bytes(self, tokens: int) -> int:
        """What `reserve` takes, until what it replaces is given back: of each layer by itself."""
        grown = self._grown(tokens)
        replaced = 0 if grown == self.capacity else self.length // (2 * self._spec.layers)
        return max(0, self._resident(tokens, grown) - self.written + replaced) * self.token_bytes(self._spec)

    def reserve(self, tokens: int) -> None:
        """Make room for a text of so many tokens."""
        if tokens <= self.capacity:
            return
        self.capacity = self._grown(tokens)
        self.written = self._resident(self.length, self.capacity) if self.length else 0
        for arrays in (self._keys, self._values):
            for layer in range(self._spec.layers):
                room = np.empty((self._spec.kv_heads, self.capacity, self._spec.head_dim), self._dtype)
                if layer < len(arrays):
                    room[:, : self.length] = arrays[layer][:, : self.length]
                    arrays[layer] = room
                else:
                    arrays.append(room)
        self.keys, self.values = (
            native.addresses_of(array.ctypes.data for array in arrays) for arrays in (self._keys, self._values)
        )

    def append(self, tokens: int) -> None:
        """So many tokens were written behind the others."""
        self.length += tokens
        self.written = max(self.written, self._resident(self.length, self.capacity))

    def _grown(self, tokens: int) -> int:
        """The capacity for so many tokens: at once that of a text whose length is known, else by doubling."""
        if tokens <= self.capacity:
            return self.capacity
        if tokens <= self.expected:
            return self.expected
        return min(max(2 * self.capacity, tokens), max(tokens, self._spec.positions))

    def _resident(self, tokens: int, capacity: int) -> int:
        """Positions that are in memory once so many of a capacity are written."""
        array_bytes = capacity * self.token_bytes(self._spec) // (2 * self._spec.layers)
        return capacity if array_bytes >= HUGE_ARRAY_BYTES else tokens


class LlamaModel:
    """Weights, and the cache of one text: what `engine.generation` asks of a model.

    Args:
        vectors: norms and biases by tensor, float32.
        pass_tokens: how many tokens go through the layers at a time, at most.
        streaming: who reads the weights, where they are not in memory.
        limit: on the memory that texts are read in.
    """

    def __init__(
        self,
        spec: Spec,
        weights: Weights,
        vectors: dict[str, Floats],
        *,
        pass_tokens: int,
        streaming: Streamer | None = None,
        limit: Limit | None = None,
    ) -> None:
        self._library, self._isa = kernels()
        self.spec, self.weights, self._vectors = spec, weights, vectors
        self.vocabulary, self.positions = spec.vocabulary, spec.positions
        self._pass_tokens, self.streaming, self._limit = pass_tokens, streaming, limit
        self._cache = Cache(spec)
        self._views: list[native.MatrixView] = []
        self._layers = (native.LayerView * spec.layers)(*map(self._layer, range(spec.layers)))

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._cache.length

    def expect(self, tokens: int, prompt: int, *, logits: int = 1, draft: LlamaModel | None = None) -> None:
        """Before a text of `tokens`, of which `prompt` are read first, with the logits of so many positions at a time.

        Raises MemoryLimitError where it does not fit in the memory that the model was given, with its draft's.
        """
        if draft is not None:
            draft._cache.expected = tokens
        self._cache.expected = tokens
        if self._limit is not None:
            beside = None if draft is None else draft._limit
            self._limit.admit(tokens, prompt, held=min(tokens, self._cache.written), logits=logits, draft=beside)

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on."""
        self._cache.length = min(length, self._cache.length)

    def forward(self, ids: Sequence[int], logits: int = 1) -> Floats:
        """Append tokens to the cache; logits `[logits, vocabulary]` of the last so many.

        Raises WaterfillError where they do not fit the model's positions, IndexError for an id that is none of its
        tokens, ArtifactError for damaged weights. The cache is as it was then.
        """
        before, states = self._cache.length, []
        tokens = np.asarray(ids, np.int64)
        if before + len(tokens) > self.positions:
            raise WaterfillError(
                f"{before + len(tokens)} tokens are more than the {self.positions} positions of the model; shorten "
                "the text"
            )
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.vocabulary:
            raise IndexError(f"{tokens.min()} or {tokens.max()} is none of the model's {self.vocabulary} tokens")
        start = 0
        try:
            while start < len(tokens):
                count = self._begin_pass(len(tokens) - start, logits)
                piece = self._pass(tokens[start : start + count])
                states.append(piece[max(0, len(tokens) - logits - start) :])
                start += count
            return self.weights.logits(np.concatenate(states))
        except BaseException:
            self._cache.length = before
            raise

    def _begin_pass(self, tokens: int, logits: int) -> int:
        """How many of the next tokens to read at once; there is room for them then, of all in the cache."""
        cache, count = self._cache, min(tokens, self._pass_tokens)
        text = cache.length + tokens
        if self._limit is not None:
            count = self._limit.begin_pass(count, text, logits=logits, growth_bytes=cache.growth_bytes(text))
        cache.reserve(text)
        return count

    def _pass(self, ids: npt.NDArray[np.int64]) -> Floats:
        """Normalised hidden states `[tokens, hidden]` behind the last layer."""
        spec, cache = self.spec, self._cache
        hidden = self.weights.rows(ids)
        out = np.empty_like(hidden)
        cosine, sine = spec.rotary(cache.length, len(ids))
        status = self._library.run_layers(
            self._isa,
            self._layers,
            hidden,
            out,
            cosine=cosine,
            sine=sine,
            keys=cache.keys,
            values=cache.values,
            capacity=cache.capacity,
            position=cache.length,
            final_norm=self._vector(FINAL_NORM),
            product=self.weights.product,
        )
        self.weights.expect(status)
        cache.append(len(ids))
        if len(ids) > NARROW:
            self._library.release_memory()
        return out

    def _layer(self, number: int) -> native.LayerView:
        spec, prefix = self.spec, f"model.layers.{number}."
        names = {key: f"{name}.weight" for key, name in NORMS.items()} | {key: OPTIONAL[key] for key in spec.vectors}
        views = {key: self.weights.view(prefix + name) for key, name in PROJECTIONS.items()}
        self._views += views.values()  # alive as long as the layers point to them
        return native.LayerView(
            hidden=spec.hidden,
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            epsilon=spec.epsilon,
            scaling=spec.scaling,
            dtype=native.FLOAT32,
            cache_dtype=self._cache.dtype,
            **{key: ctypes.pointer(view) for key, view in views.items()},
            **{key: self._vector(prefix + name) for key, name in names.items()},
        )

    def _vector(self, name: str) -> native.Vector:
        vector = self._vectors[name]
        return native.Vector(vector.ctypes.data, vector.size)


def working(spec: Spec) -> Working:
    """What texts take beside the weights."""
    widest = max(spec.inner, spec.heads * spec.head_dim, spec.hidden)
    layer = 4 * spec.hidden + 2 * (spec.heads + spec.kv_heads) * spec.head_dim + 2 * spec.inner
    return Working(
        token=Cache.token_bytes(spec),
        activations=4 * (layer + 3 * widest),  # of a layer and of one product
        logits=12 * spec.vocabulary,  # and a float64 copy that is chosen from
    )
