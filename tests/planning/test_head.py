"""What noise in a head costs: against noise that is put there, and KL as it rises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support import models
from waterfill.codecs.groups import per_weight
from waterfill.files.architecture import describe
from waterfill.files.blockwise import load_blockwise
from waterfill.files.checkpoint import open_checkpoint
from waterfill.files.original import load_original
from waterfill.planning.calibration import on_tokens
from waterfill.planning.estimators import group_power
from waterfill.planning.head import weighed_moments
from waterfill.planning.moments import InputMoments
from waterfill.planning.plan import Calibration
from waterfill.planning.probe import lead_of

TOKENS = torch.randint(40, (4, 48), generator=torch.Generator().manual_seed(0))
LEVEL = 1e-3  # relative power of the noise


def by_noise(path: Path, draws: int) -> tuple[float, float]:
    """KL per unit of relative power, when the head's weights are disturbed and the embedding's are not."""
    model = load_original(open_checkpoint(path), torch.float32).eval()
    generator = torch.Generator().manual_seed(1)

    def log_probabilities(head: Tensor) -> Tensor:
        model.get_output_embeddings().weight = torch.nn.Parameter(head, requires_grad=False)
        logits = model(TOKENS).logits[:, lead_of(TOKENS.shape[1]) : -1]
        return torch.as_tensor(logits.double().log_softmax(-1))

    with torch.no_grad():
        weight = model.get_output_embeddings().weight.clone()
        sigma = per_weight(group_power(weight).sqrt(), weight.shape[1]) * LEVEL**0.5
        before = log_probabilities(weight)
        rises = []
        for _ in range(draws):
            after = log_probabilities(weight + sigma * torch.randn(weight.shape, generator=generator))
            rises.append(float((before.exp() * (before - after)).sum(-1).mean()) / LEVEL)
    found = torch.tensor(rises)
    return float(found.mean()), float(found.std() / draws**0.5)


@pytest.mark.parametrize("family", ["tiny_gemma", "tiny_granite_moe", "tiny_gpt2"])
def test_alpha_of_the_products_alone(family: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(getattr(models, family)(tmp_path))
    architecture = describe(checkpoint)
    matrix = next(matrix for matrix in architecture.matrices if matrix.role == "embedding")
    moments = weighed_moments(load_blockwise(checkpoint, torch.float32), checkpoint, matrix, TOKENS)
    assert torch.equal(moments, moments.T)
    mean, stderr = by_noise(tmp_path, 60)
    assert stderr < 0.1 * mean
    assert float(moments.trace()) == pytest.approx(mean, abs=4 * stderr)


def test_heads_alone_are_weighed(tmp_path: Path) -> None:
    for tied, name in ((False, "lm_head"), (True, "model.embed_tokens")):
        checkpoint = open_checkpoint(models.tiny_llama(tmp_path / str(tied), tied=tied))
        moments = InputMoments(checkpoint, describe(checkpoint), TOKENS)
        assert name in moments.names
        assert ("model.embed_tokens" in moments.names) == tied
        assert moments.weighed(name) is not None
        assert moments.weighed("model.layers.0.mlp.down_proj") is None


def test_a_head_that_nothing_is_looked_up_in_costs_its_products_alone(tmp_path: Path) -> None:
    for tied, name in ((False, "lm_head"), (True, "model.embed_tokens")):
        checkpoint = open_checkpoint(models.tiny_llama(tmp_path / str(tied), tied=tied))
        architecture, record = describe(checkpoint), Calibration("random", 4, 48, 0, None)
        left = on_tokens(checkpoint, architecture, TOKENS, record).left(architecture.matrices, ["trellis-s64-r3.0000"])
        assert (left[name].alpha is not None) == tied


def test_positions_are_no_head(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(models.tiny_gpt2(tmp_path))
    moments = InputMoments(checkpoint, describe(checkpoint), TOKENS)
    assert "transformer.wte" in moments.names
    assert "transformer.wpe" not in moments.names
