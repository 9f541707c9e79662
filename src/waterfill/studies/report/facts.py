"""Everything that a report says, as plain data: from an artifact alone, and from measurements if there are any."""

from __future__ import annotations

import math
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

from waterfill.base.machine import package_version
from waterfill.base.progress import Progress
from waterfill.evaluation import Divergence
from waterfill.files.artifact import Artifact
from waterfill.planning.loss import Coefficients
from waterfill.planning.plan import PLAN_FILE, Plan
from waterfill.planning.planner import MARGINS, Request
from waterfill.planning.sensitivity import SENSITIVITY_FILE, Method, Sensitivity
from waterfill.studies.comparison.base import OURS, Row
from waterfill.studies.comparison.curve import CurvePoint, between, predicted_curve
from waterfill.studies.report.bound import ideal_bytes, least_loss

ON_CURVE = 1.1  # of the curve, that a plan may promise to lose and still be one of the best
PACKAGES = ("waterfill", "torch", "transformers", "safetensors", "tokenizers")


@dataclass(frozen=True)
class Continuation:
    """One prompt, continued greedily by both models."""

    prompt: str
    original: str
    packed: str

    @property
    def agree(self) -> int:
        """Characters that both continuations have in common from their beginning."""
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.original, self.packed, strict=False)))


@dataclass(frozen=True)
class BoundPoint:
    """A size, and the least loss that any coder of Gaussian weights could have there."""

    size_bytes: int
    kl: float


@dataclass(frozen=True)
class Report:
    """What the page of one artifact says."""

    name: str  # of the artifact's directory
    size_bytes: int  # all weight files, as they are on disk
    plan: Plan
    measured_t2: Mapping[str, float]  # of every packed matrix, found while packing
    config: Mapping[str, Any]  # facts of the model's configuration
    curve: tuple[CurvePoint, ...]
    bound: tuple[BoundPoint, ...]
    ideal_bytes: float  # of the matrices, if each were coded at Shannon's bound for its noise
    divergence: Divergence | None  # measured, where the original and a text were given
    text: str | None  # name of that text
    samples: tuple[Continuation, ...]
    ours: tuple[Row, ...]  # the best plans that `waterfill compare` has measured on this model
    peers: tuple[Row, ...]  # and the other methods
    same_text: bool  # whether it did so on the tokens of `divergence`
    versions: Mapping[str, str]
    commands: tuple[str, ...]
    written: str  # UTC date
    path: Path | None = None  # of the page


def gather(
    artifact: Artifact,
    plan: Plan,
    config: Mapping[str, Any],
    *,
    divergence: Divergence | None = None,
    text: str | None = None,
    samples: Sequence[Continuation] = (),
    compared: Sequence[Row] = (),
    same_text: bool = False,
    original: bool = False,
    options: Sequence[str] = (),
    progress: Progress | None = None,
) -> Report:
    """The report of an opened artifact; nothing of the original is needed.

    `original` says whether there was one; `options` is what else `waterfill report` was asked for, as it is typed.
    """
    measured = {name: tensor.t2 for name, tensor in artifact.tensors.items() if tensor.packed}
    request = Request(gain=plan.gain, shard_bytes=plan.shard_bytes)
    curve = predicted_curve(plan, sensitivity_of(artifact.path, plan), request, progress=progress)
    return Report(
        name=artifact.path.resolve().name,
        size_bytes=artifact.size_bytes,
        plan=plan,
        measured_t2=measured,
        config=_config_facts(config),
        curve=curve,
        bound=tuple(
            BoundPoint(point.size_bytes, least_loss(plan.tensors, point.bits * _weights(plan) / 8)) for point in curve
        ),
        ideal_bytes=ideal_bytes(plan.tensors, measured),
        divergence=divergence,
        text=text,
        samples=tuple(samples),
        ours=tuple(row for row in compared if row.method == OURS[0] and _best(row, curve)),
        peers=tuple(row for row in compared if row.family != "waterfill"),
        same_text=same_text,
        versions=versions(),
        commands=_commands(plan, artifact.path.name, original, text, divergence, options),
        written=datetime.now(UTC).date().isoformat(),
    )


def sensitivity_of(path: Path, plan: Plan) -> Sensitivity:
    """The sensitivities in an artifact, or else what the plan says of them; with the plan's error feedback."""
    if (path / SENSITIVITY_FILE).exists():
        left = {tensor.name: tensor.feedback for tensor in plan.tensors if tensor.feedback is not None}
        return Sensitivity.load(path / SENSITIVITY_FILE).after_feedback(left)
    # The plan's interval tells the sampling error of the whole; as it was taken, all tensors share it.
    predicted = plan.predicted
    low = MARGINS.get(str(plan.probe.get("kind")), MARGINS["random"])[0]
    share = max(0.0, (predicted.kl * low - predicted.kl_low) / 2 / predicted.kl) if predicted.kl else 0.0
    corrected = ((t.name, predicted.factor * t.alpha, predicted.factor * t.beta) for t in plan.tensors)
    tensors = {
        name: Coefficients(alpha, beta, share * max(alpha, 0.0), share * max(beta, 0.0))
        for name, alpha, beta in corrected
    }
    nll = 0.0 if predicted.ppl_reference is None else math.log(predicted.ppl_reference)  # a lossless plan has none
    method = cast(Method, str(plan.probe.get("method")))  # for the record; nothing is measured here
    return Sensitivity(plan.fingerprint, method, plan.probe, nll, 0, tensors)


def versions() -> dict[str, str]:
    """Of Python and of the packages that a result depends on."""
    installed = {package: package_version(package) for package in PACKAGES}
    return {"Python": platform.python_version(), **{name: known for name, known in installed.items() if known}}


def _best(row: Row, curve: tuple[CurvePoint, ...]) -> bool:
    """Whether a plan of ours lies on the curve; those from part of the codecs, or for memory, lie above it."""
    expected = between(curve, row.size_bytes or 0)
    return expected is not None and (row.predicted_kl or math.inf) <= ON_CURVE * expected


def _weights(plan: Plan) -> int:
    return sum(tensor.weights for tensor in plan.tensors)


def _config_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """What tells a model from others, under its usual names."""
    inner = config.get("text_config")
    text = {**config, **(inner if isinstance(inner, dict) else {})}
    names = config.get("architectures")
    wanted = {
        "architecture": names[0] if isinstance(names, list) and names else config.get("model_type"),
        "layers": text.get("num_hidden_layers", text.get("n_layer")),
        "hidden size": text.get("hidden_size", text.get("n_embd")),
        "vocabulary": text.get("vocab_size"),
        "experts": text.get("num_local_experts", text.get("num_experts", text.get("n_routed_experts"))),
    }
    return {name: value for name, value in wanted.items() if value}


def _commands(
    plan: Plan, name: str, original: bool, text: str | None, divergence: Divergence | None, options: Sequence[str]
) -> tuple[str, ...]:
    """What to type to come by the same bytes and the same figures."""
    model, out = shlex.quote(plan.model), shlex.quote(name)  # as the plan has it: a local path is nobody's business
    lines = [
        f"pip install waterfill=={versions().get('waterfill', '')}".rstrip("="),
        f"waterfill pack {model} again --plan {shlex.quote(f'{name}/{PLAN_FILE}')}",
    ]
    if plan.calibration is not None and plan.calibration.text is not None:
        lines[-1] += f" --calibrate {shlex.quote(plan.calibration.text)}"
    measured = ""
    if divergence is not None and text is not None:
        measured = f" --text {shlex.quote(text)} --context {divergence.context} --windows {divergence.windows}"
        lines.append(f"waterfill eval {out} --against {model}{measured}")
    of_original = [f"--original {model}{measured}"] if original else []
    return (*lines, " ".join([f"waterfill report {out}", *of_original, *options]))


def planned_with(plan: Plan) -> str:
    """The options of `waterfill plan` that a plan records, as they are typed."""
    options = []
    for name, value in plan.budget.items():
        options.append(f"--{name.removesuffix('_bytes').replace('_', '-')} {value}")
    probe = plan.probe
    options.append(f"--gain {plan.gain}")
    options += [f"--keep {shlex.quote(pattern)}" for pattern in plan.keep]
    if probe.get("kind") == "text":
        options.append(f"--text {shlex.quote(str(probe.get('text')))}")
    elif probe.get("kind"):
        options.append(f"--probe {probe['kind']}")
    options += [f"--{name} {probe[name]}" for name in ("method", "sequences", "length", "seed") if name in probe]
    if (on := plan.calibration) is not None:
        text = on.kind if on.text is None else shlex.quote(on.text)
        options.append(f"--calibrate {text} --calibration-tokens {on.token_count}")
    else:
        options.append("--feedback none")
    return " ".join(options)
