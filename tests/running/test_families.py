"""Packed models of every family: they compute what their dense twins do, and transformers loads them like any other."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

import waterfill
from tests.support import models
from tests.support.family_check import dense_twin, original
from waterfill import kernels
from waterfill.base.errors import ArtifactError
from waterfill.running.hf.packed import PackedLinear, PackedMatrix, TiedLinear

FAMILIES: dict[str, Callable[..., Path]] = {
    name.removeprefix("tiny_"): builder for name, builder in vars(models).items() if name.startswith("tiny_")
}
CODED = ["higgs-p1-n256", "trellis-s8-r6.0000"]  # fixed rate, entropy-coded


@pytest.fixture(autouse=True)
def _float_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here is the runtime; what integers cost is tested with the kernels."""
    monkeypatch.setenv("WATERFILL_ACTIVATIONS", "float")


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """Checkpoint and artifact of a family at 8 bits or entropy-coded at 6, made when first asked for."""
    root = tmp_path_factory.mktemp("families")

    def pack(family: str, codec: str = CODED[0]) -> tuple[Path, Path]:
        checkpoint, artifact = root / family, root / f"{family}-{codec}"
        if not checkpoint.exists():
            FAMILIES[family](checkpoint)
        if not artifact.exists():
            waterfill.pack(checkpoint, artifact, bits=12, codecs=[codec], sequences=2, length=16)
        return checkpoint, artifact

    return pack


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def token_ids() -> torch.Tensor:
    return torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def log_probabilities(model: Any) -> torch.Tensor:
    return model(input_ids=token_ids()).logits.float().log_softmax(-1)


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("codec", CODED)
def test_a_packed_model_computes_what_its_dense_twin_does(
    family: str, codec: str, packed: Callable[..., tuple[Path, Path]]
) -> None:
    checkpoint, artifact = packed(family, codec)
    model = waterfill.load(artifact, dtype=torch.float32)
    scores = log_probabilities(model)
    torch.testing.assert_close(scores, log_probabilities(dense_twin(checkpoint, artifact)), atol=2e-4, rtol=0)
    before = log_probabilities(original(checkpoint))
    assert divergence(before, scores) < 0.02 < 0.2 < divergence(before, before.roll(1, dims=1))
    half = waterfill.load(artifact)
    assert half.dtype == torch.bfloat16, "of the checkpoint, unless told otherwise"
    assert divergence(before, log_probabilities(half)) < 0.02


def test_weights_stay_packed_and_every_key_finds_its_place(
    family: str, packed: Callable[..., tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "arrange", lambda matrix: matrix)  # native chunks would pad matrices as small as these
    checkpoint, artifact = packed(family)
    model, info = AutoModelForCausalLM.from_pretrained(artifact, output_loading_info=True)
    assert {kind: keys for kind, keys in info.items() if keys} == {}
    tensors = [*model.parameters(), *model.buffers()]
    held_bytes = sum(tensor.nbytes for tensor in tensors)
    assert held_bytes <= waterfill.inspect(artifact).size_bytes
    assert held_bytes < 0.6 * sum(
        parameter.nbytes for parameter in AutoModelForCausalLM.from_pretrained(checkpoint).parameters()
    )
    assert all(tensor.device.type == "cpu" for tensor in tensors)
    modules = dict(model.named_modules())
    for name in waterfill.inspect(artifact).measured_t2:
        assert isinstance(modules[name], PackedMatrix)
    assert torch.equal(log_probabilities(model.eval()), log_probabilities(waterfill.load(artifact)))


@pytest.mark.parametrize("codec", CODED)
def test_generation_with_the_cache_is_generation_without(
    family: str, codec: str, packed: Callable[..., tuple[Path, Path]]
) -> None:
    model = waterfill.load(packed(family, codec)[1], dtype=torch.float32)
    prompt = token_ids()[:, :5]
    mask = torch.ones_like(prompt)
    generated = [
        model.generate(prompt, attention_mask=mask, max_new_tokens=8, do_sample=False, use_cache=cached, pad_token_id=0)
        for cached in (True, False)
    ]
    assert torch.equal(*generated)
    assert generated[0].shape == (2, 13)


@pytest.mark.parametrize("family", ["mixtral", "granite_moe", "gpt_oss", "deepseek_v3"])
def test_experts_are_multiplied_from_their_codes(
    family: str, packed: Callable[..., tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = waterfill.load(packed(family)[1])
    expected = log_probabilities(model)

    def refuse(matrix: PackedMatrix) -> torch.Tensor:
        raise AssertionError("decoded")

    monkeypatch.setattr(PackedMatrix, "dense", refuse)
    assert torch.equal(log_probabilities(model), expected)


def test_streams_become_levels_when_they_are_loaded(
    packed: Callable[..., tuple[Path, Path]], caplog: pytest.LogCaptureFixture
) -> None:
    artifact = packed("llama", CODED[1])[1]
    with caplog.at_level(logging.INFO, logger="waterfill"):
        model = waterfill.load(artifact)
    assert not any("streams" in name for name, _ in model.named_buffers())
    assert {m.codec.name for m in model.modules() if isinstance(m, PackedMatrix)} == {"levels-16"}
    (said,) = [record.message for record in caplog.records if "levels" in record.message]
    held = sum(buffer.nbytes for m in model.modules() if isinstance(m, PackedMatrix) for buffer in m.buffers())
    assert said.startswith(f"{held / 1e6:.1f} MB of memory for the levels of coded weights")


def test_tied_heads_stay_tied(packed: Callable[..., tuple[Path, Path]]) -> None:
    for family, tied in (("gemma", True), ("gpt2", True), ("granite_moe", True), ("llama", False), ("gpt_oss", False)):
        model = waterfill.load(packed(family)[1])
        assert isinstance(model.get_output_embeddings(), TiedLinear) == tied, family
        model.tie_weights()
        assert isinstance(model.get_output_embeddings(), TiedLinear) == tied, family


def test_a_head_may_be_packed_while_the_embedding_is_kept(tmp_path: Path) -> None:
    checkpoint = models.tiny_llama(tmp_path / "untied")
    artifact = tmp_path / "packed"
    options: Any = {"bits": 9, "codecs": ["higgs-p1-n256"], "sequences": 2, "length": 16}
    waterfill.pack(checkpoint, artifact, keep=["model.embed_tokens", "*.gate_proj"], **options)
    model = waterfill.load(artifact, dtype=torch.float32)
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert type(model.model.layers[0].mlp.gate_proj) is nn.Linear
    assert isinstance(model.get_output_embeddings(), PackedLinear)
    torch.testing.assert_close(
        log_probabilities(model), log_probabilities(dense_twin(checkpoint, artifact)), atol=2e-4, rtol=0
    )


def test_pipelines_run_packed_models_unchanged(tmp_path: Path) -> None:
    checkpoint = models.tiny_llama(tmp_path / "model", tokenizer=True)
    artifact = tmp_path / "packed"
    waterfill.pack(checkpoint, artifact, bits=9, codecs=["higgs-p1-n256"], sequences=2, length=16)
    model, tokenizer = waterfill.load(artifact), AutoTokenizer.from_pretrained(artifact)
    run = pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = run("def f(x):", max_new_tokens=6, do_sample=False)[0]["generated_text"]
    inputs = tokenizer("def f(x):", return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0]
    assert text == tokenizer.decode(expected, skip_special_tokens=True)
    assert text.startswith("def f(x):")
    by_path = pipeline("text-generation", model=str(artifact))
    assert by_path("def f(x):", max_new_tokens=6, do_sample=False)[0]["generated_text"] == text


# -------------------------------------------------------------------------------------------------------- the plug-in


LOAD_ALL = """
import sys, torch
{first}
from transformers import AutoModelForCausalLM
from transformers.utils import logging
logging.disable_progress_bar()
ids = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(1))
found = {{}}
with torch.inference_mode():
    for path in sys.argv[2:]:
        model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
        scores = model.eval()(input_ids=ids).logits.float().log_softmax(-1)
        found[path] = scores, {{kind: sorted(keys) for kind, keys in info.items()}}
torch.save(found, sys.argv[1])
"""


def load_elsewhere(first: str, artifacts: list[Path], out: Path) -> tuple[dict[str, Any], str]:
    """Load artifacts in a process of their own, which executes `first`; scores and loading infos, and what it logs."""
    script = LOAD_ALL.format(first=first)
    done = subprocess.run(
        [sys.executable, "-c", script, out, *artifacts], capture_output=True, text=True, check=True, timeout=300
    )
    return torch.load(out), done.stderr


def test_importing_waterfill_is_all_that_transformers_needs(
    packed: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    artifacts = {family: packed(family)[1] for family in FAMILIES}
    found, _ = load_elsewhere("import waterfill", list(artifacts.values()), tmp_path / "scores.pt")
    for family, artifact in artifacts.items():
        scores, info = found[str(artifact)]
        assert not any(info.values()), family
        own = log_probabilities(waterfill.load(artifact, dtype=torch.float32))
        torch.testing.assert_close(scores, own, atol=1e-5, rtol=0, msg=family)


def test_transformers_alone_does_not_go_on_with_random_weights(
    packed: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        load_elsewhere("", [packed("llama")[1]], tmp_path / "scores.pt")
    assert "Unknown quantization type, got waterfill" in failed.value.stderr
    assert "RuntimeError" in failed.value.stderr
    assert "ignore_mismatched_sizes" in failed.value.stderr


@pytest.mark.parametrize("family", [*FAMILIES, "lossless"])
def test_a_shard_is_not_loaded_where_config_json_does_not_name_its_quantiser(
    packed: Callable[..., tuple[Path, Path]], llama: Path, tmp_path: Path, family: str
) -> None:
    out = tmp_path / "out"
    if family == "lossless":
        waterfill.pack(llama, out, lossless=True)
    else:
        shutil.copytree(packed(family)[1], out)
    config = out / "config.json"
    sound = config.read_text()
    for name in ("quaftization_config", "Quantization_config", "x"):
        config.write_text(sound.replace("quantization_config", name))
        for model_class in (AutoModelForCausalLM, AutoModel):
            with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
                model_class.from_pretrained(out)
    config.write_text(sound)
    AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize("switch", ["verified", "streamed", "dequantize"])
def test_a_config_cannot_switch_checks_off(artifact: Path, switch: str) -> None:
    config = json.loads((artifact / "config.json").read_text())
    config["quantization_config"][switch] = True
    (artifact / "config.json").write_text(json.dumps(config))
    expected = waterfill.load(artifact, verify=False)
    found = AutoModelForCausalLM.from_pretrained(artifact, dtype="auto")
    assert torch.equal(found(torch.tensor([[1, 2]])).logits, expected(torch.tensor([[1, 2]])).logits)
    flip(artifact / "model.safetensors", (artifact / "model.safetensors").stat().st_size - 3)
    with pytest.raises(ArtifactError, match="does not match its digest"):
        AutoModelForCausalLM.from_pretrained(artifact)


@pytest.fixture
def artifact(packed: Callable[..., tuple[Path, Path]], tmp_path: Path) -> Iterator[Path]:
    """A copy of an artifact, to be damaged."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in packed("llama")[1].iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def flip(file: Path, offset_bytes: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset_bytes] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("load", [waterfill.load, AutoModelForCausalLM.from_pretrained, waterfill.inspect])
def test_one_flipped_bit_is_refused_with_the_buffers_name(load: Callable[[Path], Any], artifact: Path) -> None:
    size_bytes = (artifact / "model.safetensors").stat().st_size
    flip(artifact / "model.safetensors", size_bytes - 5)
    with pytest.raises(ArtifactError, match=r"model.safetensors.*buffer 'lm_head.codes' does not match its digest"):
        load(artifact)


@pytest.mark.parametrize("load", [waterfill.load, AutoModelForCausalLM.from_pretrained])
def test_a_torn_shard_is_refused(load: Callable[[Path], Any], artifact: Path) -> None:
    shard = artifact / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        load(artifact)


def test_another_format_version_is_refused(artifact: Path) -> None:
    config = json.loads((artifact / "config.json").read_text())
    config["quantization_config"]["format_version"] = 2
    (artifact / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="format version 2, this waterfill reads 1"):
        AutoModelForCausalLM.from_pretrained(artifact)
    with pytest.raises(ArtifactError, match=r"config\.json"):
        waterfill.load(artifact)


def test_from_pretrained_needs_neither_manifest_nor_plan(artifact: Path) -> None:
    """As after a download of config, index and shards alone."""
    expected = log_probabilities(waterfill.load(artifact))
    for file in artifact.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    assert torch.equal(log_probabilities(AutoModelForCausalLM.from_pretrained(artifact).eval()), expected)
    with pytest.raises(ArtifactError, match=r"waterfill\.json"):
        waterfill.load(artifact)
    assert torch.equal(log_probabilities(waterfill.load(artifact, verify=False)), expected)


def test_a_tensor_without_a_place_is_refused(artifact: Path) -> None:
    config = json.loads((artifact / "config.json").read_text())
    config["num_hidden_layers"] = 1
    (artifact / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=r"model\.layers\.1\.self_attn\.q_proj' has no place in LlamaForCausalLM"):
        AutoModelForCausalLM.from_pretrained(artifact)


def test_saving_a_packed_model_is_refused_with_the_way_out(
    artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = waterfill.load(artifact)
    with caplog.at_level(logging.WARNING, "waterfill"), pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "saved")
    assert "copy the directory" in caplog.text
    assert not (tmp_path / "saved").exists()
    assert model.config.quantization_config == {"quant_method": "waterfill", "format_version": 1}
