"""The Plan: which codec each tensor gets, what that weighs to the byte, and what it is predicted to cost.

Plain data. `pack` reproduces the bytes exactly; `eval` prints the prediction beside the measurement.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from waterfill.artifact import RAW, Buffer, TensorSpec
from waterfill.checkpoint import KEPT_DTYPES, WEIGHT_DTYPES
from waterfill.codecs import LOSSLESS, get_codec
from waterfill.codecs.lossless import BUFFER
from waterfill.errors import WaterfillError
from waterfill.files import read_text

VERSION = 1


@dataclass(frozen=True)
class TensorPlan:
    """One matrix and its codec."""

    name: str
    shape: tuple[int, int]
    codec: str  # "raw": stays as it is; "lossless": so too, in fewer bytes
    rate_bits: float  # 8 * size_bytes / weights
    size_bytes: int
    alpha: float  # nats per token per unit of relative noise power
    beta: float  # nats per token per squared relative change of scale
    rho: float  # gain, see waterfill.loss
    t2: float  # predicted ||W' - W||^2 / ||W||^2, with its gain
    kl: float  # its share of the predicted loss, nats per token
    role: str
    dtype: str  # of the checkpoint, safetensors name
    parameter: str  # the model's state-dict name; a raw matrix is stored under it
    stored_shape: tuple[int, ...]  # shape of the parameter (of a Conv1D: [in, out])

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    def spec(self) -> TensorSpec:
        """How the artifact stores it."""
        if self.codec in (RAW, LOSSLESS):
            return kept_spec(self.parameter, self.codec, self.stored_shape, self.dtype, self.size_bytes)
        layout = get_codec(self.codec).layout(self.shape)
        buffers = tuple(Buffer(f"{self.name}.{key}", part.dtype, part.shape) for key, part in layout.items())
        return TensorSpec(self.name, self.codec, self.shape, self.dtype, buffers)


@dataclass(frozen=True)
class KeptPlan:
    """A tensor that is no matrix (norm, bias, …) or that the user keeps; all of them in a lossless plan."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    size_bytes: int
    codec: str = RAW  # or "lossless"

    @property
    def original_bytes(self) -> int:
        """Bytes in the checkpoint."""
        return KEPT_DTYPES[self.dtype].itemsize * math.prod(self.shape)

    def spec(self) -> TensorSpec:
        return kept_spec(self.name, self.codec, self.shape, self.dtype, self.size_bytes)


def kept_spec(name: str, codec: str, shape: tuple[int, ...], dtype: str, size_bytes: int) -> TensorSpec:
    """How the artifact stores a tensor bit by bit, raw or losslessly coded."""
    raw = codec == RAW
    buffer = Buffer(name, dtype, shape) if raw else Buffer(f"{name}.{BUFFER}", "U8", (size_bytes,))
    return TensorSpec(name, codec, shape, dtype, (buffer,))


@dataclass(frozen=True)
class Prediction:
    """Predicted loss: KL(model || packed), nats per token, and perplexity on text like the probe.

    Outside the regime where the second-order model holds, `in_regime` is false and there is no upper bound: `kl` is
    then only an indication. A lossless plan predicts 0, and knows no perplexity.
    """

    kl: float
    kl_low: float
    kl_high: float | None
    ppl: float | None
    ppl_reference: float | None
    in_regime: bool


@dataclass(frozen=True)
class Plan:
    """What `pack` carries out."""

    model: str  # as the user named it
    fingerprint: str  # of the checkpoint
    budget: Mapping[str, Any]
    gain: str
    probe: Mapping[str, Any]
    keep: tuple[str, ...]
    shard_bytes: int
    size_bytes: int  # all weight files of the artifact, exactly
    bits: float  # stored bits per weight of the matrices; in a lossless plan of all tensors
    predicted: Prediction
    tensors: tuple[TensorPlan, ...]
    kept: tuple[KeptPlan, ...]
    optimal: str  # how good the allocation is, in one sentence

    @property
    def lossless(self) -> bool:
        """Whether every bit of the model is kept."""
        return "lossless" in self.budget

    @property
    def original_bytes(self) -> int:
        """Bytes of the same tensors in the checkpoint."""
        matrices = sum(tensor.weights * WEIGHT_DTYPES[tensor.dtype].itemsize for tensor in self.tensors)
        return matrices + sum(kept.original_bytes for kept in self.kept)

    def specs(self) -> list[TensorSpec]:
        """Every stored tensor, in execution order."""
        return [*(kept.spec() for kept in self.kept), *(tensor.spec() for tensor in self.tensors)]

    def to_json(self) -> str:
        """Equal plans give equal bytes."""
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1) + "\n"

    @property
    def identity(self) -> str:
        """Digest of all that decides the artifact's bytes; how the user named the model does not."""
        return blake2b(replace(self, model="").to_json().encode(), digest_size=16).hexdigest()

    @staticmethod
    def load(path: Path) -> Plan:
        """Read a plan that `to_json` wrote; WaterfillError if it is not one."""
        try:
            data = json.loads(read_text(path))
            if data.pop("version") != VERSION:
                raise ValueError("unknown version")
            return _from_json(data)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise WaterfillError(
                f"{path} is not a plan of this version ({error}); write one with `waterfill plan --save`"
            ) from error


def _from_json(data: dict[str, Any]) -> Plan:
    def tuples(record: dict[str, Any]) -> dict[str, Any]:
        return {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}

    data["predicted"] = Prediction(**data["predicted"])
    data["tensors"] = tuple(TensorPlan(**tuples(record)) for record in data["tensors"])
    data["kept"] = tuple(KeptPlan(**tuples(record)) for record in data["kept"])
    return Plan(**tuples(data))
