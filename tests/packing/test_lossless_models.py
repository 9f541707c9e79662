"""Whole models without loss, and what other plans keep: through the command line and back, bit by bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import waterfill
from tests.support.commands import Command
from tests.support.models import (
    tiny_deepseek_v3,
    tiny_gemma,
    tiny_gpt2,
    tiny_gpt_oss,
    tiny_granite_moe,
    tiny_llama,
    tiny_mixtral,
    tiny_qwen2,
)
from tests.support.plans import plan_for, weight_bytes
from waterfill.base.errors import ArtifactError, CheckpointError, WaterfillError
from waterfill.codecs import LOSSLESS, lossless
from waterfill.files.architecture import Architecture
from waterfill.files.artifact import RAW, StoredTensor, lay_out, open_artifact
from waterfill.files.checkpoint import open_checkpoint
from waterfill.planning.budget import Budget
from waterfill.planning.menu import kept_plans
from waterfill.planning.plan import KeptPlan, Plan, kept_spec
from waterfill.planning.planner import make_plan
from waterfill.running.hf.install import install
from waterfill.studies.comparison.ours import decode

Build = Callable[..., Path]
FAMILIES = [
    tiny_llama,
    tiny_qwen2,
    tiny_gemma,
    tiny_gpt2,
    tiny_mixtral,
    tiny_granite_moe,
    tiny_gpt_oss,
    tiny_deepseek_v3,
]


def original(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **{"dtype": "auto", **options}).eval()


def assert_equal_to_the_bit(found: Any, expected: Any) -> None:
    a, b = found.state_dict(), expected.state_dict()
    assert list(a) == list(b)
    for name, tensor in b.items():
        assert a[name].dtype == tensor.dtype, name
        assert torch.equal(
            a[name].contiguous().reshape(-1).view(torch.uint8), tensor.contiguous().reshape(-1).view(torch.uint8)
        ), name
    trainable = [[(n, p.requires_grad) for n, p in model.named_parameters()] for model in (found, expected)]
    assert trainable[0] == trainable[1]
    assert found.all_tied_weights_keys == expected.all_tied_weights_keys
    head, embedding = expected.get_output_embeddings(), expected.get_input_embeddings()
    tied = head.weight is embedding.weight
    assert (found.get_output_embeddings().weight is found.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("build", FAMILIES)
def test_every_family_comes_back(build: Build, tmp_path: Path) -> None:
    narrow = {} if build is tiny_gpt2 else {"intermediate": 176}  # what a grouped product of experts can take
    model = build(tmp_path / "model", **narrow)
    plan = waterfill.pack(model, tmp_path / "out", lossless=True)
    assert not plan.tensors
    assert plan.size_bytes == weight_bytes(tmp_path / "out") < 0.85 * weight_bytes(model)
    assert {kept.codec for kept in plan.kept} <= {RAW, LOSSLESS}
    loaded, expected = waterfill.load(tmp_path / "out"), original(model)
    assert_equal_to_the_bit(loaded, expected)
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_on_disk(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", dtype=dtype, tied=True)
    plan = waterfill.pack(model, tmp_path / "out", lossless=True)
    assert all(kept.dtype == {torch.float32: "F32", torch.float16: "F16"}[dtype] for kept in plan.kept)
    assert_equal_to_the_bit(waterfill.load(tmp_path / "out"), original(model))


@pytest.mark.parametrize("build", [tiny_llama, tiny_deepseek_v3, tiny_gpt_oss])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_loading_in_another_dtype_converts_as_transformers_does(
    build: Build, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = build(tmp_path / "model")
    waterfill.pack(model, tmp_path / "out", lossless=True)
    assert_equal_to_the_bit(waterfill.load(tmp_path / "out", dtype=dtype), original(model, dtype=dtype))


def test_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(tmp_path / "model", shards=3)
    made = waterfill.plan(model, lossless=True)
    cut = Plan(**{**vars(made), "shard_bytes": 40_000})
    with pytest.raises(WaterfillError, match="promises"):
        waterfill.pack(model, tmp_path / "out", plan=cut)
    monkeypatch.setattr("waterfill.planning.planner.make_lossless_plan.__defaults__", (40_000,))
    plan = waterfill.pack(model, tmp_path / "out", lossless=True)
    assert plan.shard_bytes == 40_000
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert plan.size_bytes == weight_bytes(tmp_path / "out")
    assert_equal_to_the_bit(waterfill.load(tmp_path / "out"), original(model))


# --------------------------------------------------------------------------------------------------- the command line


def test_a_trained_model_through_the_command_line(command: Command, ref_llama: Path, tmp_path: Path) -> None:
    out, saved = tmp_path / "out", tmp_path / "plan.json"
    planned = command("plan", ref_llama, "--lossless", "--save", saved, "--json")
    assert planned.code == 0
    record = planned.record
    assert record["budget"] == {"lossless": True}
    assert record["predicted"]["kl"] == record["predicted"]["kl_high"] == 0
    assert record["predicted"]["ppl"] is None
    assert not saved.with_suffix(".sensitivity.json").exists()
    packed = command("pack", ref_llama, out, "--plan", saved, "--json")
    assert {**packed.record, "path": 0} == {**record, "path": 0}
    assert record["size_bytes"] == weight_bytes(out)
    assert record["size_bytes"] < 0.67 * weight_bytes(ref_llama)

    shown = command("inspect", out)
    assert shown.code == 0
    assert "lossless: every bit comes back" in shown.out
    assert "model.embed_tokens.weight" in shown.out
    said = command(
        "generate", out, "-p", "def read_file(path):", "--temperature", "0", "--max-new-tokens", "12", "--json"
    )
    tokenizer = waterfill.api.load_tokenizer(ref_llama)
    model = original(ref_llama)
    ids = tokenizer("def read_file(path):", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :]
    assert said.record["text"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert_equal_to_the_bit(waterfill.load(out), model)


def test_within_two_percent_of_the_entropy_of_exponents(ref_llama: Path) -> None:
    """Of all tensors together; each tensor's own distribution is the yardstick."""
    plan = waterfill.plan(ref_llama, lossless=True)
    ideal = 0.0
    for tensor in load_file(ref_llama / "model.safetensors").values():
        exponent = (tensor.view(torch.int16).numpy().astype(np.int64).reshape(-1) >> 7) & 255
        share = np.bincount(exponent) / exponent.size
        ideal += exponent.size * (8 - float(np.sum(share[share > 0] * np.log2(share[share > 0])))) / 8
    assert sum(kept.size_bytes for kept in plan.kept) < 1.02 * ideal
    assert plan.size_bytes < 1.02 * ideal


@pytest.mark.parametrize(
    "options",
    [["--size", "3MB"], ["--bits", "4"], ["--max-kl", "0.1"], ["--keep", "*"], ["--for", "memory"], ["--seed", "3"]],
)
def test_nothing_else_can_be_asked_for(command: Command, llama: Path, options: list[str]) -> None:
    result = command("plan", llama, "--lossless", *options)
    assert result.code == 2
    assert "a lossless plan keeps every bit, whatever else is asked for; leave out" in result.err
    assert command("plan", llama).err.count("--lossless") == 1


def test_evaluating_finds_no_difference(command: Command, ref_llama: Path, tmp_path: Path, work: Path) -> None:
    waterfill.pack(ref_llama, tmp_path / "out", lossless=True)
    arguments = ["--against", ref_llama, "--text", work / "text.py", "--windows", "1", "--context", "64", "--json"]
    record = command("eval", tmp_path / "out", *arguments).record
    assert abs(record["kl"]) < 1e-9
    assert record["top1_agreement"] == 1
    assert record["predicted_kl"] == record["predicted_high"] == 0


# ------------------------------------------------------------------------------------------------- what plans keep


@pytest.mark.parametrize(
    ("build", "keep"),
    [
        (tiny_llama, ["model.embed_tokens", "*.mlp.down_proj"]),
        (tiny_gemma, ["model.embed_tokens"]),
        (tiny_gpt2, ["*.c_attn"]),
        (tiny_mixtral, ["*.experts.*"]),
    ],
)
def test_what_is_kept_is_coded_where_it_saves(build: Build, keep: list[str], tmp_path: Path) -> None:
    model = build(tmp_path / "model")
    options: dict[str, Any] = {"codecs": ["higgs-p1-n16"], "sequences": 2, "length": 8}
    plan = waterfill.pack(model, tmp_path / "out", bits=5, keep=keep, **options)
    assert plan.size_bytes == weight_bytes(tmp_path / "out")
    coded = [kept for kept in plan.kept if kept.codec == LOSSLESS]
    assert coded
    assert all(kept.size_bytes < kept.original_bytes for kept in coded)
    assert sum(kept.size_bytes for kept in coded) < 0.85 * sum(kept.original_bytes for kept in coded)
    loaded, expected = waterfill.load(tmp_path / "out").state_dict(), original(model).state_dict()
    for kept in plan.kept:
        assert torch.equal(loaded[kept.name], expected[kept.name]), kept.name


def test_a_generous_budget_codes_the_matrices_it_leaves(tmp_path: Path) -> None:
    """GPT-2 has them transposed."""
    for build in (tiny_llama, tiny_gpt2):
        model = build(tmp_path / build.__name__)
        out = tmp_path / f"{build.__name__}-out"
        options: dict[str, Any] = {"codecs": ["higgs-p1-n16", "raw"], "sequences": 2, "length": 8}
        plan = waterfill.pack(model, out, bits=17, **options)
        assert {tensor.codec for tensor in plan.tensors} == {LOSSLESS}
        assert all(tensor.rate_bits < 14 and tensor.kl == 0 for tensor in plan.tensors)
        assert plan.size_bytes == weight_bytes(out)
        assert_equal_to_the_bit(waterfill.load(out), original(model))
        assert waterfill.inspect(out).measured_t2 == {}
        decode(open_artifact(out), lambda name, _: pytest.fail(f"{name} is exact in the model already"))


def test_tensors_stay_raw_where_the_header_would_eat_the_savings(dense: Architecture) -> None:
    whole = {kept.name: 2 * math.prod(kept.shape) for kept in dense.kept}

    def choice(saved: int) -> set[str]:
        return {plan.codec for plan in kept_plans(dense, lambda name: whole[name] - saved)}

    assert choice(-2) == choice(0) == choice(2) == {RAW}
    assert choice(60) == {LOSSLESS}
    name, shape = dense.kept[0].name, dense.kept[0].shape
    least = next(saved for saved in range(0, 60, 2) if choice(saved) != {RAW})
    sizes, other = [], kept_spec("other", LOSSLESS, (8,), "BF16", 16)  # which the guard of the shard stands for
    for codec, size in ((RAW, 2 * shape[0]), (LOSSLESS, 2 * shape[0] - least)):
        spec = KeptPlan(name, shape, "BF16", size, codec).spec()
        sizes.append(lay_out([other, spec]).size_bytes)
    assert sizes[1] <= sizes[0]


def test_plans_without_sizes_keep_tensors_raw(llama: Path) -> None:
    assert {kept.codec for kept in plan_for(llama, budget=Budget(bits=5)).kept} == {RAW}
    assert signature(make_plan).parameters["coded_bytes"].default is None


# ------------------------------------------------------------------------------------------------------- interruptions


def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    waterfill.pack(model, tmp_path / "whole", lossless=True)

    def stop(what: str, done: int, total: int) -> None:
        if what == "packing" and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        waterfill.pack(model, tmp_path / "out", lossless=True, progress=stop)
    seen: list[tuple[str, int, int]] = []
    waterfill.pack(model, tmp_path / "out", lossless=True, progress=lambda *step: seen.append(step))
    packing = [(done, total) for what, done, total in seen if what == "packing"]
    assert packing[0][0] > packing[0][1] / 3, "the tensor that was under way begins again"
    assert packing[-1][0] == packing[-1][1]
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def test_weights_that_changed_after_planning_are_noticed(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", hidden=128, vocab=512)
    plan = waterfill.plan(model, lossless=True)
    file = model / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    for value in (0.0, 1e-9):  # in fewer bytes, in more
        changed = tensors[name].clone().reshape(-1)
        middle = changed[2000:-2000]  # beyond the samples of the fingerprint
        middle[: len(middle) // 3] = value if value == 0 else torch.randn(len(middle) // 3).mul(1e-9).to(changed.dtype)
        middle = None
        save_file({**tensors, name: changed.view(tensors[name].shape)}, file, {"format": "pt"})
        if open_checkpoint(model).fingerprint == plan.fingerprint:
            with pytest.raises(CheckpointError, match=r"does not fill|weights have changed"):
                waterfill.pack(model, tmp_path / f"out{value}", plan=plan)
        else:
            pytest.fail("the fingerprint saw it")


def test_a_weight_that_is_no_number_is_refused(llama: Path, tmp_path: Path) -> None:
    file = llama / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' holds 1 NaN"):
        waterfill.pack(llama, tmp_path / "out", lossless=True)


# ------------------------------------------------------------------------------------------------------------- hostile


def stored(path: Path, tensor: str, changed: dict[str, Any]) -> StoredTensor:
    found = open_artifact(path).tensors[tensor]
    return StoredTensor(**{**vars(found), **changed})


def test_records_that_do_not_fit_the_model_are_refused(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    waterfill.pack(model, tmp_path / "out", lossless=True)
    name, config = "model.embed_tokens.weight", original(model).config
    for changed, message in [
        ({"name": "model.embed_tokens.bias"}, "has no place in"),
        ({"name": "model.nothing.weight"}, "has no place in"),
        ({"name": "model.embed_tokens"}, "has no place in"),
        ({"shape": (256, 65)}, r"is BF16 \[256, 65\] where the model has \[256, 64\]"),
        ({"dtype": "I32"}, "is I32"),
        ({"buffers": ()}, "is not stored as 'streams' alone"),
    ]:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
        with pytest.raises(ArtifactError, match=message):
            install(skeleton, [stored(tmp_path / "out", name, changed)])


def test_streams_that_lie_end_in_an_error(tmp_path: Path) -> None:
    """As a forger may, who makes the digests right; here they are not compared."""
    model = tiny_llama(tmp_path / "model")
    waterfill.pack(model, tmp_path / "out", lossless=True)
    place = open_artifact(tmp_path / "out").tensors["model.embed_tokens.weight"].buffers[0]
    with place.file.open("r+b") as file:
        file.seek(place.offset_bytes)
        file.write(b"\xff\xff\xff\xff")
    with pytest.raises(ArtifactError, match="does not match its digest"):
        waterfill.load(tmp_path / "out")
    with pytest.raises(ArtifactError, match="the index of a losslessly coded tensor is damaged"):
        waterfill.load(tmp_path / "out", verify=False)


def test_buffers_are_named_by_the_codec() -> None:
    assert lossless.BUFFER == "streams"
