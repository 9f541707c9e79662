"""What the caller has set in torch changes no plan and no measurement, and is as it was afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import waterfill
from tests.support.models import tiny_llama
from waterfill.planning.plan import Plan

QUICK: dict[str, Any] = {
    "sequences": 2,
    "length": 12,
    "codecs": ("higgs-p1-n4", "higgs-p1-n16"),
    "bits": 3.0,
    "keep": ("*.self_attn.*", "*embed_tokens*", "lm_head*"),
}


@contextmanager
def setting(change: Callable[[Any], Any], value: Any, usual: Any) -> Iterator[None]:
    change(value)
    try:
        yield
    finally:
        change(usual)


def set_device(device: str | None) -> None:
    torch.set_default_device(device)
    if device is None:
        vars(torch._GLOBAL_DEVICE_CONTEXT).pop("device_context", None)  # torch 2.6 stumbles over the None in it


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "set_grad_enabled": lambda: setting(torch.set_grad_enabled, False, True),
    "default dtype": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "default device": lambda: setting(set_device, "meta", None),
    "device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "deterministic": lambda: setting(torch.use_deterministic_algorithms, True, False),
}


def state() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.empty(0).device,
        torch.is_autocast_enabled("cpu"),
        torch.are_deterministic_algorithms_enabled(),
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"), layers=1)


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, Plan]:
    return {method: waterfill.plan(model, method=method, **QUICK) for method in ("fisher", "perturb")}


@pytest.mark.parametrize(
    ("mode", "method"), [*((mode, "fisher") for mode in MODES), ("default dtype", "perturb"), ("autocast", "perturb")]
)
def test_plans(mode: str, method: Any, model: Path, expected: dict[str, Plan]) -> None:
    with MODES[mode]():
        before = state()
        assert waterfill.plan(model, method=method, **QUICK) == expected[method]
        assert state() == before


@pytest.mark.parametrize("mode", ["inference_mode", "default dtype", "device", "autocast"])
def test_artifacts_and_evaluations(
    mode: str, model: Path, expected: dict[str, Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def results() -> tuple[bytes, Any]:
        waterfill.pack(model, tmp_path / "out", plan=expected["fisher"], overwrite=True)
        found = waterfill.evaluate(tmp_path / "out", text=Path(__file__), context=32, max_windows=2, cache=False)
        return (tmp_path / "out" / "model.safetensors").read_bytes(), found

    monkeypatch.setattr("waterfill.evaluation.evaluate.agreed_ids", lambda *_: torch.arange(100, device="cpu") % 256)
    usual = results()
    with MODES[mode]():
        assert results() == usual
