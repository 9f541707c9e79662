"""What models do with packed modules besides running them: initialise, scale, tie, look up, copy and pickle."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, initialization

import waterfill
from tests.support import models, streams
from tests.support.plans import plan_for
from waterfill import kernels
from waterfill.base.errors import WaterfillError
from waterfill.planning.budget import Budget
from waterfill.running.hf.packed import PackedEmbedding, PackedMatrix, Tied, TiedEmbedding, TiedLinear

pytestmark = pytest.mark.usefixtures("no_reader_left")

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("Gemma", {**TINY, "head_dim": 16, "num_key_value_heads": 2}),  # pad_token_id stays the class's own: 0
    "xglm": ("XGLM", {"d_model": 64, "ffn_dim": 128, "num_layers": 2, "attention_heads": 4, "vocab_size": 256}),
    "olmo": ("Olmo", {**TINY, "tie_word_embeddings": True, "pad_token_id": None}),  # norms have no weights
    "mamba": ("Mamba", {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "vocab_size": 256}),
    "bert": ("BertLMHead", {**TINY, "is_decoder": True}),  # a bias is tied as well
    "prophetnet": (  # two embeddings and a head are tied
        "ProphetNet",
        {
            **{key: TINY[key] for key in ("hidden_size", "vocab_size", "bos_token_id", "eos_token_id")},
            **{f"num_{part}_layers": 1 for part in ("encoder", "decoder")},
            **{f"num_{part}_attention_heads": 4 for part in ("encoder", "decoder")},
            **{f"{part}_ffn_dim": 128 for part in ("encoder", "decoder")},
            "is_decoder": True,
            "is_encoder_decoder": False,
            "add_cross_attention": False,
        },
    ),
    "zamba2": (  # layers are tied, by patterns
        "Zamba2",
        {
            **TINY,
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "attention_head_dim": 32,
            "mamba_d_state": 8,
            "mamba_headdim": 16,
            "n_mamba_heads": 8,
            "adapter_rank": 32,
            "num_mem_blocks": 1,
            "chunk_size": 8,
        },
    ),
    "rwkv": ("Rwkv", {"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 256, "rescale_every": 1}),
}


def classes(kind: str) -> tuple[Any, Any]:
    name = KINDS[kind][0]
    suffix = "Model" if name == "BertLMHead" else "ForCausalLM"
    return getattr(transformers, f"{name}{suffix}"), getattr(transformers, f"{name.removesuffix('LMHead')}Config")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """Checkpoint and artifact, made when first asked for: entropy-coded, or "fixed", or "lossless"."""
    root = tmp_path_factory.mktemp("kinds")

    def pack(kind: str, how: str = "coded") -> tuple[Path, Path]:
        checkpoint, artifact = root / kind, root / f"{kind}-{how}"
        if not checkpoint.exists() and kind in KINDS:
            model_class, config_class = classes(kind)
            config = config_class(**KINDS[kind][1])
            models._save(checkpoint, model_class, config, torch.bfloat16, 1, False, 0)
        elif not checkpoint.exists():
            getattr(models, f"tiny_{kind}")(checkpoint)
        if artifact.exists():
            return checkpoint, artifact
        codec = "trellis-s8-r6.0000" if how == "coded" else "higgs-p1-n256"
        plan = plan_for(checkpoint, codecs=[codec], budget=Budget(bits=16.0))
        if how == "lossless":
            waterfill.pack(checkpoint, artifact, lossless=True)
        else:
            waterfill.pack(checkpoint, artifact, plan=plan)
        return checkpoint, artifact

    return pack


IDS = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def scores(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=IDS).logits
    return logits.float().log_softmax(-1)


def divergence(checkpoint: Path, model: Any) -> float:
    p = scores(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval())
    q = scores(model)
    return float((p.exp() * (p - q)).sum(-1).mean())


def generate(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.generate(IDS[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_loads_runs_and_is_copied(kind: str, packed: Callable[..., tuple[Path, Path]]) -> None:
    checkpoint, artifact = packed(kind)
    model = waterfill.load(artifact, dtype=torch.float32)
    assert divergence(checkpoint, model) < 0.05
    assert generate(model).shape == (2, 7)
    expected = scores(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(scores(twin), expected)
    model.tie_weights()
    assert torch.equal(scores(model), expected)


# ------------------------------------------------------------------------------------------------------ initialisation


def everything(module: nn.Module) -> None:
    """All that an `_init_weights` may do to the weight of a module, or of a child, that has no parameter for it."""
    for part in (module, *module.children()):
        weight: Any = getattr(part, "weight", None)
        if weight is None or isinstance(weight, nn.Parameter):
            continue
        initialization.normal_(weight)
        initialization.zeros_(weight[0])
        weight[0].zero_()
        weight.data[0].zero_()
        weight.data.normal_(mean=0.0, std=0.02)
        weight.data.uniform_(-1, 1).clamp_(-0.1, 0.1)
        weight.mul_(weight.norm())
        nn.init.trunc_normal_(weight)
        nn.init.normal_(weight, mean=0.0, std=weight.shape[0] ** -0.5)


@pytest.mark.parametrize("how", ["coded", "fixed", "lossless", "streamed"])
def test_no_initialisation_reaches_what_the_artifact_holds(
    how: str, packed: Callable[..., tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = packed("gemma", "coded" if how == "streamed" else how)[1]
    load = streams.load if how == "streamed" else waterfill.load
    expected = scores(load(artifact))
    original = transformers.GemmaPreTrainedModel._init_weights
    seen = []

    def initialise(self: Any, module: nn.Module) -> None:
        original(self, module)
        seen.append(module)
        everything(module)

    monkeypatch.setattr(transformers.GemmaPreTrainedModel, "_init_weights", initialise)
    model = load(artifact)
    assert any(isinstance(module, PackedEmbedding) for module in seen) or how == "lossless"
    seen.clear()  # they hold the streamer
    assert torch.equal(scores(model), expected)
    assert float(model.get_input_embeddings().embed_scale) == 8.0, "what is computed is computed"
    if how != "lossless":  # whose tensors are the model's own again
        model.initialize_weights()
        assert torch.equal(scores(model), expected)


def test_a_vision_tower_loads(tmp_path: Path) -> None:
    """Its initialisation calls for the weights of children by functions of its own; one is `nn.MultiheadAttention`."""
    text = {**TINY, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16, "vocab_size": 300}
    vision = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    config = transformers.Gemma3Config(
        text_config={**text, "layer_types": ["sliding_attention", "full_attention"]},
        vision_config={**vision, "image_size": 32, "patch_size": 8},
        mm_tokens_per_image=4,
        image_token_index=299,
        boi_token_index=297,
        eoi_token_index=298,
    )
    saved = models._save(
        tmp_path / "model", transformers.Gemma3ForConditionalGeneration, config, torch.bfloat16, 1, False, 0
    )
    waterfill.pack(saved, tmp_path / "packed", plan=plan_for(saved, budget=Budget(bits=16.0)))
    model = waterfill.load(tmp_path / "packed", dtype=torch.float32)
    original = transformers.Gemma3ForConditionalGeneration.from_pretrained(saved, dtype=torch.float32).eval()
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    ids = torch.tensor([[1, 297, 299, 299, 299, 299, 298, 5]])
    with torch.inference_mode():
        p, q = (
            one(input_ids=ids, pixel_values=pixels, token_type_ids=(ids == 299).long()).logits.log_softmax(-1)
            for one in (original, model)
        )
    assert float((p.exp() * (p - q)).sum(-1).mean()) < 0.02
    assert any(isinstance(m, PackedMatrix) for m in model.model.vision_tower.modules())


# ------------------------------------------------------------------------------------------- weights that are scaled


def test_rwkv_divides_its_weights_and_multiplies_them_back(packed: Callable[..., tuple[Path, Path]]) -> None:
    checkpoint, artifact = packed("rwkv", "fixed")
    model = waterfill.load(artifact, dtype=torch.float32)
    value = model.rwkv.blocks[3].feed_forward.value
    before = value.weight.clone()
    assert divergence(checkpoint, model) < 0.01
    assert torch.equal(value.weight * 8, before)
    with torch.no_grad():
        model.train()(input_ids=IDS)
    assert torch.equal(value.weight.clone(), before)


def test_a_streamed_matrix_is_scaled_as_a_resident_one_is(packed: Callable[..., tuple[Path, Path]]) -> None:
    artifact = packed("llama")[1]
    resident = waterfill.load(artifact, dtype=torch.float16)
    streamed = streams.load(artifact, streams.mixed, dtype=torch.float16)
    x = torch.randn(3, 64).to(torch.float16)
    for model in (resident, streamed):
        model.model.embed_tokens.weight.mul_(2**3)
        model.lm_head.weight.div_(2**17)  # beyond what float16 could take back
        model.lm_head.weight.mul_(2**14)
    assert torch.equal(streamed.lm_head(x), resident.lm_head(x))
    assert torch.equal(streamed.lm_head.weight.clone(), resident.lm_head.weight.clone())
    assert torch.equal(streamed.model.embed_tokens(IDS), resident.model.embed_tokens(IDS))


@pytest.mark.skipif(kernels.implementation() == kernels.STORED, reason="layers are fused with the native library")
def test_a_fused_layer_sees_that_a_weight_was_scaled(packed: Callable[..., tuple[Path, Path]]) -> None:
    model = waterfill.load(packed("llama")[1], dtype=torch.float32)
    down = model.model.layers[0].mlp.down_proj

    def token() -> torch.Tensor:
        with torch.inference_mode():
            cache = model(IDS[:1, :4], use_cache=True).past_key_values
            found: torch.Tensor = model(IDS[:1, 4:5], past_key_values=cache).logits
            return found

    before = token()
    down.weight.mul_(8)
    scaled = token()
    down.weight.div_(8)
    assert not torch.allclose(scaled, before, atol=0.05)
    torch.testing.assert_close(token(), before, atol=0.05, rtol=0)


# ------------------------------------------------------------------------------------------------ ties and look-ups


@pytest.mark.parametrize(("kind", "tied"), [("olmo", 1), ("mamba", 1), ("bert", 1), ("prophetnet", 2), ("llama", 0)])
def test_a_tied_weight_is_the_other_ones(kind: str, tied: int, packed: Callable[..., tuple[Path, Path]]) -> None:
    model = waterfill.load(packed(kind)[1], dtype=torch.float32)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(head, TiedLinear) == bool(tied)
    assert (head.weight is embedding.weight) == bool(tied)
    assert sum(isinstance(module, TiedLinear | TiedEmbedding) for module in model.modules()) == tied
    hidden = torch.randn(2, 3, 64)
    with torch.inference_mode():
        product = hidden @ head.weight.T
        assert torch.equal(head(hidden), product if head.bias is None else product + head.bias)
    head.weight /= 2
    assert torch.equal(head.weight.clone(), embedding.weight.clone()) == bool(tied)


class Unpacked(nn.Module):
    """Multiplies with a weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(256, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight)


def test_a_module_of_any_class_may_be_tied(packed: Callable[..., tuple[Path, Path]]) -> None:
    from waterfill.running.hf.packed import tie

    embedding = waterfill.load(packed("llama")[1], dtype=torch.float32).model.embed_tokens
    module = Unpacked()
    tie(module, embedding)
    assert isinstance(module, Tied)
    x = torch.randn(3, 64)
    assert torch.equal(module(x), embedding.multiply(x))
    assert torch.equal(copy.deepcopy(module)(x), module(x))


def test_every_module_says_its_dtype_and_device(packed: Callable[..., tuple[Path, Path]]) -> None:
    artifact = packed("olmo")[1]
    outputs = []
    for model in (waterfill.load(artifact), streams.load(artifact)):
        assert sum(parameter.numel() for parameter in model.parameters()) == 0, "else this says nothing"
        for part in (model, model.model, model.model.layers[-1], model.model.layers[0].mlp):
            first = next(part.parameters())
            assert (first.dtype, first.device) == (torch.bfloat16, torch.device("cpu"))
        assert (model.dtype, model.device) == (torch.bfloat16, torch.device("cpu"))
        outputs.append(generate(model))
    assert torch.equal(*outputs)
    assert waterfill.load(artifact).to(torch.float16).dtype == torch.float16


# ---------------------------------------------------------------------------------------------------------- pickling

ELSEWHERE = """
import pickle, sys
with open(sys.argv[1], "rb") as file:
    copied = pickle.load(file)
import torch
for model, ids, expected in copied:
    with torch.inference_mode():
        found = model(input_ids=ids).logits.float().log_softmax(-1)
    assert torch.equal(found, expected), f"another result of {type(model)}"
torch.save([model for model, _, _ in copied], sys.argv[2])
"""


def test_another_process_needs_nothing_but_pickle(packed: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    """Classes are made for fused layers, for embeddings that scale, for modules that are tied."""
    loaded = [waterfill.load(packed(kind)[1]) for kind in ("llama", "gemma", "mixtral")]
    (tmp_path / "models").write_bytes(pickle.dumps([(model, IDS, scores(model)) for model in loaded]))
    command = [sys.executable, "-c", ELSEWHERE, tmp_path / "models", tmp_path / "saved"]
    subprocess.run(command, check=True, timeout=300)
    for model, back in zip(loaded, torch.load(tmp_path / "saved", weights_only=False), strict=True):
        assert torch.equal(scores(back), scores(model))
        assert [type(module) for module in back.modules()] == [type(module) for module in model.modules()]


def test_a_layout_of_another_machine_is_refused(packed: Callable[..., tuple[Path, Path]]) -> None:
    model = waterfill.load(packed("llama")[1])
    for module in model.modules():
        if isinstance(module, PackedMatrix):
            module.layout = "avx4096"
    with pytest.raises(WaterfillError, match=r"arranged for avx4096.*load the artifact itself"):
        pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [pickle.dumps, copy.deepcopy])
def test_a_streamed_model_is_not_copied(copied: Callable[[Any], Any], packed: Callable[..., tuple[Path, Path]]) -> None:
    with pytest.raises(WaterfillError, match="streamed model cannot be copied or pickled; load its artifact"):
        copied(streams.load(packed("llama")[1]))
