"""Sensitivities as of trained models, drawn: log-normal by role, with trends over depth as published ones have them."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.scale.models import Config, Experts, Shapes, SimulatedMatrix
from waterfill.planning.loss import Coefficients
from waterfill.planning.sensitivity import Sensitivity

Floats = npt.NDArray[np.float64]


class Trend(NamedTuple):
    """ln(alpha) = level + slope * depth, where depth goes from 0 to 1 from the first layer to the last, and scatter."""

    level: float
    slope: float
    scatter: float  # standard deviation


# Least-squares fits to the published sensitivities of Llama-3.1-8B, in WikiText-2 perplexity per unit of t2 (public
# experiment repository of the first author of the HIGGS paper), without the two that are below zero.
TRENDS = {
    "q_proj": Trend(-1.898, -0.554, 0.409),
    "k_proj": Trend(-2.530, -0.199, 0.254),
    "v_proj": Trend(-0.770, -1.403, 0.316),
    "o_proj": Trend(-1.260, -0.951, 0.534),
    "gate_proj": Trend(-1.689, 0.539, 0.132),
    "up_proj": Trend(-1.368, 0.475, 0.261),
    "down_proj": Trend(-0.664, -0.288, 0.731),
}
PUBLISHED_PERPLEXITY, PUBLISHED_LAYERS = 5.607, 32  # a small rise of perplexity is so many times that of the loss
# Nothing is published of these: low-rank factors take the trend of what they are factors of, embedding and head that
# of the costliest role.
LIKE = {"q_a_proj": "q_proj", "q_b_proj": "q_proj", "kv_a_proj_with_mqa": "v_proj", "kv_b_proj": "v_proj"}
LIKE |= {"embed_tokens": "down_proj", "lm_head": "down_proj"}
BETA = (math.log(10), 0.5)  # mean and scatter of ln(beta / alpha): typically ten times, docs/design.md §5
RELATIVE_STDERR = 0.1  # of both
POPULARITY = 1.0  # scatter of ln(tokens) among the experts of a model
PROBE_TOKENS = 65_536  # predicted positions


def draw_sensitivity(config: Config, shapes: Shapes, seed: int = 0) -> Sensitivity:
    """Sensitivities of a simulated model. What a matrix costs falls with the number of layers, and an expert's goes by
    the tokens that reach it."""
    draw, matrices = np.random.default_rng(seed), shapes.matrices
    trends = np.array([TRENDS[LIKE.get(kind, kind)] for kind in map(_kind, matrices)])
    depth = np.array([_layer(matrix, config.layers) for matrix in matrices]) / max(1, config.layers - 1)
    reached = _reached(config, matrices, draw)
    alpha = np.exp(trends[:, 0] + trends[:, 1] * depth + trends[:, 2] * draw.normal(size=len(matrices)))
    alpha *= reached / PROBE_TOKENS / PUBLISHED_PERPLEXITY * PUBLISHED_LAYERS / config.layers
    beta = alpha * np.exp(draw.normal(*BETA, size=len(matrices)))
    tensors = {
        matrix.name: Coefficients(a, b, RELATIVE_STDERR * a, RELATIVE_STDERR * b, int(tokens))
        for matrix, a, b, tokens in zip(matrices, alpha.tolist(), beta.tolist(), reached.tolist(), strict=True)
    }
    probe = {"kind": "self", "seed": seed}
    return Sensitivity("simulated", "fisher", probe, math.log(PUBLISHED_PERPLEXITY), PROBE_TOKENS, tensors)


def _kind(matrix: SimulatedMatrix) -> str:
    """`q_proj` and the like."""
    return matrix.name.split(".")[-2 if matrix.role == "expert" else -1]


def _layer(matrix: SimulatedMatrix, layers: int) -> int:
    """Its number; the head comes after the last."""
    number = matrix.name.removeprefix("model.layers.").partition(".")[0]
    return int(number) if number.isdecimal() else 0 if matrix.role == "embedding" else layers - 1


def _reached(config: Config, matrices: tuple[SimulatedMatrix, ...], draw: np.random.Generator) -> Floats:
    """Tokens of the probe that came by each matrix: whole numbers, of an expert log-normal."""
    share = config.active / config.experts if isinstance(config, Experts) else 1.0
    popularity = np.exp(POPULARITY * draw.normal(size=len(matrices)) - POPULARITY**2 / 2)
    experts = np.array([matrix.role == "expert" for matrix in matrices])
    return np.where(experts, np.minimum(np.rint(PROBE_TOKENS * share * popularity), PROBE_TOKENS), PROBE_TOKENS)
