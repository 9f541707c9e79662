"""Model classes that lack what others have: measured all the same, or refused in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import waterfill
from tests.support import family_check
from waterfill.base.errors import WaterfillError
from waterfill.planning import measuring

PROBE: Any = {"sequences": 2, "length": 8}


def test_a_head_that_comes_before_the_embedding_it_is_tied_to(tmp_path: Path) -> None:
    family_check.build("camembert", tmp_path)
    found = waterfill.sensitivity(tmp_path, **PROBE).tensors["roberta.embeddings.word_embeddings"]
    assert found.alpha > 0 < found.beta


def test_what_a_class_cannot_do_is_said_with_what_else_to_do(tmp_path: Path) -> None:
    family_check.build("reformer", tmp_path)
    with pytest.raises(WaterfillError, match=r"ReformerModelWithLMHead fails at being measured by fisher \(.*--method"):
        waterfill.sensitivity(tmp_path, probe="random", **PROBE)


def test_errors_of_our_own_stay_what_they_are(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a mistake")

    monkeypatch.setattr(measuring, "one_pass", broken)
    with pytest.raises(ZeroDivisionError):
        waterfill.sensitivity(llama, probe="random", **PROBE)
