"""The Plan: which codec each tensor gets, what that weighs to the byte, and what it is predicted to cost.

Plain data. `pack` reproduces the bytes exactly; `eval` prints the prediction beside the measurement.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from waterfill.base import typed
from waterfill.base.dtypes import ITEM_BYTES, WEIGHT_DTYPES
from waterfill.base.errors import ArtifactError, BudgetError, WaterfillError
from waterfill.base.typed import Count, Magnitude, Positive, Range, Share
from waterfill.codecs import LOSSLESS, get_codec
from waterfill.codecs.lossless import BUFFER
from waterfill.files.architecture import Role
from waterfill.files.artifact import RAW, Buffer, TensorSpec
from waterfill.files.artifact.format import is_packed, quote
from waterfill.planning.budget import Budget
from waterfill.planning.loss import Cost, Gain
from waterfill.planning.speed import Speed

VERSION = 1
Perplexity = Annotated[float, Range(1e-300, 1e308)]
PLAN_FILE = "waterfill-plan.json"
UNIFORM, TABLE, SIBLING = UNPROMISED = ("uniform", "table", "sibling")
"""Kinds of a probe that nothing of this model was measured on (`borrowed`)."""


@dataclass(frozen=True)
class TensorPlan:
    """One matrix and its codec."""

    name: str
    shape: tuple[Positive, Positive]
    codec: str  # "raw": stays as it is; "lossless": so too, in fewer bytes
    rate_bits: Magnitude  # 8 * size_bytes / weights
    size_bytes: Count
    alpha: Cost  # nats per token per unit of relative noise power; as it was planned with
    beta: Cost  # nats per token per squared relative change of scale
    rho: Share  # gain, see waterfill.planning.loss
    t2: Magnitude  # predicted ||W' - W||^2 / ||W||^2, with its gain
    kl: Magnitude  # its share of the predicted loss, nats per token, corrected as that is
    role: Role
    dtype: str  # of the checkpoint, safetensors name
    parameter: str  # the model's state-dict name; a raw matrix is stored under it
    stored_shape: tuple[Positive, ...]  # shape of the parameter (of a Conv1D: [in, out])
    measured: Share = 1.0  # share of alpha and beta that was measured, see waterfill.evidence; the rest is
    like: str | None = None  # that of these matrices: a pattern of names, or words
    feedback: Share | None = None  # of alpha without error feedback, what is left with it; None: there is none

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def packed(self) -> bool:
        """As `TensorSpec.packed`: whether anything of it is lost."""
        return is_packed(self.codec)

    def spec(self) -> TensorSpec:
        """How the artifact stores it."""
        if not self.packed:
            return kept_spec(self.parameter, self.codec, self.stored_shape, self.dtype, self.size_bytes)
        layout = get_codec(self.codec).layout(self.shape)
        buffers = tuple(Buffer(f"{self.name}.{key}", part.dtype, part.shape) for key, part in layout.items())
        return TensorSpec(self.name, self.codec, self.shape, self.dtype, buffers)


@dataclass(frozen=True)
class KeptPlan:
    """A tensor that is no matrix (norm, bias, …) or that the user keeps; all of them in a lossless plan."""

    name: str
    shape: tuple[Count, ...]
    dtype: str
    size_bytes: Count
    codec: str = RAW  # or "lossless"

    @property
    def original_bytes(self) -> int:
        """Bytes in the checkpoint."""
        return ITEM_BYTES[self.dtype] * math.prod(self.shape)

    def spec(self) -> TensorSpec:
        return kept_spec(self.name, self.codec, self.shape, self.dtype, self.size_bytes)


def kept_spec(name: str, codec: str, shape: tuple[int, ...], dtype: str, size_bytes: int) -> TensorSpec:
    """How the artifact stores a tensor bit by bit, raw or losslessly coded."""
    raw = codec == RAW
    buffer = Buffer(name, dtype, shape) if raw else Buffer(f"{name}.{BUFFER}", "U8", (size_bytes,))
    return TensorSpec(name, codec, shape, dtype, (buffer,))


@dataclass(frozen=True)
class Unused:
    """A tensor of the checkpoint that the model of its config.json has no place for, and that is left out."""

    name: str  # in the checkpoint
    size_bytes: Count
    expected: bool  # whether transformers knows it as superfluous


@dataclass(frozen=True)
class Prediction:
    """Predicted loss: KL(model || packed), nats per token, and perplexity on text like the probe.

    Outside the regime where the second-order model holds, `in_regime` is false and there is no upper bound: `kl` is
    then only an indication. A lossless plan predicts 0, and knows no perplexity.

    It is for text like the probe. `assumed_kl` is what `kl` has beyond the measurement, for matrices that the probe
    hardly reached: text that uses them more than the probe does may lose more, and nothing says how much.
    `sampling_error` is the part of the interval that more sequences would narrow: half of a 95 % interval.
    `factor` is by what the sum of sensitivities was corrected, after noise of the plan's size in all matrices at once
    was `tried` on so many sequences (`trials`).
    """

    kl: Magnitude
    kl_low: Magnitude
    kl_high: Magnitude | None
    ppl: Perplexity | None
    ppl_reference: Perplexity | None
    in_regime: bool
    assumed_kl: float = 0.0
    sampling_error: Magnitude = 0.0
    factor: Magnitude = 1.0
    tried: Count = 0


@dataclass(frozen=True)
class Level:
    """One of the rates that a model can be read at."""

    size_bytes: Positive  # of the weight files, what is read at this rate
    bits: Magnitude  # per weight of the matrices
    predicted: Prediction


@dataclass(frozen=True)
class Calibration:
    """The tokens that moments of inputs are taken on, for error feedback."""

    kind: Literal["self", "random", "text"]
    sequences: Positive
    length: Positive
    seed: int
    text: str | None  # its name
    tokens: str = ""  # digest of their ids

    @property
    def token_count(self) -> int:
        """Of all sequences."""
        return self.sequences * self.length


@dataclass(frozen=True)
class Plan:
    """What `pack` carries out."""

    model: str  # as the user named it
    fingerprint: str  # of the checkpoint
    budget: Mapping[str, Count | Magnitude | bool]
    gain: Gain
    probe: Mapping[str, str | int | float | None]
    keep: tuple[str, ...]
    shard_bytes: Positive
    size_bytes: Positive  # all weight files of the artifact, exactly
    bits: Magnitude  # stored bits per weight of the matrices; in a lossless plan of all tensors
    predicted: Prediction
    tensors: tuple[TensorPlan, ...]
    kept: tuple[KeptPlan, ...]
    optimal: str  # how good the allocation is, in one sentence
    unused: tuple[Unused, ...] = ()
    calibration: Calibration | None = None  # None: errors are not fed back
    speed: Speed | None = None  # of products where it was made; None: it was not planned to be run as it is stored
    levels: tuple[
        Level, ...
    ] = ()  # from the lowest rate to that of all the rest of the plan; none where it has but one

    @property
    def matrices(self) -> tuple[TensorPlan, ...]:
        """The planned matrices: a plan is all that another plan needs to know of a model (`inventory`)."""
        return self.tensors

    def at(self, level: int) -> Level:
        """What the model is at one of its rates, from 1 up; of a plan with one rate, whatever the number."""
        return self.levels[level - 1] if self.levels else Level(self.size_bytes, self.bits, self.predicted)

    @property
    def lossless(self) -> bool:
        """Whether every bit of the model is kept."""
        return "lossless" in self.budget

    @property
    def fed_back(self) -> tuple[TensorPlan, ...]:
        """The matrices with error feedback."""
        return tuple(tensor for tensor in self.tensors if tensor.feedback)

    @property
    def left_by_feedback(self) -> float | None:
        """Of what those would lose without it, the share that they are expected to lose; None: they lose nothing."""
        without = math.fsum(tensor.kl / tensor.feedback for tensor in self.fed_back if tensor.feedback)
        return math.fsum(tensor.kl for tensor in self.fed_back) / without if without else None

    @property
    def promises(self) -> bool:
        """Whether what is predicted was measured on this model."""
        return self.probe.get("kind") not in UNPROMISED

    @property
    def original_bytes(self) -> int:
        """Bytes of the same tensors in the checkpoint."""
        matrices = sum(tensor.weights * ITEM_BYTES[tensor.dtype] for tensor in self.tensors)
        return matrices + sum(kept.original_bytes for kept in self.kept)

    def specs(self) -> list[TensorSpec]:
        """Every stored tensor, in execution order."""
        return [*(kept.spec() for kept in self.kept), *(tensor.spec() for tensor in self.tensors)]

    def to_json(self) -> str:
        """Equal plans give equal bytes."""
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1) + "\n"

    @property
    def identity(self) -> str:
        """Digest of all that decides the artifact's bytes; how the user named the model does not, nor the machine."""
        return blake2b(replace(self, model="", speed=None).to_json().encode(), digest_size=16).hexdigest()

    @staticmethod
    def load(path: Path) -> Plan:
        """Read a plan that `to_json` wrote.

        Raises:
            WaterfillError: it is not one, or does not agree with itself.
        """
        return typed.load(path, "plan", VERSION, _from_json)


def _from_json(data: dict[str, Any]) -> Plan:
    plan: Plan = typed.read(Plan, data)
    _check_budget(plan)
    for tensor in plan.tensors:
        _check_matrix(tensor)
    for kept in plan.kept:
        _check_kept(kept)
    everything: list[TensorPlan | KeptPlan] = [*plan.tensors, *plan.kept]
    name, times = Counter(tensor.name for tensor in everything).most_common(1)[0] if everything else ("", 0)
    _agree(times < 2, f"{quote(name)} is in it {times} times")
    if plan.levels:
        _agree(plan.levels[-1] == Level(plan.size_bytes, plan.bits, plan.predicted), "its last level is another")
        has = {get_codec(tensor.codec).level_count for tensor in plan.tensors if tensor.packed}
        _agree(has == {len(plan.levels)}, f"it has {len(plan.levels)} levels, and matrices have {sorted(has)}")
    stored = everything if plan.lossless else plan.tensors
    weights = sum(math.prod(tensor.shape) for tensor in stored)
    size_bytes = sum(tensor.size_bytes for tensor in stored)
    _agree(weights > 0, "it has nothing to pack")
    _agree(
        _close(plan.bits * weights, 8 * size_bytes), f"bits is {plan.bits}, where its tensors add up to another rate"
    )
    return plan


def _check_budget(plan: Plan) -> None:
    if plan.lossless:
        _agree(plan.budget == {"lossless": True}, "budget asks for more than lossless")
        _agree(not plan.tensors, "it is lossless and has tensors that are not")
        return
    try:
        _agree(not any(isinstance(value, bool) for value in plan.budget.values()), "budget is true, expected a number")
        Budget(**cast(Any, plan.budget))
    except (TypeError, BudgetError) as error:
        raise ValueError(f"budget is none: {error}") from error


def _check_matrix(tensor: TensorPlan) -> None:
    where = f"of {quote(tensor.name)}"
    _check_dtype(tensor, WEIGHT_DTYPES, where)
    _agree(tensor.stored_shape in (tensor.shape, tensor.shape[::-1]), f"stored_shape {where} is not its shape")
    if tensor.role == "expert":
        numbered = tensor.name.rpartition(".")[2]
        _agree(numbered.isascii() and numbered.isdecimal(), f"role {where} is expert, and its name has no number")
        _agree(tensor.packed, f"codec {where} is {tensor.codec!r}, which no expert can have")
    if tensor.packed:
        try:
            _agree(get_codec(tensor.codec).for_files, f"codec {where} is one of memory only")
        except WaterfillError as error:
            raise ValueError(f"codec {where} is {quote(tensor.codec)}, which this waterfill does not know") from error
    _check_size(tensor, where)
    bits = 8 * tensor.size_bytes / tensor.weights
    _agree(_close(tensor.rate_bits, bits), f"rate_bits {where} is {tensor.rate_bits}, where its bytes make {bits}")


def _check_kept(kept: KeptPlan) -> None:
    where = f"of {quote(kept.name)}"
    _agree(not is_packed(kept.codec), f"codec {where} is {quote(kept.codec)}, expected {RAW} or {LOSSLESS}")
    _check_dtype(kept, ITEM_BYTES if kept.codec == RAW else WEIGHT_DTYPES, where)
    _check_size(kept, where)


def _check_dtype(tensor: TensorPlan | KeptPlan, permitted: Collection[str], where: str) -> None:
    _agree(tensor.dtype in permitted, f"dtype {where} is {quote(tensor.dtype)}, expected {' or '.join(permitted)}")


def _check_size(tensor: TensorPlan | KeptPlan, where: str) -> None:
    taken = tensor.spec().size_bytes
    _agree(tensor.size_bytes == taken, f"size_bytes {where} is {tensor.size_bytes:,}, where its codec takes {taken:,}")


def _agree(fits: bool, otherwise: str) -> None:
    if not fits:
        raise ValueError(otherwise)


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-9)


def read_plan(artifact: Path) -> Plan:
    """The plan that an artifact was packed by."""
    if not (artifact / PLAN_FILE).exists():
        raise ArtifactError(f"{artifact} has no {PLAN_FILE}; give a directory that `waterfill pack` wrote")
    return Plan.load(artifact / PLAN_FILE)
