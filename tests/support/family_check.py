"""One causal family of transformers, tiny, through everything: plan, pack, load, compare, generate, stream.

tiny_config ──► checkpoint ──plan, pack──► artifacts: lossless, for storage, for memory
                    │                          │ load
                 original, dense twin ◄────────┴── equal?
"""

from __future__ import annotations

import math
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import waterfill
from tests.support.tiny_configs import SPECIAL, tiny_config
from waterfill.base.dtypes import TORCH_DTYPES
from waterfill.base.errors import WaterfillError
from waterfill.base.native import FLOAT_ACTIVATIONS
from waterfill.codecs import LOSSLESS, Encoded, get_codec, lossless
from waterfill.files.architecture import describe
from waterfill.files.artifact import RAW, open_artifact
from waterfill.files.checkpoint import open_checkpoint
from waterfill.running.streaming import Tuning

FAMILIES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
SAMPLE = {  # in the default suite; the others with `-m families`
    "bart",  # a decoder of an encoder-decoder; scaled embeddings; learned positions
    "deepseek_v3",  # low-rank attention, a buffer in the router
    "falcon",  # linear layers with a forward of their own
    "gemma3",  # multimodal; scaled embeddings, sliding windows
    "gpt2",  # Conv1D, tied head
    "gpt_oss",  # experts stored transposed, with biases
    "jamba",  # attention, Mamba, experts
    "llama4_text",  # experts multiplied with all at once
    "mamba",  # no attention at all
    "recurrent_gemma",  # recurrent layers, windows
    "rwkv",  # weights rescaled in place
}
BITS = 5.0
TOLERANCE = 5e-4  # of logits, in their standard deviation: packed and dense products differ by the order of float sums
ATTEMPTS: tuple[dict[str, Any], ...] = ({}, {"probe": "random"}, {"probe": "random", "method": "perturb"})
SPARED = 24  # one token in so many may differ
Status = Literal["passed", "refused", "not built", "failed"]


@dataclass
class Outcome:
    """How far a family came."""

    family: str
    model_class: str
    status: Status = "passed"
    stage: str = ""  # that it ended in, unless it passed
    reason: str = ""
    packed_share: float = math.nan  # weights that are packed, of all
    difference: float = 0.0  # largest one of logits from the dense twin's, in their standard deviation
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    trace: str = ""


def check(family: str, root: Path) -> Outcome:
    """Take a tiny model of `family` through every stage; its files go to `root`."""
    outcome = Outcome(family, str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]))
    start = time.perf_counter()
    try:
        _Check(outcome, root).run()
    except Exception as error:  # whatever goes wrong is what is asked for here
        outcome.status = _status(outcome.stage, error)
        outcome.reason = f"{type(error).__name__}: {error}" if outcome.status == "failed" else str(error)
        outcome.reason = " ".join(outcome.reason.split())
        outcome.trace = traceback.format_exc()
    outcome.seconds = time.perf_counter() - start
    return outcome


def _status(stage: str, error: Exception) -> Status:
    if stage == "build":
        return "not built"
    return "refused" if isinstance(error, WaterfillError) and stage in ("plan", "pack") else "failed"


class _Check:
    def __init__(self, outcome: Outcome, root: Path) -> None:
        self.outcome = outcome
        self.checkpoint = root / "checkpoint"
        self.root = root

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.outcome.stage = name
        torch.manual_seed(0)
        yield
        self.outcome.stage = ""

    def run(self) -> None:
        with self.stage("build"):
            build(self.outcome.family, self.checkpoint)
            logits(original(self.checkpoint))
        with self.stage("plan"):
            plans = {"lossless": waterfill.plan(self.checkpoint, lossless=True)}
            measured = self.sensitivity()
            for purpose in ("storage", "memory"):
                plans[purpose] = waterfill.plan(self.checkpoint, bits=BITS, purpose=purpose, sensitivity=measured)
            self.outcome.packed_share = packed_share(plans["memory"])
        with self.stage("pack"):
            for name, plan in plans.items():
                waterfill.pack(self.checkpoint, self.root / name, plan=plan)
        self.lossless()
        with mock.patch.dict(os.environ, {FLOAT_ACTIVATIONS: "float"}):
            for purpose in ("storage", "memory"):
                self.packed(purpose)
        for purpose in ("storage", "memory"):
            self.streamed(purpose)

    def sensitivity(self) -> Any:
        """Measured as by default, or as the refusal says."""
        for options in ATTEMPTS[:-1]:
            try:
                return waterfill.sensitivity(self.checkpoint, sequences=2, length=12, **options)
            except WaterfillError as refusal:
                self.note(str(refusal))
        return waterfill.sensitivity(self.checkpoint, sequences=2, length=12, **ATTEMPTS[-1])

    def lossless(self) -> None:
        with self.stage("load lossless"):
            model = waterfill.load(self.root / "lossless")
        with self.stage("compare lossless"):
            expected = original(self.checkpoint, dtype="auto", experts_implementation=None)
            state, others = (each.state_dict() for each in (model, expected))
            assert list(state) == list(others), "the names of tensors differ"
            for name, tensor in others.items():
                assert state[name].dtype == tensor.dtype, f"{name} is {state[name].dtype}, not {tensor.dtype}"
                assert torch.equal(state[name], tensor), f"{name} differs"
            if not _runs(expected):  # XLNet, in bfloat16
                self.note("transformers itself does not run it in the checkpoint's dtype")
                model = waterfill.load(self.root / "lossless", dtype=torch.float32)
                expected = original(self.checkpoint)
            assert torch.equal(logits(model), logits(expected)), "logits differ"

    def packed(self, purpose: str) -> None:
        with self.stage(f"load, for {purpose}"):
            model = waterfill.load(self.root / purpose, dtype=torch.float32)
        with self.stage(f"compare, for {purpose}"):
            twin = dense_twin(self.checkpoint, self.root / purpose)
            self.compare(logits(model), logits(twin))
        with self.stage(f"generate, for {purpose}"):
            expected, why = generated(twin)
            if expected is None:
                self.note(f"transformers itself does not generate: {why}")
                return
            found, why = generated(model)
            assert found is not None, why
            assert torch.equal(found, expected), f"{found.tolist()} generated, not {expected.tolist()}"

    def streamed(self, purpose: str) -> None:
        with self.stage(f"streamed, for {purpose}"):
            resident = waterfill.load(self.root / purpose, dtype=torch.float32)
            quick = Tuning(reading_s=0.0, working_s=0.0)
            model = waterfill.load(self.root / purpose, dtype=torch.float32, streamed=True, tuning=quick)
            self.compare(logits(model), logits(resident))
            assert (expected := generated(resident)[0]) is None or torch.equal(generated(model)[0], expected)

    def compare(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        assert expected.isfinite().all(), "the original's logits are not finite"
        by_token = ((found - expected).abs().amax(-1) / expected.std()).flatten().sort().values
        # A router chooses otherwise where two of its scores are equal but for rounding, and one token goes another way.
        difference = float(by_token[-1 - len(by_token) // SPARED])
        self.outcome.difference = max(self.outcome.difference, difference)
        assert difference <= TOLERANCE, f"logits differ by {difference:.2g} of their standard deviation"

    def note(self, text: str) -> None:
        if text not in self.outcome.notes:
            self.outcome.notes.append(text)


def build(family: str, path: Path) -> None:
    """A tiny checkpoint of `family` in bfloat16, with random weights, larger than transformers' own."""
    torch.manual_seed(0)
    config = tiny_config(family)
    config.dtype = torch.bfloat16
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.nan_to_num_(posinf=0, neginf=0)  # some classes take logarithms of what may be rounded to 0
            fan_in = parameter.shape[-1] if parameter.ndim > 1 else 100
            parameter.add_(torch.randn_like(parameter), alpha=fan_in**-0.5)
    model.save_pretrained(path)
    if type(model.config) is not type(config):
        config.save_pretrained(path)  # what the original checkpoint has, of which this is the decoder


def builds(family: str, path: Path) -> bool:
    """Write a tiny checkpoint, and say whether transformers itself runs it."""
    try:
        build(family, path)
        logits(original(path))
    except Exception:  # each class has its own reasons
        return False
    return True


def original(checkpoint: Path, dtype: Any = torch.float32, experts_implementation: str | None = "eager") -> Any:
    """The model that transformers loads; with experts one by one, as packed ones are multiplied."""
    options = {"dtype": dtype, "experts_implementation": experts_implementation}
    return AutoModelForCausalLM.from_pretrained(checkpoint, **options).eval()


def _runs(model: Any) -> bool:
    try:
        logits(model)
    except RuntimeError:
        return False
    return True


def dense_twin(checkpoint: Path, artifact: Path) -> Any:
    """The original model, float32, with the weights that the artifact decodes to."""
    model = original(checkpoint)
    state = model.state_dict(keep_vars=True)
    matrices = {matrix.name: matrix for matrix in describe(open_checkpoint(checkpoint)).matrices}
    stored = open_artifact(artifact)
    for name, tensor in stored.tensors.items():
        if tensor.codec == RAW:
            target, weight = state[name], stored.read(name)
        elif tensor.codec == LOSSLESS:
            streams = stored.read(f"{name}.streams")
            target, weight = state[name], lossless.decode(streams, tensor.shape, TORCH_DTYPES[tensor.dtype])
        else:
            codec, matrix = get_codec(tensor.codec), matrices[name]
            buffers = {key: stored.read(f"{name}.{key}") for key in codec.layout(tensor.shape)}
            weight = codec.decode(Encoded(tensor.shape, buffers, tensor.exponent, 0.0, 0.0))
            target = state[matrix.parameter] if matrix.expert is None else state[matrix.parameter][matrix.expert]
            weight = weight.T if matrix.transposed else weight
        with torch.no_grad():
            target.copy_(weight.reshape(target.shape))
    return model


def token_ids() -> torch.Tensor:
    """int64 [2, 24], none of them special."""
    return torch.randint(16, SPECIAL, (2, 24), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    torch.manual_seed(0)  # Reformer hashes at random
    found: torch.Tensor = model(input_ids=token_ids(), use_cache=False).logits.float()
    return found


def generated(model: Any) -> tuple[torch.Tensor | None, str]:
    """A prompt of five tokens and six more, greedily, or why there are none."""
    torch.manual_seed(0)
    prompt = token_ids()[:, :5]
    try:
        found: torch.Tensor = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False
        )
    except Exception as error:  # each class has its own reasons
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return found, ""


def packed_share(plan: Any) -> float:
    """Share of the weights that are packed, of all that the artifact stores."""
    packed = sum(tensor.weights for tensor in plan.tensors if tensor.packed)
    return packed / (sum(t.weights for t in plan.tensors) + sum(math.prod(t.shape) for t in plan.kept))
