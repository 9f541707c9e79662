"""What `pack` refuses: to cover what is not its own, a plan for other weights, and weights that are no numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import waterfill
from tests.support import models
from tests.support.artifact_samples import directory_bytes
from tests.support.plans import QUICK, plan_for, weight_bytes
from waterfill import api
from waterfill.base.errors import ArtifactError, CheckpointError, WaterfillError
from waterfill.planning.budget import Budget

# ------------------------------------------------------------------------------------------------- where it may write


def test_an_artifact_is_replaced_only_when_asked(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    waterfill.pack(llama, out, plan=plan_for(llama, budget=Budget(bits=5)))
    before = directory_bytes(out)
    smaller = plan_for(llama, budget=Budget(bits=3))
    with pytest.raises(ArtifactError, match=r"out exists already; .* or allow overwriting \(--overwrite\)"):
        waterfill.pack(llama, out, plan=smaller)
    assert directory_bytes(out) == before
    waterfill.pack(llama, out, plan=smaller, overwrite=True)
    assert weight_bytes(out) == smaller.size_bytes < len(before["model.safetensors"])


@pytest.mark.parametrize("name", ["home", "home/thesis.tex"])
def test_nothing_else_is_replaced_and_nothing_measured_before_that_is_known(
    name: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    monkeypatch.delattr(api, "open_checkpoint")
    with pytest.raises(ArtifactError, match=r"is not a packed model .* give another output"):
        waterfill.pack(llama, tmp_path / name, bits=4, overwrite=True)
    with pytest.raises(ArtifactError, match="exists already"):
        waterfill.pack(llama, tmp_path / name, bits=4)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_empty_directory_may_be_filled(overwrite: bool, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    plan = waterfill.pack(llama, tmp_path / "out", bits=4, overwrite=overwrite, **QUICK)
    assert weight_bytes(tmp_path / "out") == plan.size_bytes
    assert not (tmp_path / "out.partial").exists()


# ------------------------------------------------------------------------------------------------- weights and plans


def poison(checkpoint: Path, name: str, value: float) -> None:
    """Change one weight where the fingerprint takes no sample."""
    weights = load_file(checkpoint / "model.safetensors")
    weights[name].view(-1)[3000] = value
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("planned", [True, False])
def test_a_weight_that_is_no_number_is_refused_by_name(
    value: float, planned: bool, llama: Path, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    plan = plan_for(llama, budget=Budget(bits=5))
    poison(llama, name, value)
    options: Any = {"plan": plan} if planned else {"bits": 5, **QUICK}
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor '{name}' holds 1 NaN or Inf"):
        waterfill.pack(llama, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_plan_is_for_its_own_weights_only(llama: Path, tmp_path: Path) -> None:
    plan = plan_for(llama, budget=Budget(bits=5))
    other = models.tiny_llama(tmp_path / "other", seed=1)
    with pytest.raises(WaterfillError, match=r"made for other weights .* make a new plan"):
        waterfill.pack(other, tmp_path / "out", plan=plan)
    assert not (tmp_path / "out").exists()


def test_a_plan_goes_with_no_options_of_its_own(llama: Path, tmp_path: Path) -> None:
    plan = plan_for(llama, budget=Budget(bits=5))
    for options in ({"size": "1MB"}, {"bits": 0.0}, {"keep": ["*"]}, {"seed": 0}):
        with pytest.raises(WaterfillError, match="either a plan or the options for one"):
            waterfill.pack(llama, tmp_path / "out", plan=plan, **options)


def test_a_packed_model_is_not_packed_again(llama: Path, tmp_path: Path) -> None:
    waterfill.pack(llama, tmp_path / "out", plan=plan_for(llama, budget=Budget(bits=5)))
    with pytest.raises(CheckpointError, match="already packed by waterfill"):
        waterfill.pack(tmp_path / "out", tmp_path / "again", bits=3)
