"""A cache that grows in place gives the logits of one that concatenates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache, DynamicLayer

from tests.support.models import tiny_gpt_oss, tiny_llama
from waterfill.files.growing_cache import reserve
from waterfill.files.model_calls import read_on

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5]])


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt_oss])
@pytest.mark.parametrize("room", [12, 5])
@torch.no_grad()
def test_the_same_logits(build: Any, room: int, tmp_path: Path) -> None:
    """Also beyond what was reserved, and beside layers with windows."""
    model = AutoModelForCausalLM.from_pretrained(build(tmp_path / "model"), dtype=torch.float32).eval()
    _, plain = read_on(model, IDS[:, :2])
    _, grown = read_on(model, IDS[:, :2])
    reserve(grown, room)
    assert any(type(layer) is not DynamicLayer for layer in grown.layers)
    memory = set()
    for place in range(2, 12):
        expected, plain = read_on(model, IDS[:, place : place + 1], plain)
        found, grown = read_on(model, IDS[:, place : place + 1], grown)
        torch.testing.assert_close(found, expected)
        memory.add(grown.layers[-1].keys.data_ptr())
    assert grown.get_seq_length() == 12
    assert (len(memory) == 1) == (room == 12)


def test_caches_of_other_kinds_stay_as_they_are() -> None:
    class Own(DynamicCache):  # type: ignore[misc]
        pass

    cache = Own()
    cache.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), 0)
    for other in (cache, None, {"keys": 1}, IDS):
        reserve(other, 9)
    assert type(cache.layers[0]) is DynamicLayer
