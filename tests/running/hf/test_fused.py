"""Decoder layers as one native call, against the same layers module by module: logits, caches, changes of the model.

Both sides multiply the same packed matrices with the same integers, so that they differ by the rounding of float sums,
and where that moves an activation across a rounding boundary, by one step of 127.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
)

from tests.support.fused_samples import FAMILIES, PROMPT, SHAPE, TOKENS, close, decode, needs_layers, packed_model, step
from tests.support.layer_calls import LAYER_CALLS
from waterfill import kernels
from waterfill.files.model_calls import read_on
from waterfill.running.hf import fused
from waterfill.running.hf.fused import FusedLayer

pytestmark = [needs_layers, pytest.mark.usefixtures("lines")]


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
