"""What is written computes what the original does with the parts that went set to zero."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.support import models
from tests.support.checkpoints import edit_config, edit_tensors
from tests.tuning.pruning.conftest import CHANNELS, KV_HEADS, LAYERS, Family, loaded, logits, zeroed
from waterfill.base.errors import CheckpointError, WaterfillError
from waterfill.files.blockwise import load_blockwise
from waterfill.files.checkpoint import Checkpoint, open_checkpoint
from waterfill.files.model_calls import read
from waterfill.tuning.pruning import writing
from waterfill.tuning.pruning.scoring import losses, without
from waterfill.tuning.pruning.selection import Selection
from waterfill.tuning.pruning.structure import FAMILIES, structure_of
from waterfill.tuning.pruning.writing import lay_out, write

GOING_HEADS = {0: (1,), 1: (0,), 2: (2,)}  # KV groups, by layer
GOING_CHANNELS = {layer: tuple(range(layer, CHANNELS, 3)) for layer in range(LAYERS)}


def selection(layers: tuple[int, ...] = tuple(range(LAYERS))) -> Selection:
    def rest(count: int, going: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(part for part in range(count) if part not in going)

    return Selection(
        layers,
        tuple(rest(KV_HEADS, GOING_HEADS[layer]) for layer in layers),
        tuple(rest(CHANNELS, GOING_CHANNELS[layer]) for layer in layers),
    )


def by_hand(path: Path, layers: tuple[int, ...] = ()) -> Any:
    heads = {layer: [2 * group + i for group in groups for i in range(2)] for layer, groups in GOING_HEADS.items()}
    return zeroed(path, heads, GOING_CHANNELS, layers)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        *((family, {}) for family in FAMILIES),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"attention_bias": True}),
    ],
)
def test_what_is_left_is_the_model_with_zeros(
    model_type: str, options: dict[str, Any], family: Family, tmp_path: Path
) -> None:
    path = family(model_type, **options)
    checkpoint = open_checkpoint(path)
    size_bytes = write(checkpoint, structure_of(checkpoint), selection(), tmp_path / "out")
    assert size_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    pruned, expected = loaded(tmp_path / "out"), logits(by_hand(path))
    assert pruned.config.num_attention_heads == 4
    assert pruned.config.intermediate_size == 64
    assert pruned.model.layers[0].mlp.up_proj.weight.shape == (64, 48)
    torch.testing.assert_close(logits(pruned), expected, atol=1e-5, rtol=1e-5)
    assert (logits(loaded(path)) - expected).abs().max() > 1e-2, "parts that go had an effect"


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text"])
def test_layers_that_go_leave_what_single_layers_are(model_type: str, family: Family, tmp_path: Path) -> None:
    path = family(model_type, **({"max_window_layers": 2} if model_type == "qwen2" else {}))
    checkpoint = open_checkpoint(path)
    write(checkpoint, structure_of(checkpoint), selection((0, 2)), tmp_path / "out")
    torch.testing.assert_close(
        logits(loaded(tmp_path / "out")), logits(by_hand(path, layers=(1,))), atol=1e-5, rtol=1e-5
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    if "layer_types" in config:
        kinds = json.loads((path / "config.json").read_text())["layer_types"]
        assert config["layer_types"] == [kinds[0], kinds[2]]
    if model_type == "qwen2":
        assert config["max_window_layers"] == 1, "of the first two layers one stays"


def test_a_pattern_of_layer_types_is_written_out(family: Family, tmp_path: Path) -> None:
    path = family("gemma3_text")
    edit_config(path, layer_types=None, sliding_window_pattern=2)
    checkpoint = open_checkpoint(path)
    kinds = loaded(path).config.layer_types
    assert len(set(kinds)) == 2
    write(checkpoint, structure_of(checkpoint), selection((1, 2)), tmp_path / "out")
    assert loaded(tmp_path / "out").config.layer_types == kinds[1:]


def test_trying_without_is_what_is_written(family: Family, tmp_path: Path) -> None:
    """The model that computes without parts, block by block, and its loss."""
    path = family("llama", attention_bias=True, mlp_bias=True)
    checkpoint = open_checkpoint(path)
    structure, chosen = structure_of(checkpoint), selection((0, 2))
    write(checkpoint, structure, chosen, tmp_path / "out")
    model = load_blockwise(checkpoint, torch.float32)
    ids = torch.randint(250, (3, 16), generator=torch.Generator().manual_seed(1))
    small = loaded(tmp_path / "out")
    with torch.no_grad(), without(structure, model, chosen):
        torch.testing.assert_close(read(model, ids), read(small, ids), atol=1e-5, rtol=1e-5)
    ((first, *others),) = losses(structure, model, ids, [chosen])
    with torch.no_grad():
        p, q = (read(each, ids)[0, 4:-1].double().log_softmax(-1) for each in (loaded(path), small))
    assert first == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert len(others) == 2


def test_shards_and_what_lies_beside(tmp_path: Path) -> None:
    path = models.tiny_llama(tmp_path / "model", heads=4, kv_heads=2, tokenizer=True, shards=3)
    checkpoint = open_checkpoint(path)
    structure = structure_of(checkpoint)
    chosen = Selection((0, 1), ((0,), (1,)), (tuple(range(0, 172, 2)),) * 2)
    size_bytes = write(checkpoint, structure, chosen, tmp_path / "out", shard_bytes=100_000)
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"} <= written
    weights = [file for file in (tmp_path / "out").iterdir() if file.suffix == ".safetensors" or ".index" in file.name]
    assert len(weights) > 3
    assert size_bytes == sum(file.stat().st_size for file in weights)
    assert size_bytes == lay_out(structure, chosen.layers, chosen.shape, shard_bytes=100_000).size_bytes
    small = open_checkpoint(tmp_path / "out")
    torch.testing.assert_close(
        small.read("model.layers.1.mlp.up_proj.weight"), checkpoint.read("model.layers.1.mlp.up_proj.weight")[::2]
    )
    with safe_open(weights[0] if weights[0].suffix == ".safetensors" else weights[1], framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_an_interrupted_run_leaves_nothing(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(family("llama"))
    structure, before = structure_of(checkpoint), sorted(tmp_path.rglob("*"))
    calls: Iterator[int] = iter(range(100))
    plain = writing.read_kept

    def interrupted(*arguments: Any) -> torch.Tensor:
        if next(calls) == 12:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(writing, "read_kept", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(checkpoint, structure, selection(), tmp_path / "out")
    assert next(calls) == 13
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_there_stays(family: Family, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(family("llama"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(WaterfillError, match="exists already; give another output"):
        write(checkpoint, structure_of(checkpoint), selection(), tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine"]
    (tmp_path / "out" / "mine").unlink()
    write(checkpoint, structure_of(checkpoint), selection(), tmp_path / "out")
    assert loaded(tmp_path / "out").config.num_key_value_heads == 2, "an empty directory is no obstacle"


def test_damaged_weights_are_not_passed_on(family: Family, tmp_path: Path) -> None:
    path = family("llama")

    def damage(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["model.layers.2.mlp.up_proj.weight"][5, 5] = torch.nan
        return tensors

    edit_tensors(path, damage)
    checkpoint: Checkpoint = open_checkpoint(path)
    with pytest.raises(CheckpointError, match="NaN"):
        write(checkpoint, structure_of(checkpoint), selection(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_families_are_refused(tmp_path: Path) -> None:
    for make in (models.tiny_gpt2, models.tiny_mixtral):
        path = make(tmp_path / make.__name__)
        with pytest.raises(CheckpointError, match=r"of which it is not known .*; give a model of gemma, .*qwen3$"):
            structure_of(open_checkpoint(path))
