"""The names by which transformers hands a cache around, in the conventions of each range of its versions."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel, LlamaForCausalLM, MambaForCausalLM, RwkvForCausalLM

from tests.support.layer_calls import LAYER_CALLS
from waterfill.files.model_calls import CACHE_NAMES, cache_argument, handed_cache, output_cache, read, read_on

MODEL_CALLS = {
    "to 5.23": "past_key_values",
    "state spaces to 5.23": "cache_params",
    "from 5.24": "cache",
    "RWKV": "state",
}
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


@pytest.mark.parametrize("names", LAYER_CALLS.values(), ids=LAYER_CALLS)
def test_a_layer_s_cache_is_found(names: tuple[str, ...]) -> None:
    cache = object()
    call = {name: cache if name in CACHE_NAMES else None for name in names}
    assert handed_cache(call) == (True, cache)
    assert handed_cache(dict.fromkeys(names)) == (True, None), "there is to be no cache"
    assert handed_cache({name: None for name in names if name not in CACHE_NAMES}) == (False, None)


class Toy:
    """Logits are sums over the text so far, which only a cache, or the whole text, can tell."""

    def __init__(self) -> None:
        self.seen: list[int] = []  # tokens of each pass

    def forward(self, input_ids: torch.Tensor, **given: Any) -> Any:
        self.seen.append(input_ids.shape[1])
        before = next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)
        sums = input_ids.cumsum(1) + (0 if before is None else before["sum"])
        kept = {name: {"sum": sums[:, -1:]} for name in CACHE_NAMES if name in given and given["use_cache"]}
        return SimpleNamespace(logits=sums[..., None], **kept)

    def __call__(self, *args: Any, **given: Any) -> Any:
        inspect.signature(type(self).forward).bind(self, *args, **given)  # refuses what the class does not take
        return self.forward(*args, **given)


def toy(*names: str) -> Toy:
    """Of a class whose forward takes these arguments."""

    def forward(self: Toy, input_ids: torch.Tensor, **given: Any) -> Any:
        return Toy.forward(self, input_ids, **given)

    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", "input_ids")]
    parameters += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    made: Toy = type("OfOneConvention", (Toy,), {"forward": forward})()
    return made


@pytest.mark.parametrize("name", MODEL_CALLS.values(), ids=MODEL_CALLS)
def test_a_text_is_continued_through_the_model_s_cache(name: str) -> None:
    model = toy("use_cache", name)
    assert cache_argument(type(model)) == name
    first, past = read_on(model, IDS[:, :2])
    then, past = read_on(model, IDS[:, 2:3], past)
    last, _ = read_on(model, IDS[:, 3:], past)
    assert model.seen == [2, 1, 2]
    assert torch.equal(torch.cat([first, then, last], 1), read(model, IDS))


@pytest.mark.parametrize("names", [(), ("use_cache",), ("attention_mask",), ("cache",)])
def test_a_model_that_keeps_no_cache_reads_the_text_again(names: tuple[str, ...]) -> None:
    """Among them one with an argument `cache` that is no cache of keys and values, and is not given back."""
    model = toy(*names)
    if "cache" in names:
        model = toy("use_cache", "cache")
        model.forward = lambda input_ids, **_: Toy.forward(model, input_ids)  # type: ignore[method-assign]
    first, past = read_on(model, IDS[:, :2])
    then, past = read_on(model, IDS[:, 2:3], past)
    last, _ = read_on(model, IDS[:, 3:], past)
    assert model.seen == [2, 3, 5]
    assert torch.equal(torch.cat([first, then, last], 1), read(model, IDS))


@pytest.mark.parametrize("model_class", [LlamaForCausalLM, GPT2LMHeadModel, MambaForCausalLM, RwkvForCausalLM])
def test_the_installed_transformers_uses_a_known_name(model_class: Any) -> None:
    assert cache_argument(model_class) in MODEL_CALLS.values()


def test_what_a_generation_returns() -> None:
    assert [output_cache({"logits": 1, name: 2}) for name in CACHE_NAMES] == [2] * len(CACHE_NAMES)
    assert output_cache({"logits": 1}) is None
