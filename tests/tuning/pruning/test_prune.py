"""`waterfill prune` as a user meets it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import waterfill
from tests.support.commands import SCALAR, Command
from tests.support.documented import documented, shape
from tests.support.kernel_samples import needs_engine
from tests.support.models import tiny_qwen2
from tests.tuning.pruning.conftest import Family, loaded, logits
from waterfill.base.errors import BudgetError, WaterfillError
from waterfill.files.checkpoint import open_checkpoint
from waterfill.files.model_calls import read
from waterfill.tuning.pruning.selection import Shape

PROBE = ["--sequences", "4", "--length", "64"]


def test_prune_plan_pack_generate(command: Command, ref_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "smaller"
    result = command("prune", ref_llama, out, "--keep-share", "0.7", "--kv-heads", "1", *PROBE, "--json")
    assert result.code == 0
    record = result.record
    assert shape(record) == shape(documented("prune"))
    assert record["size_bytes_after"] == (out / "model.safetensors").stat().st_size < record["size_bytes_before"]
    model = loaded(out)
    weights = sum(parameter.numel() for parameter in model.model.layers.parameters())
    assert record["layer_weights_after"] == weights <= 0.7 * record["layer_weights_before"]
    assert record["after"]["channels"] == model.config.intermediate_size
    assert record["after"]["channels"] % 32 == 0
    assert len(record["dropped"]) == 6
    assert record["after"]["kv_heads"] == 1
    for layer in record["dropped"]:
        assert layer["channels"] == 768 - record["after"]["channels"]
        assert layer["heads"] == [2 * group + i for group in layer["kv_heads"] for i in range(2)]
        assert len(layer["kv_heads"]) == 1
    assert (out / "tokenizer.json").read_bytes() == (ref_llama / "tokenizer.json").read_bytes()
    planned = command("plan", out, "--bits", "4", *SCALAR, *PROBE, "--json")
    assert planned.code == 0
    assert planned.record["size_bytes"] < record["size_bytes_after"]
    assert command("pack", out, tmp_path / "packed", "--bits", "4", *SCALAR, *PROBE).code == 0
    text = command("generate", tmp_path / "packed", "-p", "def read(path):", "--max-new-tokens", "4", "--json")
    assert text.record["tokens"] == 4


@needs_engine
def test_the_engine_runs_heads_that_do_not_fill_the_width(tmp_path: Path) -> None:
    path = tiny_qwen2(tmp_path / "model", heads=8, kv_heads=4, tokenizer=True)
    made = waterfill.prune(path, tmp_path / "out", keep_share=0.8, kv_heads=3, sequences=4, length=32)
    assert made.after == Shape(layers=2, kv_heads=3, channels=128)
    waterfill.pack(tmp_path / "out", tmp_path / "packed", bits=5, codecs=SCALAR[1::2], sequences=4, length=32)
    ids = list(range(3, 15))
    sequence = waterfill.Engine(tmp_path / "packed").sequence()
    native = torch.stack([torch.from_numpy(sequence.forward([token])).flatten() for token in ids])
    with torch.inference_mode():
        other = waterfill.load(tmp_path / "packed", dtype=torch.float32)(torch.tensor([ids])).logits[0]
    assert float((native - other).square().mean()) < 1e-4 * float(other.var())


def test_a_size_is_kept_and_the_table_says_what_went(command: Command, ref_llama: Path, tmp_path: Path) -> None:
    result = command("prune", ref_llama, tmp_path / "out", "--size", "11MB", "--what", "channels", *PROBE)
    assert result.code == 0
    size_bytes = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert 10_700_000 < size_bytes <= 11_000_000
    said = " ".join(result.out.split())
    assert "6 layers of 2 KV heads and 768 channels become 6 of 2 and 480" in said
    assert "13.64 MB become 10.99 MB" in said
    assert "predicted KL " in said
    again = command("prune", ref_llama, tmp_path / "again", "--size", "11MB", "--what", "channels", *PROBE)
    assert again.out == result.out, "a seed makes a run repeatable"


def test_a_text_and_layers(command: Command, ref_llama: Path, work: Path, tmp_path: Path) -> None:
    arguments = ["--what", "layers", "--text", work / "text.py", "--length", "64", "--sequences", "6"]
    record = command("prune", ref_llama, tmp_path / "out", "--keep-share", ".84", *arguments, "--json").record
    assert record["after"] == {"layers": 5, "kv_heads": 2, "channels": 768}
    assert [layer["whole"] for layer in record["dropped"]].count(True) == 1
    assert record["estimated"] is None
    assert loaded(tmp_path / "out").config.num_hidden_layers == 5


@pytest.mark.parametrize(("importance", "refit"), [("taylor-first", False), ("l2", False), ("random", True)])
def test_other_importances_predict_by_trying(importance: str, refit: bool, family: Family, tmp_path: Path) -> None:
    """What is predicted is the loss on sequences that nothing was scored on."""
    path = family("qwen3")
    tokens = torch.randint(250, (4, 16), generator=torch.Generator().manual_seed(0))
    options: Any = {"sequences": 4, "length": 16, "importance": importance, "multiple": 8, "refit": refit}
    made = _pruned(path, tmp_path / "out", tokens, keep_share=0.6, **options)
    assert made.estimated is None
    with torch.no_grad():
        p, q = (read(loaded(each), tokens[2:])[:, 4:-1].double().log_softmax(-1) for each in (path, tmp_path / "out"))
    of_sequences = (p.exp() * (p - q)).sum(-1).mean(1)
    assert made.kl == pytest.approx(float(of_sequences.mean()), rel=1e-3)
    assert made.kl_stderr == pytest.approx(float(of_sequences.std()) / 2**0.5, rel=1e-3)


def test_of_several_shapes_the_one_that_loses_least(family: Family, tmp_path: Path) -> None:
    tokens = torch.randint(250, (4, 16), generator=torch.Generator().manual_seed(0))
    path, options = family("qwen3"), {"multiple": 8, "keep_share": 0.5, "sequences": 4, "length": 16, "refit": False}
    chosen = _pruned(path, tmp_path / "chosen", tokens, **options)
    every = [_pruned(path, tmp_path / str(k), tokens, kv_heads=k, **options) for k in (1, 2)]
    assert chosen.kl == pytest.approx(min(each.kl for each in every), rel=1e-4)
    assert len({each.kl for each in every}) == 2
    assert chosen.estimated is not None
    best = min(every, key=lambda made: made.kl)
    assert torch.equal(logits(loaded(tmp_path / "chosen")), logits(loaded(best.path)))


def _pruned(path: Path, out: Path, tokens: torch.Tensor, **options: Any) -> Any:
    """On these tokens, whatever the model would write."""
    from waterfill.files.architecture import describe
    from waterfill.tuning.pruning.prune import prune_checkpoint

    def written(numbers: Any, length: int, *_: Any, **__: Any) -> torch.Tensor:
        return tokens[list(numbers)]

    checkpoint = open_checkpoint(path)
    return prune_checkpoint(checkpoint, describe(checkpoint), out, None, options, write_text=written)  # type: ignore[arg-type]


def test_a_short_text(command: Command, ref_llama: Path, work: Path, tmp_path: Path) -> None:
    (tmp_path / "short").write_text((work / "text.py").read_text()[:900])
    arguments = ["--keep-share", "0.8", "--text", tmp_path / "short", "--length", "64"]
    result = command("prune", ref_llama, tmp_path / "out", *arguments)
    assert result.code == 2
    assert "short holds 3 sequences of 64 tokens, of which pruning needs 4; give a longer text" in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({}, BudgetError, "exactly one of --keep-share and --size"),
        ({"keep_share": 0.5, "size": "1MB"}, BudgetError, "exactly one of --keep-share and --size"),
        (
            {"keep_share": 1.2},
            BudgetError,
            "--keep-share 1.2 is not a share to keep; give a number above 0 and below 1",
        ),
        ({"size": "1 parsec"}, BudgetError, "'1 parsec' is not a size"),
        ({"size": "1TB"}, BudgetError, r"--size 1000000000000 .* the model takes \d+ bytes"),
        ({"size": 5000}, BudgetError, "too large for that even with 1 KV heads and 32 channels"),
        ({"keep_share": 0.001}, BudgetError, "too large for that even with"),
        ({"keep_share": 0.5, "kv_heads": 9}, BudgetError, "--kv-heads 9 is not what a llama of this width may have"),
        ({"keep_share": 0.5, "kv_heads": 1, "what": "layers"}, BudgetError, "--kv-heads and --what layers do not go"),
        ({"keep_share": 0.5, "what": "words"}, WaterfillError, "what is 'words'; choose one of parts, heads"),
        ({"keep_share": 0.5, "sequences": 3}, WaterfillError, "sequences is 3; choose a whole number from 4"),
        ({"keep_share": 0.5, "multiple": 0}, WaterfillError, "multiple is 0; choose a whole number from 1"),
    ],
)
def test_refusals(
    options: dict[str, Any], error: type[WaterfillError], sentence: str, family: Family, tmp_path: Path
) -> None:
    path, out = family("llama"), tmp_path / "out"
    with pytest.raises(error, match=sentence):
        waterfill.prune(path, out, **options)
    assert not out.exists()
