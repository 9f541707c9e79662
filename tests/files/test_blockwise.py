"""Models that are read block by block: they compute what the same models do as a whole, and keep nothing."""

from __future__ import annotations

import gc
import logging
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from tests.support import family_check, models
from tests.support.blockwise_check import (
    assert_gradients,
    assert_same,
    blockwise_sums,
    both,
    llama_that,
    logits_of,
    slope_of,
)
from waterfill.base.errors import CheckpointError, WaterfillError
from waterfill.files import blockwise
from waterfill.files.architecture import parameters_of
from waterfill.files.blockwise import Watcher, load_blockwise
from waterfill.files.checkpoint import Checkpoint, open_checkpoint
from waterfill.files.skeleton import build_skeleton

MODELS: dict[str, Callable[..., Path]] = {
    name.removeprefix("tiny_"): builder for name, builder in vars(models).items() if name.startswith("tiny_")
}
BLOCK, TABLES = "model.layers.1.mlp.up_proj.weight", ("model.embed_tokens.weight", "lm_head.weight")


def by_blocks(path: Path) -> Any:
    model = load_blockwise(open_checkpoint(path), torch.float32)
    assert model.blockwise is not None
    return model


def change(path: Path, **tensors: Any) -> Path:
    """Some of a checkpoint's tensors, by functions of what they are."""
    stored = load_file(path / "model.safetensors")
    for name, changed in tensors.items():
        assert name in stored
        stored[name] = changed(stored[name]).contiguous()
    save_file(stored, path / "model.safetensors", {"format": "pt"})
    return path


def with_nan(weight: Tensor, row: int = -1) -> Tensor:
    weight[row] = torch.nan
    return weight


# -- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_the_whole_model(name: str, tied: bool, tmp_path: Path) -> None:
    options = {} if name == "gpt2" else {"tied": tied}
    assert assert_same(MODELS[name](tmp_path, **options)).blockwise is not None


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in family_check.SAMPLE else pytest.mark.families)
        for name in family_check.FAMILIES
    ],
)
def test_a_family_computes_the_same_block_by_block(family: str, tmp_path: Path) -> None:
    """Or is loaded as a whole, if its blocks share more than what they return."""
    if not family_check.builds(family, tmp_path):
        assert family not in family_check.SAMPLE
        pytest.skip("transformers itself does not run it")
    try:
        open_checkpoint(tmp_path)
        model = assert_same(tmp_path)
    except WaterfillError as refusal:
        assert family not in family_check.SAMPLE
        pytest.skip(f"refused: {refusal}")
    assert family not in family_check.SAMPLE or model.blockwise is not None


@pytest.mark.parametrize("family", ["zamba", "hrm_text"])
def test_weights_of_several_blocks_and_blocks_that_are_called_again(family: str, tmp_path: Path) -> None:
    """Zamba's layers share an attention; hierarchical reasoning models go through their layers more than once."""
    assert family_check.builds(family, tmp_path)
    model = assert_same(tmp_path)
    reads = Counter[str]()

    class Counting(Watcher):
        def read(self, name: str, weight: Tensor, again: Any) -> None:
            reads[name] += 1

    with torch.no_grad(), model.blockwise.watched(Counting()):
        logits_of(model)
    assert (max(reads.values()) > 1) == (family == "hrm_text")
    shared = [name for name, parameter in model.named_parameters() if "shared_transf" in name and not parameter.is_meta]
    assert bool(shared) == (family == "zamba")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [1, 100, 128])
def test_a_head_is_multiplied_some_rows_at_a_time(
    rows: int, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = models.tiny_llama(tmp_path, tied=tied)
    assert TABLES[tied - 1] in load_file(path / "model.safetensors")
    monkeypatch.setattr(blockwise, "CHUNK_WEIGHTS", 64 * rows)
    read, heights = Checkpoint.read, []

    def spying(self: Checkpoint, name: str, index: Any = ...) -> Tensor:
        found = read(self, name, index)
        heights.append(len(found) if name == TABLES[not tied] and index is not ... else 0)
        return found

    model = assert_same(path)
    with mock.patch.object(Checkpoint, "read", spying), torch.no_grad():
        logits_of(model)
    assert max(heights) == rows
    assert sum(heights) == 256


@pytest.mark.parametrize("tied", [False, True])
def test_a_table_that_is_looked_up_twice_has_one_gradient(tied: bool, tmp_path: Path) -> None:
    path = models.tiny_llama(tmp_path, tied=tied)
    ids = torch.tensor([[1, 2, 3, 2, 9, 250], [2, 2, 255, 0, 1, 7]])
    with llama_that(lambda model, ids: model.embed_tokens(ids) + 2 * model.embed_tokens(ids.flip(1).roll(1))):
        assert assert_same(path, ids).blockwise is not None


def test_rows_of_padding_have_no_gradient(tmp_path: Path) -> None:
    path = models.tiny_llama(tmp_path)
    config = path / "config.json"
    config.write_text(config.read_text().replace('"pad_token_id": null', '"pad_token_id": 5'))
    ids = torch.tensor([[5, 1, 5, 9], [7, 7, 5, 5]])
    model = assert_same(path, ids)
    assert model.model.embed_tokens.padding_idx == 5
    assert_same(path, torch.tensor([[1, 2, 3]]))
    only = torch.tensor([[5, 5]])
    assert float(blockwise_sums(model, {TABLES[0]}, only)[TABLES[0]].abs().max()) == 0


@pytest.mark.parametrize("wanted", [{BLOCK}, {TABLES[0]}, {TABLES[1]}, {"model.norm.weight"}, set()])
def test_only_the_gradients_that_are_asked_for_come(wanted: set[str], llama: Path) -> None:
    """Blocks before the first of them have nothing to differentiate by."""
    found, whole = both(llama)
    if wanted:
        assert_gradients(found, whole, wanted)
        assert set(blockwise_sums(found, wanted)) == wanted
    with found.blockwise.gradients(wanted, pytest.fail), torch.no_grad():
        assert not logits_of(found).requires_grad


def test_gradients_of_experts_come_as_one_parameter(tmp_path: Path) -> None:
    """On disk they are matrices of their own."""
    model, whole = both(models.tiny_mixtral(tmp_path))
    name, came = "model.layers.0.mlp.experts.gate_up_proj", []

    def consume(*arguments: Any) -> None:
        came.append(arguments)

    with model.blockwise.gradients({name}, consume):
        logits = logits_of(model)
        logits.backward(slope_of(logits))
    ((found, weight, gradient, sign),) = came
    expert = parameters_of(whole)[name].requires_grad_()
    logits_of(whole).backward(slope_of(logits))
    assert expert.grad is not None
    assert (found, sign) == (name, 1)
    assert torch.equal(weight, expert.detach())
    torch.testing.assert_close(gradient, expert.grad, rtol=1e-5, atol=1e-5 * float(expert.grad.std()))


def test_buffers_that_are_stored_are_read(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    path = change(models.tiny_deepseek_v3(tmp_path), **{name: lambda bias: torch.tensor([9.0, -9, 5, 0]).to(bias)})
    model = assert_same(path)
    assert model.state_dict()[name].tolist() == [9, -9, 5, 0]


def test_other_dtypes(tmp_path: Path) -> None:
    model, whole = both(models.tiny_gemma(tmp_path), torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(logits_of(model), logits_of(whole))
    assert logits_of(model).dtype == torch.bfloat16


def test_a_model_without_its_parameters_has_its_buffers(llama: Path) -> None:
    model, (_, whole) = build_skeleton(open_checkpoint(llama), torch.float32), both(llama)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    expected = dict(whole.named_buffers())
    found = dict(model.named_buffers())
    assert list(found) == list(expected)
    assert all(torch.equal(buffer, expected[name]) for name, buffer in found.items())
    assert not torch.nn.Linear(2, 2).weight.is_meta, "others are built as ever"


# -- what it does not keep --------------------------------------------------------------------------------------------


class Books(Watcher):
    """Who is in memory: weights by name, of as many blocks as there are."""

    def __init__(self) -> None:
        self.alive: dict[str, weakref.ref[Tensor]] = {}
        self.most = 0
        self.multiplications = Counter[str]()

    def read(self, name: str, weight: Tensor, again: Any) -> None:
        self.alive[f"{name} {len(self.alive)}"] = weakref.ref(weight)
        self.most = max(self.most, len(self.blocks()))

    def blocks(self) -> set[str]:
        gc.collect()
        names = [name for name, weight in self.alive.items() if weight() is not None]
        return {".".join(name.split(".")[:3]) for name in names if ".layers." in name}

    def multiplied(self, name: str, tokens: int) -> None:
        self.multiplications[name] += tokens


def assert_empty(model: Any) -> None:
    """Blocks are on the meta device, tables have no memory, and the norm, outside of both, is there."""
    held = {name for name, p in model.named_parameters() if not p.is_meta and p.untyped_storage().nbytes() > 4}
    assert held == {"model.norm.weight"}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_one_block_is_in_memory_at_a_time_and_none_afterwards(tmp_path: Path) -> None:
    model, books = by_blocks(models.tiny_llama(tmp_path, layers=4)), Books()
    assert_empty(model)
    with model.blockwise.watched(books):
        with torch.no_grad():
            logits_of(model)
        assert not books.blocks()
        assert_empty(model)
        blockwise_sums(model, set(parameters_of(model)))
    assert not books.blocks()
    assert_empty(model)
    assert books.most == 1
    assert sum("up_proj" in name for name in books.alive) == 4 * 3  # without gradients, with, and on the way back
    assert books.multiplications == dict.fromkeys(TABLES, 2 * 2 * 24)


class StopHereError(Exception):
    pass


def stop(*_: Any, **__: Any) -> None:
    raise StopHereError


@pytest.mark.parametrize("where", ["forward", "backward", "consume", "watch"])
def test_nothing_is_kept_where_something_fails(where: str, llama: Path) -> None:
    model = by_blocks(llama)
    expected = logits_of(model)
    watcher, module = Watcher(), model.model.layers[1].mlp.down_proj
    hooks = []
    if where == "forward":
        hooks.append(module.register_forward_hook(stop))
    if where == "backward":
        hooks.append(
            module.register_forward_hook(
                lambda _, args, output: output.requires_grad and output.register_hook(stop) and None
            )
        )
    if where == "watch":
        watcher.forgotten = stop  # type: ignore[method-assign]
    consume = stop if where == "consume" else lambda *_: None
    with (
        pytest.raises(StopHereError),
        model.blockwise.watched(watcher),
        model.blockwise.gradients(set(parameters_of(model)), consume),
    ):
        logits_of(model).sum().backward()
    for hook in hooks:
        hook.remove()
    gc.collect()
    assert_empty(model)
    assert torch.equal(logits_of(model), expected)
    assert_gradients(*both(llama), {BLOCK})


# -- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [BLOCK, "model.norm.weight", "lm_head.weight"])
def test_weights_that_are_no_numbers_are_refused(name: str, llama: Path) -> None:
    change(llama, **{name: with_nan})
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor '{name}' holds \d+ NaN or Inf"):
        load_blockwise(open_checkpoint(llama), torch.float32)


def test_rows_that_are_no_numbers_are_refused_where_they_are_looked_up(llama: Path) -> None:
    change(llama, **{"model.embed_tokens.weight": lambda weight: with_nan(weight, 77)})
    model = by_blocks(llama)
    logits_of(model, torch.tensor([[76, 78]]))
    with pytest.raises(CheckpointError, match=r"tensor 'model\.embed_tokens\.weight' holds 64 NaN or Inf"):
        logits_of(model, torch.tensor([[76, 77]]))


def test_an_absent_tensor_is_refused(llama: Path) -> None:
    stored = load_file(llama / "model.safetensors")
    stored.pop(BLOCK)
    save_file(stored, llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"lacks 1 tensors of the model, such as '{BLOCK}'"):
        load_blockwise(open_checkpoint(llama), torch.float32)


# -- models that reach past their blocks ------------------------------------------------------------------------------


def of_a_block(model: Any, ids: Tensor) -> Tensor:
    return torch.as_tensor(model.embed_tokens(ids) * model.layers[1].mlp.up_proj.weight[0, 0])


def of_a_table(model: Any, ids: Tensor) -> Tensor:
    return torch.as_tensor(model.embed_tokens(ids) * model.embed_tokens.weight[0, 0])


@pytest.mark.parametrize(
    ("before", "reason"),
    [(of_a_block, "meta"), (of_a_table, "logits are not finite")],
    ids=["of_a_block", "of_a_table"],
)
def test_a_model_that_reaches_past_its_blocks_is_loaded_as_a_whole(
    before: Any, reason: str, llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with llama_that(before), caplog.at_level(logging.WARNING, "waterfill"):
        model = assert_same(llama)
    assert model.blockwise is None
    (said,) = [record.message for record in caplog.records]
    assert said.startswith(f"{llama} is loaded as a whole: it does not run block by block (")
    assert reason in said


def test_a_model_whose_blocks_leave_something_for_later_ones_is_loaded_as_a_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Later layers of Gemma 3n use the keys and values of earlier ones: gradients would not come through."""
    assert family_check.builds("gemma3n_text", tmp_path)
    with caplog.at_level(logging.WARNING, "waterfill"):
        assert assert_same(tmp_path).blockwise is None
    (said,) = [record.message for record in caplog.records]
    assert "it does not run block by block (" in said, "whose keys and values are not there"


def test_a_block_that_changes_its_input_in_place_is_loaded_as_a_whole(llama: Path) -> None:
    """What is computed again would start from something else."""
    layer = type(load_blockwise(open_checkpoint(llama), torch.float32).model.layers[0])
    forward = layer.forward

    def changed(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(self, hidden_states.mul_(2), *args, **kwargs)

    with mock.patch.object(layer, "forward", changed):
        assert load_blockwise(open_checkpoint(llama), torch.float32).blockwise is None


def test_what_is_asked_of_a_whole_model_is_no_secret_of_its_blocks(llama: Path) -> None:
    """Devices and sizes of tables can be asked for, as transformers' code and ours does."""
    model = by_blocks(llama)
    assert isinstance(model, LlamaForCausalLM)
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert table.weight.shape == (256, 64)
        assert table.weight.device.type == "cpu"
