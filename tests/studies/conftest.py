"""What the tests of studies share: a tiny model to compare methods on, and a packed model to report on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import waterfill
from tests.support import models
from tests.support.comparisons import CONTEXT
from tests.support.plans import sensitivity_of
from waterfill import api
from waterfill.files.architecture import describe
from waterfill.files.artifact import open_artifact
from waterfill.files.checkpoint import open_checkpoint
from waterfill.studies.comparison import Row, StudiedModel
from waterfill.studies.report import Report, gather


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> StudiedModel:
    """A tiny Llama with rows of 256, with made-up sensitivities."""
    path = models.tiny_llama(tmp_path_factory.mktemp("compare") / "llama", hidden=256, intermediate=256)
    checkpoint = open_checkpoint(path)
    architecture = describe(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    calibration = torch.randint(0, 60, (2, 32), generator=torch.Generator().manual_seed(1))
    measured = replace(sensitivity_of(architecture), fingerprint=checkpoint.fingerprint)
    return StudiedModel("tiny", checkpoint, architecture, model, measured, calibration)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 60, (CONTEXT * 4,), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def report(work: Path) -> Report:
    """Facts of the packed example model, from the artifact alone."""
    path = work / "packed"
    config = json.loads((path / "config.json").read_text())
    return gather(open_artifact(path, verify=False), api.read_plan(path), config)


@pytest.fixture(scope="module")
def full(report: Report, work: Path, ref_llama: Path) -> Report:
    """The same with everything else that there can be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WATERFILL_CACHE", str(work / "no-cache"))
        made = waterfill.report(
            work / "packed",
            output=work / "full.html",
            original=ref_llama,
            text=work / "text.py",
            context=64,
            max_windows=9,
            prompts=["def f(", "The"],
            max_new_tokens=6,
        )
    row = Row("hqq-4", "HQQ 4 bits", "hqq", "1", False, 3_800_000, 4.5, 0.006, 0.0001, 0.9, 50.0, 44.0)
    best = replace(row, method="waterfill", title="waterfill", family="waterfill", predicted_kl=0.0001)
    return replace(made, peers=(row,), ours=(best,))
