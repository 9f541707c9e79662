"""Packed modules against dense ones with the decoded weights, and whole packed models through transformers.

The dense twin of an artifact is built from the reader and the codecs alone: it shares no code with the runtime.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.pytorch_utils import Conv1D

import models
import waterfill
from waterfill import kernels
from waterfill.artifact import RAW, open_artifact
from waterfill.codecs import LOSSLESS, Encoded, Higgs, get_codec, lossless
from waterfill.errors import ArtifactError
from waterfill.kernels import reference
from waterfill.runtime.packed import (
    DecodedOnUse,
    PackedEmbedding,
    PackedExperts,
    PackedLinear,
    PackedMatrix,
    TiedHead,
    pack_embedding,
    pack_linear,
)

FAMILIES: dict[str, Callable[..., Path]] = {
    name.removeprefix("tiny_"): builder for name, builder in vars(models).items() if name.startswith("tiny_")
}
WIDTHS = [64, 172, 576, 896, 1100]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# ------------------------------------------------------------------------------------------------------ packed modules


@pytest.fixture(autouse=True)
def _float_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here is the runtime; what integers cost is tested with the kernels."""
    monkeypatch.setenv("WATERFILL_ACTIVATIONS", "float")


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows of 172 per tile: matrices do not end where tiles do."""
    monkeypatch.setattr(reference, "TILE_WEIGHTS", 3 * 172)


def higgs(n: int = 16) -> Higgs:
    codec = get_codec(f"higgs-p1-n{n}")
    assert isinstance(codec, Higgs)
    return codec


def encoded(out_features: int, width: int, codec: Higgs, exponent: int = -12) -> Encoded:
    weight = torch.randn(out_features, width, generator=torch.Generator().manual_seed(width))
    return codec.encode(weight, exponent=exponent)


def fill(module: PackedMatrix, codec: Higgs, matrix: Encoded, dtype: torch.dtype) -> None:
    module.attach(codec, matrix.shape, matrix.exponent, dtype)
    module.load_state_dict(dict(matrix.buffers), strict=False, assign=True)


def packed_linear(
    width: int, out_features: int = 7, *, bias: bool = False, conv: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[PackedLinear, torch.Tensor]:
    """A packed module, and its decoded weight float32 [out, in]."""
    codec = higgs()
    matrix = encoded(out_features, width, codec)
    module: nn.Module
    if conv:
        module = Conv1D(out_features, width)
        nn.init.normal_(module.bias)
    else:
        module = nn.Linear(width, out_features, bias=bias)
    packed = pack_linear(module.to(dtype))
    fill(packed, codec, matrix, dtype)
    return packed, codec.decode(matrix)


def packed_embedding(
    width: int, dtype: torch.dtype = torch.float32, embedding: nn.Embedding | None = None
) -> tuple[PackedEmbedding, torch.Tensor]:
    """A packed embedding of 50 rows, and its decoded weight float32 [50, width]."""
    codec = higgs()
    matrix = encoded(50, width, codec)
    packed = pack_embedding(embedding or nn.Embedding(50, width))
    fill(packed, codec, matrix, dtype)
    return packed, codec.decode(matrix)


def assert_rounded(y: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the rounding of float32 sums, and of the result to its own dtype."""
    steps = 2 if y.dtype != torch.float32 else 64
    torch.testing.assert_close(y, expected, rtol=steps * torch.finfo(y.dtype).eps, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["bias", "plain", "conv"])
def test_packed_linear_is_its_dense_twin(kind: str, width: int, dtype: torch.dtype, small_tiles: None) -> None:
    module, weight = packed_linear(width, bias=kind == "bias", conv=kind == "conv", dtype=dtype)
    for batch in ((), (3,), (2, 5), (2, 3, 4), (0,)):
        x = torch.randn(*batch, width).to(dtype)
        expected = F.linear(x.float(), weight).to(dtype)  # one rounding; a bias is added after it
        if module.bias is not None:
            expected = expected + module.bias
        y = module(x)
        assert y.dtype == dtype
        assert y.shape == expected.shape
        assert_rounded(y, expected)
    assert (module.bias is None) == (kind == "plain")
    assert (module.in_features, module.out_features) == (width, 7)


def test_tiles_bound_the_scratch_and_change_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    module, weight = packed_linear(896, out_features=50)
    x = torch.randn(4, 896)
    whole = module(x)
    tiles: list[int] = []
    decode = Higgs.decode_rotated

    def counted(*arguments: Any) -> torch.Tensor:
        tile = decode(*arguments)
        tiles.append(tile.numel())
        return tile

    monkeypatch.setattr(Higgs, "decode_rotated", counted)
    for rows in (1, 7, 25, 50, 1000):
        monkeypatch.setattr(reference, "TILE_WEIGHTS", rows * 896 + 5)
        tiles.clear()
        torch.testing.assert_close(module(x), whole, atol=1e-4, rtol=1e-5)
        assert sum(tiles) == 50 * 896
        assert max(tiles) <= rows * 896
        assert torch.equal(kernels.dense(module.packed), weight), "decoding does not depend on the tiles"


def test_the_gradient_reaches_the_input() -> None:
    module, weight = packed_linear(172, bias=True)
    x = torch.randn(2, 3, 172, requires_grad=True)
    upstream = torch.randn(2, 3, 7)
    module(x).backward(upstream)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, upstream @ weight, atol=1e-4, rtol=1e-5)
    assert module.bias is not None
    assert module.bias.grad is not None
    assert not any(buffer.requires_grad for buffer in module.buffers())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_packed_embedding_looks_up_the_decoded_rows(width: int, dtype: torch.dtype) -> None:
    module, weight = packed_embedding(width, dtype)
    for ids in (torch.tensor(3), torch.tensor([49, 0, 49]), torch.tensor([[1, 2], [2, 1]])):
        assert torch.equal(module(ids), F.embedding(ids, weight).to(dtype))
    assert module(torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0, width)
    assert (module.num_embeddings, module.embedding_dim) == (50, width)


def test_packed_embedding_decodes_no_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = packed_embedding(172)
    decoded_rows: list[int] = []
    decode = Higgs.decode_rotated

    def counted(codec: Higgs, codes: torch.Tensor, *more: Any) -> torch.Tensor:
        decoded_rows.append(len(codes))
        return decode(codec, codes, *more)

    monkeypatch.setattr(Higgs, "decode_rotated", counted)
    module(torch.tensor([[4, 9, 4], [9, 9, 4]]))
    assert decoded_rows == [2]


class ScaledEmbedding(nn.Embedding):
    """As Gemma's: scales what it looks up."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__(rows, width)
        self.register_buffer("scale", torch.tensor(3.0), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.scale


def test_a_subclass_keeps_what_it_does_around_the_look_up() -> None:
    module, weight = packed_embedding(64, embedding=ScaledEmbedding(50, 64))
    assert isinstance(module, ScaledEmbedding)
    assert torch.equal(module(torch.tensor([7, 8])), 3 * weight[7:9])
    assert type(packed_embedding(64)[0]) is PackedEmbedding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_tied_head_multiplies_with_the_packed_embedding(bias: bool, dtype: torch.dtype, small_tiles: None) -> None:
    embedding, weight = packed_embedding(172, dtype)
    head = TiedHead(embedding, nn.Parameter(torch.randn(50).to(dtype)) if bias else None)
    x = torch.randn(2, 3, 172).to(dtype)
    expected = F.linear(x.float(), weight).to(dtype)
    if head.bias is not None:
        expected = expected + head.bias
    assert_rounded(head(x), expected)
    assert list(head.buffers()) == [], "the embedding owns the buffers"
    assert (head.in_features, head.out_features) == (172, 50)


@pytest.mark.parametrize("transposed", [False, True])
def test_packed_experts_index_like_a_fused_parameter(transposed: bool) -> None:
    codec = higgs()
    experts = PackedExperts(3, transposed, torch.bfloat16)
    expected = []
    for index in range(3):
        matrix = encoded(6, 96 + 32 * index, codec)
        fill(experts.expert(index), codec, matrix, torch.bfloat16)
        weight = codec.decode(matrix).to(torch.bfloat16)
        expected.append(weight.T if transposed else weight)
    for index in (0, torch.tensor(2), 1):
        assert torch.equal(experts[index], expected[int(index)])
    assert len(experts) == 3
    assert set(experts.state_dict()) == {f"{index}.{key}" for index in range(3) for key in ("scales", "codes")}


def test_moving_to_a_dtype_changes_the_activations_and_no_stored_bit() -> None:
    module, _ = packed_linear(172, bias=True)
    scales, codes = module.scales.clone(), module.codes.clone()
    for move, dtype in (
        (nn.Module.half, torch.float16),
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (nn.Module.double, torch.float64),
        (nn.Module.float, torch.float32),
        (lambda m: m.to("cpu"), torch.float32),
    ):
        move(module)
        assert module.dtype == module.weight.dtype == dtype
        assert module.bias is not None
        assert module.bias.dtype == dtype
        assert module.scales.dtype == torch.float16
        assert torch.equal(module.scales.view(torch.int16), scales.view(torch.int16))
        assert torch.equal(module.codes, codes)
        assert module(torch.randn(2, 172, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("conv", [False, True])
def test_the_weight_that_model_code_sees_is_decoded_only_when_computed_with(
    conv: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, decoded = packed_linear(172, conv=conv, dtype=torch.bfloat16)
    expected = (decoded.T if conv else decoded).to(torch.bfloat16)
    weight: Any = module.weight
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "dense", None)
        assert isinstance(weight, DecodedOnUse)
        assert (weight.dtype, weight.device, weight.shape, weight.ndim) == (
            torch.bfloat16,
            torch.device("cpu"),
            expected.shape,
            2,
        )
    x = torch.randn(3, 172).to(torch.bfloat16)
    assert torch.equal(x @ weight if conv else F.linear(x, weight), x @ expected if conv else F.linear(x, expected))
    assert torch.equal(torch.stack([weight, weight])[1], expected), "also inside lists"
    assert torch.equal(weight.float(), expected.float())
    assert weight.numel() == expected.numel()


# ------------------------------------------------------------------------------------------ whole models, all families


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Checkpoint and artifact of a family at 8 bits, made when first asked for."""
    root = tmp_path_factory.mktemp("families")

    def pack(family: str) -> tuple[Path, Path]:
        checkpoint, artifact = root / family, root / f"{family}-packed"
        if not artifact.exists():
            FAMILIES[family](checkpoint)
            waterfill.pack(checkpoint, artifact, bits=9, codecs=["higgs-p1-n256"], sequences=2, length=16)
        return checkpoint, artifact

    return pack


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def original(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, experts_implementation="eager").eval()


def dense_twin(checkpoint: Path, artifact: Path) -> Any:
    """The original model, float32, with the weights that the artifact decodes to."""
    model = original(checkpoint)
    state = model.state_dict(keep_vars=True)
    stored = open_artifact(artifact)
    for name, tensor in stored.tensors.items():
        if tensor.codec == RAW:
            target, weight = state[name], stored.read(name)
        elif tensor.codec == LOSSLESS:
            streams = stored.read(f"{name}.streams")
            target, weight = state[name], lossless.decode(streams, tensor.shape, lossless.DTYPES[tensor.dtype])
        else:
            buffers = {key: stored.read(f"{name}.{key}") for key in ("scales", "codes")}
            weight = get_codec(tensor.codec).decode(Encoded(tensor.shape, buffers, tensor.exponent, 0.0, 0.0))
            owner, _, leaf = name.rpartition(".")
            if leaf.isdecimal():
                module = model.get_submodule(owner.rpartition(".")[0])
                target, transposed = state[owner][int(leaf)], bool(module.is_transposed)
            else:
                target, transposed = state[f"{name}.weight"], isinstance(model.get_submodule(name), Conv1D)
            weight = weight.T if transposed else weight
        with torch.no_grad():
            target.copy_(weight.reshape(target.shape))
    return model


def token_ids() -> torch.Tensor:
    return torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def log_probabilities(model: Any) -> torch.Tensor:
    return model(input_ids=token_ids()).logits.float().log_softmax(-1)


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_a_packed_model_computes_what_its_dense_twin_does(
    family: str, packed: Callable[[str], tuple[Path, Path]]
) -> None:
    checkpoint, artifact = packed(family)
    model = waterfill.load(artifact, dtype=torch.float32)
    scores = log_probabilities(model)
    torch.testing.assert_close(scores, log_probabilities(dense_twin(checkpoint, artifact)), atol=2e-4, rtol=0)
    before = log_probabilities(original(checkpoint))
    assert divergence(before, scores) < 0.02 < 0.2 < divergence(before, before.roll(1, dims=1))
    half = waterfill.load(artifact)
    assert half.dtype == torch.bfloat16, "of the checkpoint, unless told otherwise"
    assert divergence(before, log_probabilities(half)) < 0.02


def test_weights_stay_packed_and_every_key_finds_its_place(
    family: str, packed: Callable[[str], tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
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


def test_generation_with_the_cache_is_generation_without(
    family: str, packed: Callable[[str], tuple[Path, Path]]
) -> None:
    model = waterfill.load(packed(family)[1], dtype=torch.float32)
    prompt = token_ids()[:, :5]
    mask = torch.ones_like(prompt)
    generated = [
        model.generate(prompt, attention_mask=mask, max_new_tokens=8, do_sample=False, use_cache=cached, pad_token_id=0)
        for cached in (True, False)
    ]
    assert torch.equal(*generated)
    assert generated[0].shape == (2, 13)


def test_tied_heads_stay_tied(packed: Callable[[str], tuple[Path, Path]]) -> None:
    for family, tied in (("gemma", True), ("gpt2", True), ("granite_moe", True), ("llama", False), ("gpt_oss", False)):
        model = waterfill.load(packed(family)[1])
        assert isinstance(model.get_output_embeddings(), TiedHead) == tied, family
        model.tie_weights()
        assert isinstance(model.get_output_embeddings(), TiedHead) == tied, family


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
    packed: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    artifacts = {family: packed(family)[1] for family in FAMILIES}
    found, _ = load_elsewhere("import waterfill", list(artifacts.values()), tmp_path / "scores.pt")
    for family, artifact in artifacts.items():
        scores, info = found[str(artifact)]
        assert not any(info.values()), family
        own = log_probabilities(waterfill.load(artifact, dtype=torch.float32))
        torch.testing.assert_close(scores, own, atol=1e-5, rtol=0, msg=family)


def test_without_waterfill_transformers_says_that_nothing_was_loaded(
    packed: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    artifact = packed("llama")[1]
    found, log = load_elsewhere("", [artifact], tmp_path / "scores.pt")
    assert "Unknown quantization type, got waterfill" in log
    matrices = waterfill.inspect(artifact).measured_t2
    assert set(found[str(artifact)][1]["missing_keys"]) == {f"{name}.weight" for name in matrices}


@pytest.fixture
def artifact(packed: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> Iterator[Path]:
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
