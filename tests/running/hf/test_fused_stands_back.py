"""When decoder layers stand back and run one operator at a time: for a call, for a model, and what is said of it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    LlamaConfig,
    MistralConfig,
    StaticCache,
)

from tests.support.fused_samples import FAMILIES, PROMPT, SHAPE, close, decode, needs_layers, packed_model, step
from waterfill.files.model_calls import read_on
from waterfill.running.hf import fused
from waterfill.running.hf.fused import fuse

pytestmark = [needs_layers, pytest.mark.usefixtures("lines")]


@torch.inference_mode()
def test_a_call_that_is_not_known_is_said_and_runs_as_it_always_did(
    calls: list[int], lines: Callable[[], list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    model = packed_model(FAMILIES["llama"]())
    _, cache = decode(model, tokens=1)
    calls.clear()
    hidden = torch.randn(1, 1, SHAPE["hidden_size"])
    rotary = model.model.rotary_emb(hidden, torch.tensor([[PROMPT + 1]]))
    for layer in model.model.layers:
        for _ in range(2):
            assert layer(hidden, position_embeddings=rotary, keys_and_values=cache).shape == hidden.shape
    assert calls == []
    (line,) = lines()
    assert (
        line
        == f"transformers {transformers.__version__} hands them no cache or past_key_values with position_embeddings"
    )
    assert caplog.records[-1].levelname == "WARNING"
    assert fused.obstacle(model) == line


def test_parts_of_other_names_are_said(
    lines: Callable[[], list[str]], calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a transformers whose caches have their layers elsewhere: what is asked of them is not there."""
    model = packed_model(FAMILIES["llama"]())

    def absent(layer: Any) -> None:
        raise AttributeError("'LlamaAttention' object has no attribute 'scaling'")

    monkeypatch.setattr(fused, "_look_at", absent)
    logits, _ = decode(model, tokens=2)
    assert torch.equal(logits, decode(packed_model(FAMILIES["llama"](), fuse_layers=False), tokens=2)[0])
    (line,) = lines()
    assert line.endswith("has other names for parts of them ('LlamaAttention' object has no attribute 'scaling')")
    assert calls == []


def gelu(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.GELU()


def adapted(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    mlp.up_proj = nn.Sequential(mlp.up_proj)


OBSTACLES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], str]] = {
    "window": (lambda: MistralConfig(**SHAPE, sliding_window=99), lambda _: None, "window|DynamicSlidingWindowLayer"),
    "biases": (lambda: LlamaConfig(**SHAPE, mlp_bias=True), lambda _: None, "they have biases of gate_proj, up_proj"),
    "activation": (FAMILIES["llama"], gelu, "their activation function is GELU"),
    "adapter": (FAMILIES["llama"], adapted, "the matrix up_proj of one is a Sequential, not packed"),
    "half": (FAMILIES["llama"], lambda model: model.to(torch.float16), "their activations are torch.float16"),
}


@pytest.mark.parametrize(("config", "change", "reason"), OBSTACLES.values(), ids=OBSTACLES)
def test_what_is_in_the_way_is_said_once(
    config: Callable[[], Any], change: Callable[[Any], Any], reason: str, lines: Callable[[], list[str]]
) -> None:
    model = packed_model(config())
    change(model)
    decode(model, tokens=2)
    decode(model, tokens=2)
    (line,) = lines()
    assert re.search(reason, line)
    assert fused.obstacle(model) == line


def test_another_class_of_layers_is_said(lines: Callable[[], list[str]]) -> None:
    """A transformers whose Llama has layers of another name."""
    model = nn.Sequential(nn.Linear(2, 2))
    model.config = LlamaConfig(**SHAPE)  # type: ignore[assignment]
    fuse(model)
    assert lines() == [f"transformers {transformers.__version__} has no LlamaDecoderLayer"]


@torch.inference_mode()
def test_what_nobody_expects_to_be_quick_is_not_mentioned(
    lines: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = packed_model(FAMILIES["llama"]())
    model(torch.tensor([[1]]), use_cache=False)  # without a cache
    model(torch.tensor([[1]]), use_cache=True)  # the first token of a text
    _, cache = read_on(model, torch.tensor([[1, 2], [3, 4]]))  # a prompt, a batch
    read_on(model, torch.tensor([[5], [6]]), cache)
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    decode(model, tokens=1)
    decode(model, tokens=1, attention_mask=torch.tensor([[1, 0, *[1] * (PROMPT - 1)]]))
    monkeypatch.setenv("WATERFILL_ACTIVATIONS", "float")
    decode(model, tokens=1)
    assert lines() == []


@torch.inference_mode()
def test_a_batch_runs_as_it_always_did(calls: list[int]) -> None:
    model = packed_model(FAMILIES["llama"]())
    _, cache = read_on(model, torch.tensor([[1, 2], [3, 4]]))
    read_on(model, torch.tensor([[5], [6]]), cache)
    assert calls == []


def test_a_mask_is_respected(calls: list[int]) -> None:
    model, plain = (packed_model(FAMILIES["llama"](), fuse_layers=wanted) for wanted in (True, False))
    mask = torch.ones(1, PROMPT + 1, dtype=torch.int64)
    mask[0, 1] = 0
    logits, _ = decode(model, tokens=1, attention_mask=mask)
    assert calls == []
    assert torch.equal(logits, decode(plain, tokens=1, attention_mask=mask)[0])


def test_attentions_can_still_be_asked_for(calls: list[int]) -> None:
    model = packed_model(FAMILIES["llama"]())
    model.set_attn_implementation("eager")
    _, cache = decode(model, tokens=1)
    with torch.inference_mode():
        output = step(model, torch.tensor([[5]]), cache, output_attentions=True)
    assert len(output.attentions) == SHAPE["num_hidden_layers"]
    assert all(attention is not None for attention in output.attentions)


def test_another_cache_is_left_to_the_model(calls: list[int], lines: Callable[[], list[str]]) -> None:
    config = FAMILIES["llama"]()
    logits, _ = decode(packed_model(config), StaticCache(config=config, max_cache_len=64))
    assert calls == []
    assert lines() == [], "whoever takes one knows"
    assert close(logits, decode(packed_model(config))[0])


def test_hooks_inside_a_layer_are_called(calls: list[int]) -> None:
    model = packed_model(FAMILIES["llama"]())
    seen = []
    model.model.layers[1].self_attn.register_forward_hook(lambda *_: seen.append(1))
    decode(model, tokens=2)
    assert len(seen) == 3  # the prompt and two tokens
    assert len(calls) == 2 * (SHAPE["num_hidden_layers"] - 1)


def test_an_exchanged_projection_is_used(calls: list[int]) -> None:
    """As adapters do: the layer is not what it was looked at as any more."""
    model = packed_model(FAMILIES["llama"]())
    decode(model, tokens=1)
    calls.clear()

    class Adapter(nn.Module):
        def __init__(self, base: Any) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.base(x)

    mlp = model.model.layers[0].mlp
    mlp.up_proj = Adapter(mlp.up_proj)
    decode(model, tokens=1)
    assert len(calls) == SHAPE["num_hidden_layers"] - 1


def test_gradients_run_as_they_always_did(calls: list[int], lines: Callable[[], list[str]]) -> None:
    model = packed_model(FAMILIES["llama"]())
    _, cache = decode(model, tokens=1)
    calls.clear()
    hidden = torch.randn(1, 1, SHAPE["hidden_size"], requires_grad=True)
    step(model, None, copy.deepcopy(cache), inputs_embeds=hidden).logits.sum().backward()
    assert calls == lines() == []
    assert hidden.grad is not None


def test_float_activations_run_module_by_module(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATERFILL_ACTIVATIONS", "float")
    decode(packed_model(FAMILIES["llama"]()), tokens=1)
    assert calls == []


def test_a_sliding_window_runs_as_it_always_did(calls: list[int]) -> None:
    decode(packed_model(MistralConfig(**SHAPE, sliding_window=4)))
    assert calls == []
