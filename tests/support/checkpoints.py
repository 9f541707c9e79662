"""Checkpoints changed and described, for tests of what is read of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from waterfill.base.errors import CheckpointError
from waterfill.files.architecture import Architecture, describe
from waterfill.files.checkpoint import Checkpoint, open_checkpoint


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]) -> None:
    file = path / "model.safetensors"
    save_file(dict(change(load_file(file))), file, {"format": "pt"})


def described(path: Path, **options: Any) -> tuple[Checkpoint, Architecture]:
    checkpoint = open_checkpoint(path)
    return checkpoint, describe(checkpoint, **options)


def failure(path: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        described(path, **options)
    message = str(caught.value)
    assert "; " in message, "what was given; what to do"
    assert not message.endswith(".")
    return message
