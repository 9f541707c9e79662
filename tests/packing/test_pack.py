"""Packing from end to end: exact sizes, repeatable bytes, interruptions, bounded memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import waterfill
from tests.support import models
from tests.support.artifact_samples import directory_bytes
from tests.support.plans import QUICK, SCALAR, plan_for, weight_bytes
from waterfill.base.errors import ArtifactError
from waterfill.codecs import LOSSLESS, Encoded, get_codec
from waterfill.codecs import contract as codec_base
from waterfill.files.architecture import describe
from waterfill.files.artifact import RAW, open_artifact
from waterfill.files.checkpoint import open_checkpoint
from waterfill.packing.pack import pack_plan
from waterfill.planning.budget import Budget
from waterfill.planning.plan import Plan

pack_module = import_module("waterfill.packing.pack")  # `waterfill.pack` is the verb


# ---------------------------------------------------------------------------------------------------- sizes and bytes


@pytest.mark.parametrize("builder", [models.tiny_llama, models.tiny_gpt2, models.tiny_gpt_oss, models.tiny_gemma])
@pytest.mark.parametrize("budget", [{"size": "90kB"}, {"bits": 3.3}, {"max_kl": 0.5}])
def test_written_bytes_are_the_predicted_ones(builder: Any, budget: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = builder(tmp_path / "model", layers=1)
    plan = waterfill.pack(checkpoint, tmp_path / "out", **budget, **QUICK)
    assert weight_bytes(tmp_path / "out") == plan.size_bytes
    assert waterfill.inspect(tmp_path / "out").size_bytes == plan.size_bytes
    stored = open_artifact(tmp_path / "out").tensors
    for tensor in plan.tensors:
        assert sum(buffer.size_bytes for buffer in stored[tensor.spec().name].buffers) == tensor.size_bytes
    if "size" in budget:
        assert plan.size_bytes <= 90_000
    if "bits" in budget:
        assert 8 * sum(t.size_bytes for t in plan.tensors) <= 3.3 * sum(t.weights for t in plan.tensors)
    if "max_kl" in budget:
        assert plan.predicted.kl <= 0.5


def test_the_same_command_gives_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    for out in ("one", "two"):
        waterfill.pack(llama, tmp_path / out, size="90kB", seed=3, **QUICK)
    one = directory_bytes(tmp_path / "one")
    assert one == directory_bytes(tmp_path / "two")
    assert {"config.json", "model.safetensors", "waterfill.json", "waterfill-plan.json"} < set(one)
    assert not list(tmp_path.glob("*.partial"))


def test_a_saved_plan_gives_the_bytes_of_packing_at_once(llama: Path, tmp_path: Path) -> None:
    at_once = waterfill.pack(llama, tmp_path / "at-once", bits=4, **QUICK)
    waterfill.plan(llama, bits=4, save=tmp_path / "plan.json", **QUICK)
    carried_out = waterfill.pack(llama, tmp_path / "by-plan", plan=tmp_path / "plan.json")
    assert carried_out == at_once == Plan.load(tmp_path / "by-plan" / "waterfill-plan.json")
    expected = directory_bytes(tmp_path / "at-once")
    found = directory_bytes(tmp_path / "by-plan")
    assert found["model.safetensors"] == expected["model.safetensors"]
    saved = (tmp_path / "plan.sensitivity.json").read_bytes()
    assert expected["waterfill-sensitivity.json"] == saved
    again = waterfill.plan(llama, bits=4, codecs=SCALAR, sensitivity=tmp_path / "plan.sensitivity.json")
    assert again == at_once


@pytest.mark.parametrize("codec", ["higgs-p1-n8", "higgs-p2-n64", "higgs-p4-n256"])
def test_blocks_of_any_size_give_the_same_bytes(codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = models.tiny_gpt2(tmp_path / "model", layers=1)  # some rows are columns on disk
    plan = plan_for(checkpoint, [codec], budget=Budget(bits=9))
    for block_weights in (300, 5000, 1 << 21):
        monkeypatch.setattr(codec_base, "BLOCK_WEIGHTS", block_weights)
        waterfill.pack(checkpoint, tmp_path / str(block_weights), plan=plan)
    whole = directory_bytes(tmp_path / str(1 << 21))
    assert directory_bytes(tmp_path / "300") == whole
    assert directory_bytes(tmp_path / "5000") == whole


def test_stored_matrices_decode_to_the_noise_that_is_noted(llama: Path, tmp_path: Path) -> None:
    plan = waterfill.pack(llama, tmp_path / "out", bits=3, **QUICK)
    stored = open_artifact(tmp_path / "out")
    weights = load_file(llama / "model.safetensors")
    for tensor in plan.tensors:
        record = stored.tensors[tensor.name]
        buffers = {key: stored.read(f"{tensor.name}.{key}") for key in ("scales", "codes")}
        decoded = get_codec(record.codec).decode(Encoded(tensor.shape, buffers, record.exponent, 0.0, 0.0))
        weight = weights[tensor.parameter].float()
        t2 = float((decoded - weight).square().sum() / weight.square().sum())
        assert record.t2 == pytest.approx(t2, rel=1e-4)
        assert record.t2 == pytest.approx(tensor.t2, rel=0.25), "small matrices are only roughly Gaussian"


def test_codes_of_an_odd_length_are_padded(tmp_path: Path) -> None:
    checkpoint = models.tiny_llama(tmp_path / "model", hidden=40, vocab=257, layers=1)
    plan = plan_for(checkpoint, ["higgs-p1-n8"], budget=Budget(bits=9))
    waterfill.pack(checkpoint, tmp_path / "out", plan=plan)
    codes = open_artifact(tmp_path / "out").read("model.embed_tokens.codes")
    assert len(codes) == 257 * 15 + 1
    assert codes[-1] == 0
    assert weight_bytes(tmp_path / "out") == plan.size_bytes
    embedding = waterfill.load(tmp_path / "out").get_input_embeddings()
    assert embedding(torch.tensor([256])).isfinite().all()


def test_a_budget_for_everything_keeps_every_bit(tmp_path: Path) -> None:
    for builder in (models.tiny_llama, models.tiny_gpt2):
        checkpoint, out = builder(tmp_path / builder.__name__), tmp_path / f"{builder.__name__}-out"
        plan = waterfill.pack(checkpoint, out, bits=16, sequences=2, length=16)
        assert {tensor.codec for tensor in plan.tensors} == {LOSSLESS}
        assert plan.predicted.kl == 0
        packed = waterfill.load(out).state_dict()
        expected = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
        assert packed.keys() == expected.keys()
        assert all(torch.equal(packed[name], expected[name]) for name in expected)


def test_raw_and_packed_matrices_live_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec_base, "BLOCK_WEIGHTS", 1000)
    checkpoint = models.tiny_gpt2(tmp_path / "model")
    plan = plan_for(checkpoint, ["higgs-p1-n256", RAW], budget=Budget(bits=13))
    raw = [tensor.parameter for tensor in plan.tensors if tensor.codec == RAW]
    assert 0 < len(raw) < len(plan.tensors)
    waterfill.pack(checkpoint, tmp_path / "out", plan=plan)
    packed, weights = waterfill.load(tmp_path / "out").state_dict(), load_file(checkpoint / "model.safetensors")
    for name in raw:
        assert torch.equal(
            packed[name], weights[name.removeprefix("transformer.")] if name not in weights else weights[name]
        )


def test_kept_tensors_keep_every_bit(llama: Path, tmp_path: Path) -> None:
    patterns = ["model.embed_tokens", "*.v_proj", "model.layers.0.*"]
    plan = waterfill.pack(llama, tmp_path / "out", bits=4, keep=patterns, **QUICK)
    assert plan.keep == tuple(patterns)
    kept = {tensor.name for tensor in plan.kept}
    assert {"model.embed_tokens.weight", "model.layers.1.self_attn.v_proj.weight"} <= kept
    assert all(name.startswith(("model.layers.1.", "lm_head")) for name in (tensor.name for tensor in plan.tensors))
    assert weight_bytes(tmp_path / "out") == plan.size_bytes
    packed, weights = waterfill.load(tmp_path / "out").state_dict(), load_file(llama / "model.safetensors")
    assert all(torch.equal(packed[name], weights[name]) for name in kept)


def test_many_shards_load_as_one(llama: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(llama)
    for shard_bytes, name in ((30_000, "many"), (1 << 30, "one")):
        plan = plan_for(llama, budget=Budget(bits=5), shard_bytes=shard_bytes)
        pack_plan(plan, checkpoint, describe(checkpoint), tmp_path / name)
        assert weight_bytes(tmp_path / name) == plan.size_bytes
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2
    assert (tmp_path / "many" / "model.safetensors.index.json").exists()
    many, one = (waterfill.load(tmp_path / name) for name in ("many", "one"))
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(many(ids).logits, one(ids).logits)


def test_sharded_checkpoints_pack_to_the_same_bytes(tmp_path: Path) -> None:
    whole = models.tiny_llama(tmp_path / "whole")
    split = models.tiny_llama(tmp_path / "split", shards=3)
    for checkpoint in (whole, split):
        waterfill.pack(checkpoint, tmp_path / f"{checkpoint.name}-out", bits=4, **QUICK)
    name = "model.safetensors"
    assert (tmp_path / "whole-out" / name).read_bytes() == (tmp_path / "split-out" / name).read_bytes()


def test_whatever_makes_a_directory_a_model_comes_along(tmp_path: Path) -> None:
    checkpoint = models.tiny_llama(tmp_path / "model", tokenizer=True)
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}")
    (checkpoint / "LICENSE").write_text("Apache-2.0")
    (checkpoint / "optimizer.pt").write_bytes(b"not this")
    waterfill.pack(checkpoint, tmp_path / "out", plan=plan_for(checkpoint, budget=Budget(bits=5)))
    before, after = directory_bytes(checkpoint), directory_bytes(tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "LICENSE"):
        assert after[name] == before[name]
    assert "optimizer.pt" not in after
    config = json.loads(after["config.json"])
    assert config.pop("quantization_config") == {"quant_method": "waterfill", "format_version": 1}
    assert config == json.loads(before["config.json"])


def test_progress_counts_weights_up_to_all(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec_base, "BLOCK_WEIGHTS", 4096)
    plan = plan_for(llama, budget=Budget(bits=5))
    seen: list[tuple[str, int, int]] = []
    waterfill.pack(llama, tmp_path / "out", plan=plan, progress=lambda *step: seen.append(step))
    total = sum(tensor.weights for tensor in plan.tensors)
    packing = [(done, of) for what, done, of in seen if what == "packing"]
    assert all(of == total for _, of in packing)
    counts = [done for done, _ in packing]
    assert counts == sorted(set(counts))
    assert counts[-1] == total
    assert counts[0] == 0
    assert max(b - a for a, b in pairwise(counts)) <= 4096


# ------------------------------------------------------------------------------------------------------ interruptions


KILLED = """
import importlib, os, signal, sys
import waterfill
importlib.import_module("waterfill.codecs.contract").BLOCK_WEIGHTS = 4096  # several blocks per tensor

def kill(what, done, total):
    if what == "packing" and done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)

waterfill.pack(sys.argv[1], sys.argv[2], plan=sys.argv[3], progress=kill)
"""


def test_a_killed_run_is_continued_to_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    plan = plan_for(llama, budget=Budget(bits=5))
    plan_file = tmp_path / "plan.json"
    plan_file.write_text(plan.to_json())
    out = tmp_path / "out"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, llama, out, plan_file], capture_output=True, text=True, timeout=300, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()
    done = len((tmp_path / "out.partial" / "ledger.jsonl").read_text().splitlines()) - 1
    assert 0 < done < len(plan.specs())
    seen: list[tuple[str, int, int]] = []
    waterfill.pack(llama, out, plan=plan_file, progress=lambda *step: seen.append(step))
    packing = [done for what, done, _ in seen if what == "packing"]
    assert packing[0] > sum(tensor.weights for tensor in plan.tensors) // 4, "it did not begin again"
    waterfill.pack(llama, tmp_path / "undisturbed", plan=plan_file)
    assert directory_bytes(out) == directory_bytes(tmp_path / "undisturbed")
    assert not (tmp_path / "out.partial").exists()


class InterruptAt:
    """Ctrl-C at the given block of packing: its rows are written then, its matrix not declared complete yet."""

    def __init__(self, step: int) -> None:
        self.left = 1 + step  # the first says where it begins

    def __call__(self, what: str, done: int, total: int) -> None:
        self.left -= what == "packing"
        if self.left == 0:
            raise KeyboardInterrupt


def test_a_run_may_be_interrupted_at_every_matrix(llama: Path, tmp_path: Path) -> None:
    plan = plan_for(llama, budget=Budget(bits=5))
    waterfill.pack(llama, tmp_path / "undisturbed", plan=plan)
    out = tmp_path / "out"
    runs = 0
    while not out.exists():
        runs += 1
        with suppress(KeyboardInterrupt):
            waterfill.pack(llama, out, plan=plan, progress=InterruptAt(2))
    assert runs == len(plan.tensors)
    assert directory_bytes(out) == directory_bytes(tmp_path / "undisturbed")


def test_an_unfinished_run_of_another_plan_is_not_continued(llama: Path, tmp_path: Path) -> None:
    plan, other = (plan_for(llama, budget=Budget(bits=bits)) for bits in (5, 4))
    with pytest.raises(KeyboardInterrupt):
        waterfill.pack(llama, tmp_path / "out", plan=plan, progress=InterruptAt(3))
    with pytest.raises(ArtifactError, match=r"out\.partial holds an unfinished run of another plan"):
        waterfill.pack(llama, tmp_path / "out", plan=other)
    waterfill.pack(llama, tmp_path / "out", plan=other, overwrite=True)
    waterfill.pack(llama, tmp_path / "undisturbed", plan=other)
    assert directory_bytes(tmp_path / "out") == directory_bytes(tmp_path / "undisturbed")


# ----------------------------------------------------------------------------------------------------------- memory


PACKED_WITHIN = """
import sys
import waterfill
from waterfill.files.architecture import describe
from waterfill.files.checkpoint import open_checkpoint

def peak_bytes():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])

describe(open_checkpoint(sys.argv[1]))
before = peak_bytes()
waterfill.pack(sys.argv[1], sys.argv[2], plan=sys.argv[3])
print(peak_bytes() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_holds_blocks_of_rows_not_tensors(tmp_path: Path) -> None:
    checkpoint = models.tiny_llama(
        tmp_path / "model", hidden=128, vocab=200_000, layers=1, tied=True, dtype=torch.float32
    )
    plan = plan_for(checkpoint, ["higgs-p1-n4"], budget=Budget(bits=3))
    assert max(tensor.weights for tensor in plan.tensors) * 4 > 100_000_000
    (tmp_path / "plan.json").write_text(plan.to_json())
    done = subprocess.run(
        [sys.executable, "-c", PACKED_WITHIN, checkpoint, tmp_path / "out", tmp_path / "plan.json"],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert int(done.stdout) < 150_000_000
    assert weight_bytes(tmp_path / "out") == plan.size_bytes
