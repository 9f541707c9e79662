"""What stays: the best parts within a target, counted against files and brute force."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import pytest
import torch
from transformers.models.llama.modeling_llama import repeat_kv

from tests.support.models import tiny_llama
from tests.tuning.pruning.conftest import CHANNELS, HEAD_DIM, KV_HEADS, LAYERS, Family, loaded
from waterfill.base.errors import BudgetError
from waterfill.files.checkpoint import open_checkpoint
from waterfill.tuning.pruning.selection import Scores, Shape, check_target, limit_of, lost, nearest, select, shapes
from waterfill.tuning.pruning.structure import Structure, structure_of
from waterfill.tuning.pruning.writing import lay_out


@pytest.fixture
def structure(family: Family) -> Structure:
    return structure_of(open_checkpoint(family("qwen3")))


def drawn(layers: int = LAYERS, channels: int = CHANNELS) -> Scores:
    generator = torch.Generator().manual_seed(2)
    heads = torch.rand(layers, KV_HEADS, generator=generator, dtype=torch.float64) * 20
    return Scores(heads, torch.rand(layers, channels, generator=generator, dtype=torch.float64), nats=True)


def test_query_heads_go_with_the_head_that_transformers_repeats_for_them(structure: Structure) -> None:
    sizes = structure.sizes
    numbers = torch.arange(sizes.kv_heads).view(1, -1, 1, 1)
    paired = repeat_kv(numbers, sizes.repeats).flatten().tolist()
    q = structure.members["model.layers.1.self_attn.q_proj.weight"]
    o = structure.members["model.layers.1.self_attn.o_proj.weight"]
    k = structure.members["model.layers.1.self_attn.k_proj.weight"]
    for group in range(sizes.kv_heads):
        heads = [head for head, of in enumerate(paired) if of == group]
        lines = [head * HEAD_DIM + line for head in heads for line in range(HEAD_DIM)]
        assert q.places([group]).tolist() == o.places([group]).tolist() == lines
        assert k.places([group]).tolist() == list(range(group * HEAD_DIM, (group + 1) * HEAD_DIM))


def test_weights_are_counted(structure: Structure, family: Family) -> None:
    model = loaded(family("qwen3"))
    every = sum(parameter.numel() for parameter in model.model.layers.parameters())
    assert LAYERS * structure.layer_weights(KV_HEADS, CHANNELS) == every
    heads, channels = 48 * HEAD_DIM * (2 + 1 + 1 + 2), 3 * 48
    assert structure.layer_weights(2, 64) == every // LAYERS - heads - 32 * channels


def test_shapes_fill_a_share(structure: Structure) -> None:
    """For every number of KV groups the most channels that a share leaves, by trying all of them."""
    for share, multiple in product((0.4, 0.6, 0.8, 0.95), (1, 8, 32)):
        fits = limit_of(structure, share, None, lambda shape: 0)
        whole = structure.layer_weights(KV_HEADS, CHANNELS)
        expected = []
        for kv_heads in range(KV_HEADS, 0, -1):
            widths = [*range(multiple, CHANNELS, multiple), CHANNELS]
            fitting = [width for width in widths if structure.layer_weights(kv_heads, width) <= share * whole]
            expected += [Shape(LAYERS, kv_heads, max(fitting))] if fitting else []
        assert shapes(structure, "parts", fits, multiple, None) == expected
        if alone := [shape for shape in expected if shape.kv_heads == KV_HEADS]:
            assert shapes(structure, "channels", fits, multiple, None) == alone


def test_other_kinds_alone(structure: Structure) -> None:
    fits = limit_of(structure, 0.7, None, lambda shape: 0)
    assert shapes(structure, "layers", fits, 32, None) == [Shape(2, KV_HEADS, CHANNELS)]
    whole = structure.layer_weights(KV_HEADS, CHANNELS)
    counts = [k for k in range(1, KV_HEADS + 1) if structure.layer_weights(k, CHANNELS) <= 0.7 * whole]
    assert shapes(structure, "heads", fits, 32, None) == [Shape(LAYERS, max(counts), CHANNELS)]
    assert [shape.kv_heads for shape in shapes(structure, "parts", fits, 1, 2)] == [2]


def test_a_size_is_that_of_the_files(structure: Structure) -> None:
    def bytes_of(shape: Shape) -> int:
        return lay_out(structure, tuple(range(shape.layers)), shape).size_bytes

    size_bytes = bytes_of(Shape(LAYERS, 2, 57))
    fits = limit_of(structure, None, size_bytes, bytes_of)
    assert Shape(LAYERS, 2, 57) in shapes(structure, "parts", fits, 1, None)
    fits = limit_of(structure, None, size_bytes - 1, bytes_of)
    assert Shape(LAYERS, 2, 56) in shapes(structure, "parts", fits, 1, None)


def test_llama_keeps_numbers_of_heads_that_divide_its_width(tmp_path: Path) -> None:
    structure = structure_of(open_checkpoint(tiny_llama(tmp_path, hidden=64, heads=8, kv_heads=4)))
    assert structure.group_counts == (1, 2, 4), "transformers refuses 6 heads beside a width of 64"
    with pytest.raises(BudgetError, match="--kv-heads 3 is not what a llama of this width may have; choose of 1, 2, 4"):
        shapes(structure, "parts", lambda shape: True, 1, 3)


def test_the_best_stay() -> None:
    scores, shape = drawn(), Shape(LAYERS, 2, 40)
    chosen = select(scores, shape)
    assert chosen.shape == shape
    assert chosen.layers == (0, 1, 2)
    for layer in range(LAYERS):
        for values, kept, count in (
            (scores.heads[layer], chosen.heads[layer], 2),
            (scores.channels[layer], chosen.channels[layer], 40),
        ):
            ranked = sorted(range(len(values)), key=lambda part: -float(values[part]))
            assert list(kept) == sorted(ranked[:count])
    going = math.fsum(float(v) for row in scores.heads.sort(1).values[:, :1] for v in row)
    going += math.fsum(float(v) for row in scores.channels.sort(1).values[:, : CHANNELS - 40] for v in row)
    assert lost(scores, chosen) == pytest.approx(going)


def test_the_best_layers_stay() -> None:
    scores = drawn()
    worst = int(scores.layers.argmin())
    chosen = select(scores, Shape(2, KV_HEADS, CHANNELS))
    assert chosen.layers == tuple(layer for layer in range(LAYERS) if layer != worst)
    assert lost(scores, chosen) == pytest.approx(float(scores.layers[worst]))
    assert select(scores, Shape(1, KV_HEADS, CHANNELS), torch.tensor([1.0, 3.0, 2.0])).layers == (1,)


def test_equal_scores_keep_the_first() -> None:
    scores = Scores(torch.ones(1, 4), torch.zeros(1, 6), nats=False)
    chosen = select(scores, Shape(1, 2, 3))
    assert (chosen.heads, chosen.channels) == (((0, 1),), ((0, 1, 2),))


def test_the_same_share_of_both_kinds(structure: Structure) -> None:
    found = [Shape(LAYERS, 3, 40), Shape(LAYERS, 2, 64), Shape(LAYERS, 1, 90)]
    assert nearest(structure.sizes, found) == Shape(LAYERS, 2, 64)


@pytest.mark.parametrize(
    ("share", "size", "sentence"),
    [
        (None, None, "exactly one of --keep-share and --size"),
        (0.5, 1000, "exactly one of --keep-share and --size"),
        (1.0, None, "--keep-share 1.0 is not a share to keep"),
        (0.0, None, "--keep-share 0.0 is not a share to keep"),
        (-0.1, None, "--keep-share -0.1 is not a share to keep"),
    ],
)
def test_what_is_no_target(share: float | None, size: int | None, sentence: str) -> None:
    with pytest.raises(BudgetError, match=sentence):
        check_target(share, size)


@pytest.mark.parametrize("size", [10_000, 10_001, 0])
def test_a_size_that_asks_for_nothing(size: int, structure: Structure) -> None:
    with pytest.raises(BudgetError, match=f"--size {size} .*: the model takes 10000 bytes; ask for fewer"):
        limit_of(structure, None, size, lambda shape: 10_000)


@pytest.mark.parametrize(
    ("what", "least"),
    [
        ("parts", "1 KV heads and 32 channels"),
        ("heads", "1 KV heads"),
        ("channels", "32 channels"),
        ("layers", "one layer"),
    ],
)
def test_a_target_below_all_shapes(what: str, least: str, structure: Structure) -> None:
    fits = limit_of(structure, 0.01, None, lambda shape: 0)
    with pytest.raises(BudgetError, match=f"too large for that even with {least}"):
        shapes(structure, what, fits, 32, None)  # type: ignore[arg-type]
