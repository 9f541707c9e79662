"""Decoder layers as one native call, against the same layers module by module: logits, caches, and when to stand back.

Both sides multiply the same packed matrices with the same integers, so that they differ by the rounding of float sums,
and where that moves an activation across a rounding boundary, by one step of 127.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    StaticCache,
)

from tests.files.test_model_calls import LAYER_CALLS
from waterfill import kernels
from waterfill.base import native
from waterfill.codecs import Higgs, get_codec
from waterfill.files.model_calls import cache_argument, read_on
from waterfill.kernels.layer import DecoderLayer
from waterfill.running.hf import fused
from waterfill.running.hf.fused import FusedLayer, fuse
from waterfill.running.hf.packed import PackedMatrix, pack_linear

pytestmark = pytest.mark.skipif(native.isa() is None, reason="the native library was not built, or is switched off")

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "llama with biases": lambda: LlamaConfig(**SHAPE, attention_bias=True),
    "llama, one head of keys": lambda: LlamaConfig(**{**SHAPE, "num_key_value_heads": 1}),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=24),
}
CODECS = ("higgs-p1-n16", "higgs-p2-n64", "higgs-p1-n256", "higgs-p4-n256")
PROMPT, TOKENS = 5, 9


def packed_model(config: Any, dtype: torch.dtype = torch.float32, fuse_layers: bool = True) -> Any:
    """A random model whose linear layers are packed, each with another codec, and arranged."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms are ones and biases zeros, which would hide mistakes
                parameter.copy_(torch.rand_like(parameter) + (0.5 if "norm" in name else -0.5))
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for i, module in enumerate(linears):
        pack(module, get_codec(CODECS[i % len(CODECS)]))
    for module in model.modules():
        if isinstance(module, PackedMatrix):
            module.arrange()
    if fuse_layers:
        fuse(model)
    return model.to(dtype)


def pack(module: nn.Linear, codec: Any) -> None:
    assert isinstance(codec, Higgs)
    weight = module.weight.detach().clone()
    encoded = codec.encode(weight, exponent=0)
    packed = pack_linear(module)
    packed.attach(codec, (weight.shape[0], weight.shape[1]), 0, torch.float32)
    packed.scales, packed.codes = encoded.buffers["scales"], encoded.buffers["codes"]


@pytest.fixture(autouse=True)
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was logged about layers that run one operator at a time, as in a process that has said nothing yet."""
    fused._say.cache_clear()
    caplog.set_level(logging.INFO, "waterfill.kernels")
    begin = "decoder layers run one operator at a time, which is slower: "
    return lambda: [m.removeprefix(begin) for m in caplog.messages if m.startswith(begin)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Positions that went through the native layer, in order."""
    seen: list[int] = []
    original = DecoderLayer.__call__

    def counted(self: Any, hidden: Any, rotary: Any, keys: Any, values: Any, position: int) -> Any:
        seen.append(position)
        return original(self, hidden, rotary, keys, values, position)

    monkeypatch.setattr(DecoderLayer, "__call__", counted)
    return seen  # type: ignore[return-value]


@torch.inference_mode()
def decode(model: Any, cache: Any = None, tokens: int = TOKENS, **given: Any) -> tuple[torch.Tensor, Any]:
    """Logits `[tokens, vocabulary]` of tokens that follow a prompt one by one, and the cache."""
    ids = torch.arange(PROMPT + tokens).unsqueeze(0) * 31 % SHAPE["vocab_size"]
    _, cache = read_on(model, ids[:, :PROMPT], cache)
    steps = [step(model, ids[:, i : i + 1], cache, **given).logits for i in range(PROMPT, PROMPT + tokens)]
    return torch.cat([logits[0] for logits in steps]).float(), cache


def step(model: Any, ids: Any, cache: Any, **given: Any) -> Any:
    return model(ids, **{str(cache_argument(type(model))): cache}, **given)


def close(found: torch.Tensor, expected: torch.Tensor, share: float = 0.02) -> bool:
    return bool((found - expected).abs().max() <= share * expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_as_module_by_module(
    family: str, dtype: torch.dtype, calls: list[int], lines: Callable[[], list[str]]
) -> None:
    config = FAMILIES[family]()
    logits, cache = decode(packed_model(config, dtype))
    layers = SHAPE["num_hidden_layers"]
    assert calls == [position for position in range(PROMPT, PROMPT + TOKENS) for _ in range(layers)]
    expected, own_cache = decode(packed_model(config, dtype, fuse_layers=False))
    share = 0.02 if dtype == torch.float32 else 0.08
    assert close(logits, expected, share)
    for found, known in zip(cache.layers, own_cache.layers, strict=True):
        assert found.keys.shape == known.keys.shape
        assert close(found.keys.float(), known.keys.float(), share)
        assert close(found.values.float(), known.values.float(), share)
    assert lines() == []


@pytest.mark.parametrize("names", LAYER_CALLS.values(), ids=LAYER_CALLS)
@torch.inference_mode()
def test_a_layer_called_as_each_transformers_does(
    names: tuple[str, ...], calls: list[int], lines: Callable[[], list[str]]
) -> None:
    model = packed_model(FAMILIES["llama"]())
    _, cache = decode(model, tokens=1)
    expected = decode(model, tokens=2)[1].layers[0]
    calls.clear()
    hidden = model.model.embed_tokens(torch.tensor([[(PROMPT + 1) * 31 % SHAPE["vocab_size"]]]))
    place = torch.tensor([[PROMPT + 1]])
    known = {"position_ids": place, "cache_position": place[0], "use_cache": True, "attention_mask": None}
    rotary = model.model.rotary_emb(hidden, place)
    out = model.model.layers[0](hidden, position_embeddings=rotary, **{name: known.get(name, cache) for name in names})
    assert out.shape == hidden.shape
    assert calls == [PROMPT + 1]
    assert torch.equal(cache.layers[0].keys, expected.keys)
    assert lines() == []


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


def test_a_cache_grows_past_its_first_room(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    config = FAMILIES["llama"]()
    plain, _ = decode(packed_model(config))
    monkeypatch.setattr(fused, "_FIRST_CAPACITY", PROMPT + 2)
    logits, cache = decode(packed_model(config))
    assert torch.equal(logits, plain)
    assert cache.get_seq_length() == PROMPT + TOKENS


def test_a_cropped_cache_goes_on_from_there(calls: list[int]) -> None:
    model = packed_model(FAMILIES["llama"]())
    logits, cache = decode(model)
    cache.crop(-3)
    with torch.inference_mode():
        ids = torch.arange(PROMPT + TOKENS).unsqueeze(0) * 31 % SHAPE["vocab_size"]
        again = step(model, ids[:, -3:-2], cache).logits[0].float()
    assert torch.equal(again, logits[-3:-2])


def test_a_copied_cache_is_a_branch_of_its_own() -> None:
    """What one branch writes must not appear in the other, though their tensors began in one buffer."""
    model = packed_model(FAMILIES["llama"]())
    _, cache = decode(model)
    branch = copy.deepcopy(cache)
    with torch.inference_mode():
        step(model, torch.tensor([[3]]), cache)
        step(model, torch.tensor([[7]]), branch)
    assert not torch.equal(cache.layers[0].keys[:, :, -1], branch.layers[0].keys[:, :, -1])
    assert torch.equal(cache.layers[0].keys[:, :, :-1], branch.layers[0].keys[:, :, :-1])


def test_long_contexts_share_the_heads_among_threads(calls: list[int]) -> None:
    """Beyond some thousand positions attention runs on several threads."""
    config = LlamaConfig(**{**SHAPE, "max_position_embeddings": 4096})
    ids = torch.arange(1200).unsqueeze(0) * 31 % SHAPE["vocab_size"]

    @torch.inference_mode()
    def last(model: Any) -> torch.Tensor:
        _, cache = read_on(model, ids[:, :-1])
        return read_on(model, ids[:, -1:], cache)[0][0].float()

    assert close(last(packed_model(config)), last(packed_model(config, fuse_layers=False)))
    assert calls == [1199] * SHAPE["num_hidden_layers"]


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


def test_hidden_states_are_those_after_each_layer(calls: list[int]) -> None:
    model, plain = (packed_model(FAMILIES["llama"](), fuse_layers=wanted) for wanted in (True, False))
    states = []
    for one in (model, plain):
        _, cache = decode(one, tokens=1)
        with torch.inference_mode():
            output = step(one, torch.tensor([[5]]), cache, output_hidden_states=True)
        states.append(output.hidden_states)
    assert len(states[0]) == len(states[1]) == SHAPE["num_hidden_layers"] + 1
    assert all(close(found, known) for found, known in zip(*states, strict=True))


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


def test_after_a_change_of_dtype_the_layer_is_looked_at_again(calls: list[int]) -> None:
    model = packed_model(FAMILIES["llama"]())
    decode(model, tokens=1)
    calls.clear()
    logits, _ = decode(model.to(torch.bfloat16))
    assert len(calls) == TOKENS * SHAPE["num_hidden_layers"]
    assert torch.equal(logits, decode(packed_model(FAMILIES["llama"](), torch.bfloat16))[0])


def test_changed_norms_are_seen(calls: list[int]) -> None:
    model = packed_model(FAMILIES["llama"]())
    before, _ = decode(model)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.mul_(3)
    assert not close(decode(model)[0], before)


def test_a_copied_model_has_layers_of_its_own(calls: list[int]) -> None:
    model = packed_model(FAMILIES["llama"]())
    logits, _ = decode(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.zero_()
    assert torch.equal(decode(twin)[0], logits)


def test_a_fused_layer_is_still_the_models_own_class() -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    layer = packed_model(FAMILIES["llama"]()).model.layers[0]
    assert isinstance(layer, LlamaDecoderLayer)
    assert isinstance(layer, FusedLayer)


def test_generate_goes_through_the_native_layers(calls: list[int]) -> None:
    model = packed_model(FAMILIES["llama"]())
    ids = torch.tensor([[1, 2, 3]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 7)
    assert calls == [position for position in (3, 4, 5) for _ in range(SHAPE["num_hidden_layers"])]


def test_the_first_room_is_not_taken_for_the_models_cache() -> None:
    """A dynamic cache's own tensors are contiguous; after a fused step they are views of a larger buffer."""
    model = packed_model(FAMILIES["llama"]())
    _, cache = decode(model, DynamicCache(config=model.config), tokens=1)
    keys = cache.layers[0].keys
    assert keys.shape[2] == PROMPT + 1
    assert keys.stride(1) == fused._FIRST_CAPACITY * keys.shape[3]
    assert kernels.implementation() != kernels.STORED
