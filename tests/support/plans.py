"""Plans without running a model: made-up sensitivities, and what has to hold for every plan made of them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from waterfill.codecs import get_codec
from waterfill.files.architecture import Architecture, describe
from waterfill.files.artifact import lay_out
from waterfill.files.checkpoint import open_checkpoint
from waterfill.planning.budget import Budget
from waterfill.planning.loss import Coefficients, gain_rho, predicted_kl, relative_error
from waterfill.planning.plan import Plan
from waterfill.planning.planner import Request, make_plan
from waterfill.planning.sensitivity import Sensitivity

SCALAR = tuple(f"higgs-p1-n{n}" for n in (2, 4, 8, 16, 32, 64, 128, 256))
QUICK: dict[str, Any] = {"codecs": SCALAR, "sequences": 2, "length": 16}


def sensitivity_of(architecture: Architecture, *, seed: int = 0, **changed: Any) -> Sensitivity:
    """Coefficients as of a trained model: alphas over two orders of magnitude, betas about ten times as large."""
    draw = random.Random(seed)
    tensors = {}
    for matrix in architecture.matrices:
        alpha = math.exp(draw.gauss(-4, 1))
        tensors[matrix.name] = Coefficients(alpha, alpha * math.exp(draw.gauss(2.2, 0.5)), alpha / 20, alpha)
    probe = {"kind": "self", "sequences": 4, "length": 8, "seed": 0, "text": None}
    return replace(Sensitivity("f00d", "fisher", probe, 3.0, 28, tensors), **changed)


def planned(architecture: Architecture, sensitivity: Sensitivity | None = None, **options: Any) -> Plan:
    """A plan; `size_bytes`, `bits`, `max_kl` and `speed` make its budget."""
    timing = options.pop("timing", None)
    budget = Budget(**{key: options.pop(key) for key in ("size_bytes", "bits", "max_kl", "speed") if key in options})
    measured = sensitivity or sensitivity_of(architecture)
    return make_plan("m", architecture, measured, budget, Request(**options), timing=timing)


def plan_for(checkpoint: Path, codecs: Sequence[str] = SCALAR, *, budget: Budget, **request: Any) -> Plan:
    """A plan from made-up sensitivities, which costs no pass of the model."""
    opened = open_checkpoint(checkpoint)
    architecture = describe(opened, request.get("keep", ()))
    names = [matrix.name for matrix in architecture.matrices]
    coefficients = {name: Coefficients(0.01 + 0.001 * i, 0.1, 0.001, 0.01) for i, name in enumerate(names)}
    measured = Sensitivity(opened.fingerprint, "fisher", {"kind": "self"}, 3.0, 100, coefficients)
    return make_plan("model", architecture, measured, budget, Request(codecs=tuple(codecs), **request))


def codecs_of(plan: Plan) -> dict[str, str]:
    return {tensor.name: tensor.codec for tensor in plan.tensors}


def weight_bytes(artifact: Path) -> int:
    """What a byte budget counts, found on the disk."""
    return sum(file.stat().st_size for file in artifact.iterdir() if ".safetensors" in file.name)


def assert_sound(plan: Plan, architecture: Architecture, sensitivity: Sensitivity) -> None:
    """Whatever the budget: bytes are those of the layout, losses those of the formulas, and every tensor is there."""
    assert plan.size_bytes == lay_out(plan.specs(), shard_bytes=plan.shard_bytes).size_bytes
    assert [tensor.name for tensor in plan.tensors] == [matrix.name for matrix in architecture.matrices]
    assert [tensor.name for tensor in plan.kept] == [kept.name for kept in architecture.kept]
    weights = 0
    for tensor, matrix in zip(plan.tensors, architecture.matrices, strict=True):
        c = sensitivity.tensors[tensor.name]
        t2 = get_codec(tensor.codec).distortion(tensor.shape) if tensor.packed else 0.0
        assert (tensor.alpha, tensor.beta) == (c.alpha, c.beta)
        assert tensor.rho == gain_rho(plan.gain, c)  # type: ignore[arg-type]
        assert tensor.t2 == relative_error(t2, tensor.rho)
        along = get_codec(tensor.codec).along(tensor.shape) if tensor.packed else 0.0
        assert tensor.kl == predicted_kl(c, t2, tensor.rho, along)
        assert tensor.size_bytes == tensor.spec().size_bytes
        assert tensor.rate_bits == 8 * tensor.size_bytes / tensor.weights
        assert (tensor.shape, tensor.role, tensor.dtype) == (matrix.shape, matrix.role, matrix.dtype)
        weights += tensor.weights
    assert all(kept.size_bytes == kept.spec().size_bytes for kept in plan.kept)
    assert plan.bits == 8 * sum(tensor.size_bytes for tensor in plan.tensors) / weights
    assert plan.predicted.kl == pytest.approx(sum(tensor.kl for tensor in plan.tensors))
    assert plan.predicted.ppl == pytest.approx(math.exp(sensitivity.nll + plan.predicted.kl))
    assert plan.predicted.ppl_reference == pytest.approx(math.exp(sensitivity.nll))
