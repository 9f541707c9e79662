"""Second moments of inputs: of a model that is read block by block they are those of the model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support import models
from waterfill.files.architecture import describe
from waterfill.files.blockwise import load_blockwise
from waterfill.files.checkpoint import open_checkpoint
from waterfill.files.original import load_original
from waterfill.planning import moments as moments_module
from waterfill.planning.moments import LONGEST, InputMoments, module_of, second_moments


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


TOKENS = torch.randint(40, (6, 40), generator=torch.Generator().manual_seed(0))


def by_hooks(path: Path) -> dict[str, Tensor]:
    """Of inputs as they are, in float64, of the model in memory."""
    checkpoint = open_checkpoint(path)
    architecture, model = describe(checkpoint), load_original(checkpoint, torch.float32)
    sums: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2).double()
            sums[name] = sums.get(name, torch.zeros(())) + x.T @ x

        module.register_forward_pre_hook(hook)

    for matrix in architecture.matrices:
        module = module_of(architecture, model, matrix)
        if module is not None:
            watch(matrix.name, module)
    with torch.no_grad():
        model(TOKENS)
    return sums


@pytest.mark.parametrize("family", ["llama", "gemma", "mixtral", "gpt2", "qwen2"])
def test_moments_of_all_tokens(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments_module, "LONGEST", 1e9)  # as they are
    monkeypatch.setattr(moments_module, "PART_TOKENS", 80)
    checkpoint = open_checkpoint(getattr(models, f"tiny_{family}")(tmp_path))
    expected = by_hooks(tmp_path)
    moments = InputMoments(checkpoint, describe(checkpoint), TOKENS)
    assert moments.names == set(expected)
    for name, both in expected.items():
        halves = moments.of(name)
        assert torch.equal(halves.both, halves.both.T)
        scale = float(both.diagonal().mean())
        torch.testing.assert_close(halves.both.double(), both, rtol=1e-4, atol=1e-4 * scale)
        assert float(halves.first.trace()) != float(halves.second.trace())


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_moments_of_one_block_at_a_time_are_the_same(family: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(getattr(models, f"tiny_{family}")(tmp_path, layers=4))
    architecture = describe(checkpoint)
    together, apart = (InputMoments(checkpoint, architecture, TOKENS, limit_bytes=limit) for limit in (1e12, 1.0))
    assert apart._passage._skips
    names = [matrix.name for matrix in architecture.matrices if matrix.name in together.names]
    for name in [*names, *names[:3], *reversed(names)]:  # in any order
        assert torch.equal(together.of(name).first, apart.of(name).first)
        assert torch.equal(together.of(name).second, apart.of(name).second)
        assert len(apart._sums) <= 4


def test_blocks_that_hand_on_more_than_they_return_are_run_from_the_beginning(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(models.tiny_llama(tmp_path, layers=4))
    architecture = describe(checkpoint)
    left: list[Tensor] = []

    def with_memory(model: Any) -> None:
        layers = model.model.layers
        layers[0].register_forward_hook(lambda _, inputs, output: left.append(output))
        layers[3].register_forward_pre_hook(lambda _, inputs: (inputs[0] + left[-1][:, : inputs[0].shape[1]],))

    original = load_blockwise

    def load(*arguments: Any) -> Any:
        model = original(*arguments)
        with_memory(model)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moments_module, "load_blockwise", load)
        together, apart = (InputMoments(checkpoint, architecture, TOKENS, limit_bytes=limit) for limit in (1e12, 1.0))
    assert not apart._passage._skips
    for name in sorted(together.names):
        assert torch.equal(together.of(name).both, apart.of(name).both)


def test_matrices_that_are_multiplied_with_the_same_share_moments(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(models.tiny_llama(tmp_path))
    moments = InputMoments(checkpoint, describe(checkpoint), TOKENS)
    layer = "model.layers.0"
    leaders = {
        name: moments.leader(f"{layer}.{name}").removeprefix(f"{layer}.")
        for name in ("self_attn.v_proj", "mlp.up_proj")
    }
    assert leaders == {"self_attn.v_proj": "self_attn.q_proj", "mlp.up_proj": "mlp.gate_proj"}
    assert moments.leader(f"{layer}.mlp.down_proj") == f"{layer}.mlp.down_proj"
    assert moments.of(f"{layer}.self_attn.k_proj").both is not None


def test_a_token_that_is_far_longer_than_others_does_not_drown_them() -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    x[0] *= 1e4
    total = torch.zeros(8, 8)
    moments_module._accumulate(total, x)
    squares = x.square().sum(1)
    expected = squares.clamp_max(LONGEST * float(squares.median())).sum()
    assert float(total.trace()) == pytest.approx(float(expected), rel=1e-4)
