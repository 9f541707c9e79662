"""The stages of a streamed pass, as benchmarks time them one by one: nothing of the model is changed by that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import waterfill
from tests.support import models, streams
from tests.support.plans import plan_for
from waterfill.planning.budget import Budget

measure: Any = pytest.importorskip("benchmarks.streaming.measure", reason="benchmarks/ is not here")

pytestmark = pytest.mark.usefixtures("no_reader_left")


@torch.inference_mode()
def logits(model: Any, tokens: int) -> torch.Tensor:
    found: torch.Tensor = model(torch.arange(tokens)[None], use_cache=False).logits
    return found


@pytest.mark.parametrize("keep", [streams.nothing, streams.mixed, streams.decoded])
def test_stages_are_timed_and_the_model_stays_as_it_was(keep: streams.Keep, tmp_path: Path) -> None:
    checkpoint = models.tiny_llama(tmp_path / "model")
    plan = plan_for(checkpoint, codecs=["trellis-s8-r3.0000"], budget=Budget(bits=16.0), uniform=True)
    waterfill.pack(checkpoint, tmp_path / "packed", plan=plan)
    model = streams.load(tmp_path / "packed", keep)
    before = logits(model, 9)
    stages = measure.measure_stages(model.streaming, lambda: logits(model, 1), alone_s=0.0)
    assert set(stages) == {"read_s", "decode_s", "compute_s"}
    assert stages["compute_s"] > 0
    assert [stages[name] > 0 for name in ("read_s", "decode_s")] == [keep is not streams.decoded] * 2
    assert torch.equal(logits(model, 9), before)
