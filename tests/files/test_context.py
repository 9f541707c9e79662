"""A model's context length, under whatever name its configuration has it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import transformers

from waterfill.files.context import context_length


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Llama", {"max_position_embeddings": 96}),
        ("GPT2", {"n_positions": 96}),
        ("OpenAIGPT", {"n_positions": 96}),
        ("CTRL", {"n_positions": 96}),
        ("Mpt", {"max_seq_len": 96}),
    ],
)
def test_it_is_found_under_every_name(kind: str, settings: dict[str, Any]) -> None:
    assert context_length(getattr(transformers, f"{kind}Config")(**settings)) == 96


def test_a_model_of_images_and_text_has_that_of_its_text() -> None:
    text = transformers.LlamaConfig(max_position_embeddings=96)
    assert context_length(transformers.LlavaConfig(text_config=text)) == 96
    assert context_length(SimpleNamespace(get_text_config=lambda: text, max_position_embeddings=7)) == 96


@pytest.mark.parametrize("stated", [{}, {"max_position_embeddings": None}, {"max_position_embeddings": 0}])
def test_none_is_stated(stated: dict[str, Any]) -> None:
    assert context_length(SimpleNamespace(**stated)) is None
    assert context_length(transformers.BloomConfig()) is None
    assert context_length(SimpleNamespace(**stated, n_ctx=12)) == 12
