"""A model of the Llama kind, run by the native library: numpy instead of torch, one call for all layers of a pass.

    ids of several sequences ──rows──► hidden states ──wf_run_layers (their caches)──► normalised ──head──► logits

What torch and transformers take in memory is weights here that need not be read again; and a token has no Python
between its layers. Weights are read once for all sequences of a pass.
"""

from __future__ import annotations

import ctypes
import threading
from collections import abc
from weakref import WeakSet

import numpy as np
import numpy.typing as npt

from waterfill.base import native
from waterfill.base.arguments import PLAIN_BITS
from waterfill.base.errors import WaterfillError
from waterfill.running.engine.cache import Sequence, Shape
from waterfill.running.engine.coded_cache import CodedShape
from waterfill.running.engine.families.llama_spec import FINAL_NORM, OPTIONAL, PROJECTIONS, Spec
from waterfill.running.engine.weights import Weights, kernels
from waterfill.running.streaming.limit import Limit, Working
from waterfill.running.streaming.streamer import Streamer

NARROW = 16  # tokens of a pass whose working memory is kept for the next one

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


class LlamaModel:
    """Weights that any number of sequences are read with. Several threads may: passes wait for one another.

    Args:
        vectors: norms and biases by tensor, float32.
        pass_tokens: how many tokens go through the layers at a time, at most.
        streaming: who decodes the weights as they are multiplied, where they are not levels in memory.
        limit: on the memory that texts are read in.
        bits: of keys and values, 3, 4, 5 or 8, or 16 for numbers as they are.
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
        bits: tuple[int, int] = PLAIN_BITS,
    ) -> None:
        self._library, self._isa = kernels()
        self.spec, self.weights, self._vectors = spec, weights, vectors
        self.vocabulary, self.positions = spec.vocabulary, spec.positions
        self._pass_tokens, self.streaming, self._limit = pass_tokens, streaming, limit
        self._lock = threading.Lock()  # of a pass: its memory, the order in which weights are read, what is reckoned
        self._sequences: WeakSet[Sequence] = WeakSet()  # all that there are
        self._shape = shape_of(spec, bits)
        self._views: list[native.MatrixView] = []
        self._layers = (native.LayerView * spec.layers)(*map(self._layer, range(spec.layers)))

    def sequence(self) -> Sequence:
        """A new sequence; it takes its memory as it grows, and gives it back when nobody holds it any more."""
        made = Sequence(self, self._shape.cache())
        with self._lock:
            self._sequences.add(made)
        return made

    def expect(
        self, sequence: Sequence, tokens: int, prompt: int, *, logits: int = 1, draft: Sequence | None = None
    ) -> None:
        """Before a text of `tokens`, of which `prompt` are read first, with the logits of so many positions at a time.

        Raises:
            MemoryLimitError: it does not fit in the memory that the model was given, with what the texts of other
                sequences are to take yet, and that of its draft's sequence.
        """
        sequence.expected = 0
        with self._lock:
            if self._limit is not None:
                beside = None if draft is None else draft.model._limit  # type: ignore[attr-defined]
                self._limit.admit(
                    tokens,
                    prompt,
                    held=sequence.cache.held(tokens),
                    logits=logits,
                    draft=beside,
                    others_bytes=sum(other.cache.owed_bytes for other in self._sequences),
                )
            sequence.expected = tokens
            if draft is not None:
                draft.expected = tokens

    def forward(
        self,
        sequences: abc.Sequence[Sequence],
        tokens: abc.Sequence[abc.Sequence[int]],
        logits: int | abc.Sequence[int] = 1,
    ) -> list[Floats]:
        """Read on in several sequences at once: `tokens[i]` are appended to sequence i.

        Every matrix is multiplied with the tokens of all; attention is each sequence's own. What comes out is, to the
        bit, what one sequence after another would give.

        Args:
            logits: how many of a sequence's tokens, the last ones, logits are wanted of; one number for all, or each's.

        Returns:
            For each sequence, float32 `[logits, vocabulary]`.

        Raises:
            WaterfillError: tokens do not fit the model's positions.
            IndexError: an id is none of its tokens.
            ValueError: a sequence comes twice.
            ArtifactError: weights are damaged. The sequences are as they were, whatever is raised, or shorter where
                their caches cannot go back just there.
        """
        wanted = [logits] * len(sequences) if isinstance(logits, int) else list(logits)
        parts = [
            _Part(sequence, np.asarray(ids, np.int64), count)
            for sequence, ids, count in zip(sequences, tokens, wanted, strict=True)
        ]
        self._check(parts)
        try:
            while True:
                with self._lock:  # a long prompt has several passes, between which others have theirs
                    self._pass(parts, self._begin_pass(parts))
                    if not any(part.left for part in parts):
                        return self._logits(parts)
        except BaseException:
            for part in parts:
                part.sequence.truncate(part.before)
            raise

    def _check(self, parts: abc.Sequence[_Part]) -> None:
        if not parts or len({id(part.sequence) for part in parts}) < len(parts):
            raise ValueError("a pass is over one sequence or several, each of them once")
        for part in parts:
            part.sequence.truncate(part.before)  # should a pass have been interrupted just as it ended
            text, ids = part.before + len(part.ids), part.ids
            if not len(ids) or part.sequence.model is not self:
                raise ValueError("each sequence of a pass is the model's own, and reads a token or more")
            if text > self.positions:
                raise WaterfillError(
                    f"{text} tokens are more than the {self.positions} positions of the model; shorten the text"
                )
            if not 0 <= ids.min() <= ids.max() < self.vocabulary:
                raise IndexError(f"{ids.min()} or {ids.max()} is none of the model's {self.vocabulary} tokens")

    def _begin_pass(self, parts: abc.Sequence[_Part]) -> int:
        """How many of the next tokens to read at once; there is room for them then, and for all that come after."""
        count = min(sum(part.left for part in parts), self._pass_tokens)
        if self._limit is not None:
            count = self._limit.begin_pass(
                count,
                max(part.text for part in parts),
                logits=sum(part.wanted for part in parts),
                growth_bytes=sum(part.sequence.cache.growth_bytes(part.text) for part in parts),
            )
        for part in parts:
            part.sequence.cache.reserve(part.text)
        return count

    def _pass(self, parts: abc.Sequence[_Part], count: int) -> None:
        """The next `count` tokens, of one sequence after the other; each part is given its hidden states."""
        pieces: list[tuple[_Part, Ids]] = []
        for part in parts:
            if taken := min(part.left, count):
                pieces.append((part, part.ids[part.read : part.read + taken]))
                count -= taken
        out = self._through_layers([part.sequence for part, _ in pieces], [ids for _, ids in pieces])
        start = 0
        for part, ids in pieces:
            part.append(ids, out[start : start + len(ids)])
            start += len(ids)

    def _through_layers(self, sequences: abc.Sequence[Sequence], tokens: abc.Sequence[Ids]) -> Floats:
        """Normalised hidden states `[tokens, hidden]` behind the last layer, of one sequence after the other."""
        spec, ids = self.spec, np.concatenate(tokens)
        caches = [sequence.cache for sequence in sequences]
        places = [np.arange(c.length, c.length + len(new)) for c, new in zip(caches, tokens, strict=True)]
        cosine, sine = spec.rotary(np.concatenate(places))
        hidden = self.weights.rows(ids)
        if spec.embedding_scale != 1:
            hidden *= spec.rounded_scale
        out = np.empty_like(hidden)
        views = (cache.view(len(new)) for cache, new in zip(caches, tokens, strict=True))  # type: ignore[attr-defined]
        status = self._library.run_layers(
            self._isa,
            self._layers,
            (native.SequenceView * len(caches))(*views),
            hidden,
            out,
            cosine=cosine,
            sine=sine,
            final_norm=self._vector(FINAL_NORM),
            product=self.weights.product,
        )
        self.weights.expect(status)
        if len(ids) > NARROW:
            self._library.release_memory()
        return out

    def _logits(self, parts: abc.Sequence[_Part]) -> list[Floats]:
        states = [np.concatenate(part.states) for part in parts]
        logits = self.weights.logits(np.concatenate(states))
        if len(parts) == 1:
            return [logits]
        return np.split(logits, np.cumsum([len(rows) for rows in states])[:-1])

    def _layer(self, number: int) -> native.LayerView:
        spec, prefix = self.spec, f"model.layers.{number}."
        names = {key: f"{name}.weight" for key, name in spec.norms.items()} | {
            key: OPTIONAL[key] for key in spec.vectors
        }
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
            cache_dtype=self._shape.dtype,
            window=spec.attention[number].window,
            rotary=spec.attention[number].table,
            activation=spec.activation,
            **{key: ctypes.pointer(view) for key, view in views.items()},
            **{key: self._vector(prefix + name) for key, name in names.items()},
        )

    def _vector(self, name: str) -> native.Vector:
        vector = self._vectors[name]
        return native.Vector(vector.ctypes.data, vector.size)


class _Part:
    """What one sequence reads in a call of `forward`: `wanted` hidden states, the last ones, are kept."""

    def __init__(self, sequence: Sequence, ids: Ids, wanted: int) -> None:
        self.sequence, self.ids, self.wanted = sequence, ids, wanted
        self.before, self.read = len(sequence.ids), 0
        self.text = self.before + len(ids)
        self.states: list[Floats] = []

    @property
    def left(self) -> int:
        """Tokens that no pass has read yet."""
        return len(self.ids) - self.read

    def append(self, ids: Ids, states: Floats) -> None:
        """These were read."""
        kept = states[max(0, len(self.ids) - self.wanted - self.read) :]
        if len(kept):
            self.states.append(kept)
        self.sequence.append(ids.tolist())
        self.read += len(ids)


def shape_of(spec: Spec, bits: tuple[int, int] = PLAIN_BITS) -> Shape:
    """Of a sequence's keys and values: bfloat16 where the checkpoint is that, or codes of so many bits.

    Raises:
        UnsupportedError: heads that cannot be coded.
    """
    shape = Shape(spec.layers, spec.kv_heads, spec.head_dim, spec.dtype == "BF16", spec.positions)
    return shape if bits == PLAIN_BITS else CodedShape.of(shape, bits)


def working(spec: Spec, bits: tuple[int, int] = PLAIN_BITS) -> Working:
    """What texts take beside the weights, with keys and values of so many bits."""
    shape = shape_of(spec, bits)
    widest = max(spec.inner, spec.heads * spec.head_dim, spec.hidden)
    layer = 4 * spec.hidden + 2 * (spec.heads + spec.kv_heads) * spec.head_dim + 2 * spec.inner
    layer += 2 * spec.head_dim * (len(spec.frequencies) - 1)  # rotary tables beyond the first
    return Working(
        token=shape.token_bytes,
        text=shape.text_bytes,
        activations=4 * (layer + 3 * widest),  # of a layer and of one product
        logits=12 * spec.vocabulary,  # and a float64 copy that is chosen from
    )
