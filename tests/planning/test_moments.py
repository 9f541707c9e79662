"""Second moments of inputs: of a model that is read block by block they are those of the model in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support import models
from waterfill.files.architecture import describe
from waterfill.files.blockwise import load_blockwise
from waterfill.files.checkpoint import open_checkpoint
from waterfill.files.original import load_original
from waterfill.planning.moments import second_moments


@pytest.mark.parametrize("family", ["llama", "gemma", "deepseek_v3"])
def test_moments_block_by_block(family: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(getattr(models, f"tiny_{family}")(tmp_path))
    architecture, tokens = describe(checkpoint), torch.arange(40).view(2, 20)
    blockwise = load_blockwise(checkpoint, torch.float32)
    assert blockwise.blockwise is not None
    found = second_moments(blockwise, architecture, tokens)
    expected = second_moments(load_original(checkpoint, torch.float32), architecture, tokens)
    assert list(found) == list(expected)
    for name, moments in expected.items():
        torch.testing.assert_close(found[name], moments, rtol=1e-5, atol=1e-7)
