"""The Plan: which codec each tensor gets, what that weighs to the byte, and what it is predicted to cost.

Plain data. `pack` reproduces the bytes exactly; `eval` prints the prediction beside the measurement.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from waterfill.artifact import RAW, Buffer, TensorSpec
from waterfill.checkpoint import WEIGHT_DTYPES
from waterfill.codecs import get_codec
from waterfill.errors import WaterfillError

VERSION = 1


@dataclass(frozen=True)
class TensorPlan:
    """One matrix and its codec."""

    name: str
    shape: tuple[int, int]
    codec: str  # "raw": stays as it is
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
        if self.codec == RAW:
            return TensorSpec(
                self.parameter,
                RAW,
                self.stored_shape,
                self.dtype,
                (Buffer(self.parameter, self.dtype, self.stored_shape),),
            )
        layout = get_codec(self.codec).layout(self.shape)
        buffers = tuple(Buffer(f"{self.name}.{key}", part.dtype, part.shape) for key, part in layout.items())
        return TensorSpec(self.name, self.codec, self.shape, self.dtype, buffers)


@dataclass(frozen=True)
class KeptPlan:
    """A tensor that is no matrix (norm, bias, …) or that the user keeps."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    size_bytes: int

    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, RAW, self.shape, self.dtype, (Buffer(self.name, self.dtype, self.shape),))


@dataclass(frozen=True)
class Prediction:
    """Predicted loss: KL(model || packed), nats per token, and perplexity on text like the probe.

    Outside the regime where the second-order model holds, `in_regime` is false and there is no upper bound: `kl` is
    then only an indication.
    """

    kl: float
    kl_low: float
    kl_high: float | None
    ppl: float
    ppl_reference: float
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
    bits: float  # stored bits per weight of the matrices
    predicted: Prediction
    tensors: tuple[TensorPlan, ...]
    kept: tuple[KeptPlan, ...]
    optimal: str  # how good the allocation is, in one sentence

    @property
    def original_bytes(self) -> int:
        """Bytes of the same tensors in the checkpoint."""
        matrices = sum(tensor.weights * WEIGHT_DTYPES[tensor.dtype].itemsize for tensor in self.tensors)
        return matrices + sum(kept.size_bytes for kept in self.kept)

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
            data = json.loads(path.read_text(encoding="utf-8"))
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
