"""Measuring plans on real models without packing them: what the scripts about prediction and gains share.

    open_model ──► OpenedModel ──► measure_sensitivity ──► make_plan ──► decoded_copy ──► divergences
                                        ▲                                                   ▲
                  split_windows ──── probe windows ─────────────────────────────── held-out windows

A decoded copy is the dense model with every matrix encoded and decoded by the plan's codec and gain: the weights that
the packed runtime multiplies with, at the speed of a dense model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from waterfill.codecs import get_codec, scale_exponent
from waterfill.codecs.hadamard import groups
from waterfill.evaluation import convention, windows
from waterfill.evaluation.conventions import Window
from waterfill.evaluation.scoring import score_windows, standard_error, window_logits
from waterfill.files.architecture import Architecture, describe
from waterfill.files.checkpoint import Checkpoint, open_checkpoint
from waterfill.planning.budget import Budget
from waterfill.planning.costs import matrix_view
from waterfill.planning.estimators import group_power
from waterfill.planning.loss import Gain
from waterfill.planning.plan import Plan, TensorPlan
from waterfill.planning.planner import Request, make_plan
from waterfill.planning.probe import Probe, probe_tokens
from waterfill.planning.sensitivity import Sensitivity, measure

HELD_OUT_CHARACTERS = 260_000  # measured on; the probe `text` comes from what follows
BLOCK_WEIGHTS = 1 << 20  # encoded at a time: the search for the nearest point needs some ten times that in scratch

# The grid of least distortion at each rate of its indices, bits per weight. At 3.25 it is the one that the HIGGS paper
# (arXiv 2411.17525) calls so: 3.23 bits, stored as six indices in five bytes, 3.33.
UNIFORM_CODECS = {
    1.0: "higgs-p4-n16",
    1.25: "higgs-p4-n32",
    1.5: "higgs-p4-n64",
    1.75: "higgs-p4-n128",
    2.0: "higgs-p4-n256",
    3.0: "higgs-p4-n4096",
    3.25: "higgs-p2-n88",
    4.0: "higgs-p3-n4096",
    5.0: "higgs-p2-n1024",
    6.0: "higgs-p1-n64",
}


@dataclass(frozen=True)
class OpenedModel:
    """A model under study, whole and in float32."""

    name: str
    checkpoint: Checkpoint
    architecture: Architecture
    model: Any
    tokenizer: Any
    # {(matrix, codec): unbiased reconstruction}: codes do not depend on the gain, so each is found once.
    unbiased: dict[tuple[str, str], Tensor] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Measured:
    """KL(reference || copy), nats per token, and its standard error."""

    kl: float
    stderr: float


def open_model(path: Path) -> OpenedModel:
    checkpoint = open_checkpoint(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, experts_implementation="eager").eval()
    return OpenedModel(path.name, checkpoint, describe(checkpoint), model, AutoTokenizer.from_pretrained(path))


def split_windows(tokenizer: Any, text: Path, context: int) -> tuple[Tensor, Tensor]:
    """(held out, probe): int64 `[windows, context]` of the text's first 260,000 characters, and of all that follows."""
    characters = text.read_text("utf-8")
    parts = characters[:HELD_OUT_CHARACTERS], characters[HELD_OUT_CHARACTERS:]
    held_out, probe = (torch.tensor(tokenizer(part, verbose=False)["input_ids"]) for part in parts)
    return windows(held_out, context), windows(probe, context)


def spread(parts: Tensor, count: int) -> Tensor:
    """At most `count` windows, evenly spread over all of them."""
    return parts[torch.linspace(0, len(parts) - 1, min(count, len(parts))).round().long()]


def measure_sensitivity(
    subject: OpenedModel, kind: str, sequences: int, length: int, text: Tensor | None = None, seed: int = 0
) -> Sensitivity:
    """Fisher sensitivities on the probe `kind`; for `text`, on windows spread over those given."""
    if kind == "text":
        assert text is not None
        tokens = spread(text, sequences)
    else:
        tokens = probe_tokens(subject.model, None, Probe(kind=kind, sequences=sequences, length=length, seed=seed))
    return measure(
        subject.model,
        subject.architecture.matrices,
        tokens,
        seed=seed,
        fingerprint=subject.checkpoint.fingerprint,
        probe={"kind": kind, "sequences": len(tokens), "length": tokens.shape[1], "seed": seed},
    )


def uniform_plan(subject: OpenedModel, sensitivity: Sensitivity, codec: str, gain: Gain = "auto") -> Plan:
    """The plan that gives every matrix the same codec."""
    request = Request(gain=gain, uniform=True, codecs=(codec,))
    return make_plan(subject.name, subject.architecture, sensitivity, Budget(bits=16.0), request)


def stored_bits(subject: OpenedModel, index_bits: float) -> float:
    """Bits per weight that are stored when indices take `index_bits`: those, and 16 bits of scale per row and group."""
    shapes = [matrix.shape for matrix in subject.architecture.matrices]
    scales = sum(rows * len(groups(width)) for rows, width in shapes)
    return index_bits + 16 * scales / sum(map(math.prod, shapes))


def allotted_plan(subject: OpenedModel, sensitivity: Sensitivity, bits: float, gain: Gain = "auto") -> Plan:
    """The plan of least predicted loss at `bits` stored bits per weight."""
    return make_plan(subject.name, subject.architecture, sensitivity, Budget(bits=bits), Request(gain=gain))


@torch.no_grad()
def decoded_copy(subject: OpenedModel, tensors: Sequence[TensorPlan]) -> Any:
    """A dense float32 copy of the subject's model with these matrices as the packed runtime decodes them."""
    result = copy.deepcopy(subject.model)
    parameters = dict(result.named_parameters())
    matrices = {matrix.name: matrix for matrix in subject.architecture.matrices}
    for tensor in tensors:
        if tensor.packed:
            weight = matrix_view(parameters[tensor.parameter], matrices[tensor.name])
            key = tensor.name, tensor.codec
            if key not in subject.unbiased:
                subject.unbiased[key] = decoded(weight, tensor.codec)
            weight.copy_(with_gain(subject.unbiased[key], weight, tensor.rho))
    return result


def decoded(weight: Tensor, codec_name: str, rho: float = 0.0) -> Tensor:
    """Encode and decode `[rows, in]` float32, in blocks of rows; unbiased by default."""
    codec = get_codec(codec_name)
    exponent = scale_exponent(float(weight.abs().max()))
    rows = max(1, BLOCK_WEIGHTS // weight.shape[1])
    blocks = (codec.encode(block, exponent=exponent, rho=rho) for block in weight.split(rows))
    return torch.cat([codec.decode(block) for block in blocks])


def with_gain(unbiased: Tensor, weight: Tensor, rho: float) -> Tensor:
    """The reconstruction with gain `rho`, but for the rounding of its scales: each group over 1 + rho tau
    (`waterfill.planning.loss`), where tau is its excess power, |unbiased|^2 / |weight|^2 - 1."""
    tau = (group_power(unbiased) / group_power(weight).clamp_min(1e-30) - 1).clamp_min(0)
    sizes = torch.tensor([group.size for group in groups(weight.shape[1])])
    return unbiased / (1 + rho * tau).repeat_interleave(sizes, dim=1)


def divergences(reference: Any, models: Sequence[Any], parts: Tensor) -> list[Measured]:
    """KL of every model from the reference on windows `[windows, context]`; the reference's work is shared."""
    how = convention("gptq", context=parts.shape[1])

    def score(some: Sequence[Window]) -> list[Tensor]:
        expected, *given = [window_logits(model, some, how) for model in (reference, *models)]
        return [_window_kl(*rows) for rows in zip(expected, *given, strict=True)]

    scores = score_windows(how.cut(parts.flatten()), score, batch=1, progress=None)
    columns = [[window[column] for window in scores] for column in range(len(models))]
    return [Measured(float(torch.cat(kl).mean()), standard_error(kl)) for kl in columns]


def _window_kl(expected: Tensor, *given: Tensor) -> Tensor:
    """Of logits of the reference and of the models, `[positions, vocabulary]`: float64 `[models, positions]`."""
    log_p = F.log_softmax(expected, dim=-1)
    p = log_p.exp()
    # Float32 is enough here: rounding is random, and a mean over thousands of positions leaves less than 1e-7 nats.
    return torch.stack([_kl(log_p, p, rows) for rows in given])


def _kl(log_p: Tensor, p: Tensor, given: Tensor) -> Tensor:
    return (log_p - F.log_softmax(given, dim=-1)).mul_(p).sum(dim=-1).double()


def chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Runs of at most `size` items: copies of a model that are alive at a time."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
