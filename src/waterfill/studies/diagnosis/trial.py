"""A tiny model through everything that makes tokens quick here, for `waterfill doctor`.

random Llama ──pack──► artifact ──┬── transformers, all tokens in one pass ──► logits, the plain way
                                  ├── transformers, token by token         ──► the same? by native layers?
                                  └── the engine                           ──► the same?
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from waterfill.base import native
from waterfill.base.errors import UnsupportedError, WaterfillError
from waterfill.files.architecture import describe
from waterfill.files.checkpoint import open_checkpoint
from waterfill.files.model_calls import output_cache, read
from waterfill.packing.pack import pack_plan
from waterfill.planning.budget import Budget
from waterfill.planning.measuring import measure_checkpoint
from waterfill.planning.options import ProbeOptions
from waterfill.planning.planner import Request, make_plan
from waterfill.running.engine.opening import open_model
from waterfill.running.hf import fused
from waterfill.running.loading import load

LARGEST_ERROR = 0.05  # of logits, relative; 8-bit activations that fall on the other side of a boundary leave 0.01
_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "dtype": "float32",
}
_PROMPT = [1, 31, 62, 93]
_NEW_TOKENS = 4
_CODEC = "higgs-p2-n16"


def run(ways: dict[str, str]) -> None:
    """Have every way make tokens, and note in `ways` how it went: "right", or why it is not taken here.

    The libraries' own errors are raised as they are.

    Raises:
        WaterfillError: a way should be taken and is not, or leads elsewhere.
    """
    with TemporaryDirectory(prefix="waterfill-") as folder:
        artifact = _packed(Path(folder))
        model = load(artifact)
        text, logits, past = _continued(model)
        with torch.inference_mode():
            plain = read(model, text)[0, len(_PROMPT) - 1 :]
        _compare("transformers, token by token,", logits, plain)
        ways["transformers"] = "right"
        if off := _turned_off():
            ways.update({"native layers": off, "engine": off})
            return
        if not fused.was_native(past):
            reason = fused.obstacle(model) or "nothing is known to be in the way"
            raise WaterfillError(f"decoder layers run one operator at a time, which is slower: {reason}")
        ways["native layers"] = "right"
        _compare("the engine", _by_engine(artifact, text[0].tolist()), plain)
        ways["engine"] = "right"


def _turned_off() -> str | None:
    """Why neither native layers nor the engine are to be expected here; None where they are."""
    if native.isa() is None:
        return native.why_not()
    return f"{native.FLOAT_ACTIVATIONS} is float" if native.float_activations() else None


def _packed(folder: Path) -> Path:
    """An artifact of random weights."""
    path, artifact = folder / "model", folder / "packed"
    path.mkdir()
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_CONFIG))
    random = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(tensor.shape, generator=random) * tensor.shape[-1] ** -0.5
        if tensor.ndim == 2
        else torch.ones(tensor.shape)
        for name, tensor in model.state_dict().items()
    }
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(_CONFIG), encoding="utf-8")
    checkpoint = open_checkpoint(path)
    architecture = describe(checkpoint)
    measured = measure_checkpoint(
        checkpoint, architecture, None, ProbeOptions(probe="random", sequences=2, length=8, cache=False)
    )
    plan = make_plan(path.name, architecture, measured, Budget(bits=5), Request(codecs=(_CODEC,), uniform=True))
    pack_plan(plan, checkpoint, architecture, artifact)
    return artifact


def _continued(model: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Of transformers' own loop: ids that were read `[1, tokens]`, logits `[new tokens, vocabulary]`, the cache."""
    ids = torch.tensor([_PROMPT])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=_NEW_TOKENS,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output.sequences[:, :-1], torch.cat(output.logits), output_cache(output)


def _by_engine(artifact: Path, text: list[int]) -> torch.Tensor:
    """The engine's logits `[new tokens, vocabulary]` of the same tokens."""
    try:
        sequence = open_model(artifact).sequence()
    except UnsupportedError as reason:
        raise WaterfillError(f"the engine does not run a small Llama: {reason}") from reason
    pieces = [text[: len(_PROMPT)], *([token] for token in text[len(_PROMPT) :])]
    return torch.cat([torch.from_numpy(sequence.forward(piece)) for piece in pieces])


def _compare(way: str, logits: torch.Tensor, plain: torch.Tensor) -> None:
    error = float((logits - plain).norm() / plain.norm())
    if not error <= LARGEST_ERROR:
        raise WaterfillError(f"{way} computes other logits of a small Llama than one pass does ({error:.0%} off)")
