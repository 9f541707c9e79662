"""Adapters of PEFT beside packed weights: found, trained, saved, exchanged, and never merged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import waterfill
from tests.support import models, streams
from tests.support.commands import Command
from waterfill.base.native import FLOAT_ACTIVATIONS
from waterfill.running.hf.packed import PackedConv1D, PackedEmbedding, PackedLinear, PackedMatrix

pytestmark = pytest.mark.filterwarnings(
    "ignore:Model (with|has) `tie_word_embeddings",
    "ignore:Setting `save_embedding_layers`",
    "ignore:fan_in_fan_out",
    "ignore:`?(is_)?gradient_checkpointing.* is deprecated:FutureWarning",  # said by PEFT and by older names alike
)
PROJECTIONS = ["q_proj", "v_proj", "down_proj"]
IDS = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def _float_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense twin does not round its activations."""
    monkeypatch.setenv(FLOAT_ACTIVATIONS, "float")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.tiny_llama(tmp_path_factory.mktemp("adapters") / "llama", tied=True)


@pytest.fixture(scope="module")
def packed(checkpoint: Path) -> Path:
    return pack(checkpoint, checkpoint.parent / "packed")


def pack(model: Path, out: Path, codec: str = "higgs-p1-n16") -> Path:
    waterfill.pack(model, out, bits=9, codecs=[codec], alpha="uniform", feedback="none")
    return out


def load(path: Path, **options: Any) -> Any:
    return waterfill.load(path, **{"dtype": torch.float32, **options})


def adapted(model: Any, targets: Any = PROJECTIONS, *, seed: int = 0, **options: Any) -> Any:
    """The model with an adapter that changes what it says."""
    torch.manual_seed(seed)
    made = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **options))
    return made.eval()


def loss_of(model: Any) -> Tensor:
    loss: Tensor = model(input_ids=IDS, labels=IDS).loss
    return loss


def value_of(model: Any) -> float:
    return float(loss_of(model).detach())


def twin(model: Any) -> Any:
    """The same model with decoded weights: an ordinary one of transformers."""
    dense: Any = transformers.AutoModelForCausalLM.from_config(model.config).to(torch.float32).eval()
    dense.config.__dict__.pop("quantization_config", None)
    weights = {f"{name}.weight": m.dense() for name, m in model.named_modules() if isinstance(m, PackedMatrix)}
    weights |= {name: value for name, value in model.state_dict().items() if not name.endswith(("scales", "codes"))}
    weights = {name: value for name, value in weights.items() if not name.endswith(".empty")}
    if model.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    dense.load_state_dict(weights)
    return dense


# -------------------------------------------------------------------------------------------------------------- finding


@pytest.mark.parametrize("targets", [PROJECTIONS, "all-linear", ["q_proj", "embed_tokens"], ["lm_head", "k_proj"]])
def test_an_adapter_beside_packed_weights_is_that_beside_decoded_ones(packed: Path, targets: Any) -> None:
    """Losses, gradients and names of the adapter: PEFT takes packed modules for what they replace."""
    models = [load(packed)]
    models.insert(0, twin(models[0]))
    dense, ours = (adapted(model, targets) for model in models)
    parameters = [{n: p for n, p in model.named_parameters() if p.requires_grad} for model in (dense, ours)]
    assert parameters[0].keys() == parameters[1].keys()
    losses = [loss_of(model) for model in (dense, ours)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    for loss in losses:
        loss.backward()
    for name, expected in parameters[0].items():
        got = parameters[1][name].grad
        assert expected.grad is not None, name
        assert float(expected.grad.abs().max()) > 0, name
        torch.testing.assert_close(got, expected.grad, rtol=0, atol=2e-5 * float(expected.grad.abs().max()))


def test_packed_modules_are_instances_of_what_they_replace(packed: Path, tmp_path: Path) -> None:
    kinds = {type(module) for module in load(packed).modules() if isinstance(module, PackedMatrix)}
    assert kinds == {PackedLinear, PackedEmbedding}
    assert issubclass(PackedLinear, nn.Linear)
    assert issubclass(PackedEmbedding, nn.Embedding)
    gpt2 = load(pack(models.tiny_gpt2(tmp_path / "gpt2"), tmp_path / "packed"))
    assert {type(module.mlp.c_fc) for module in gpt2.transformer.h} == {PackedConv1D}
    made = adapted(gpt2, "all-linear")
    before = loss_of(made)
    before.backward()
    assert all(p.grad is not None for p in made.parameters() if p.requires_grad)
    with made.disable_adapter():
        assert value_of(made) != float(before.detach())


# ----------------------------------------------------------------------------------------------------- saved and loaded


def test_an_adapter_is_saved_loaded_and_exchanged(packed: Path, tmp_path: Path) -> None:
    first, second = (adapted(load(packed), seed=seed) for seed in (1, 2))
    for made, name in ((first, "first"), (second, "second")):
        made.save_pretrained(tmp_path / name)
    expected = [model(input_ids=IDS).logits for model in (first, second)]
    model = PeftModel.from_pretrained(load(packed), tmp_path / "first", adapter_name="first").eval()
    model.load_adapter(tmp_path / "second", adapter_name="second")
    plain = load(packed)(input_ids=IDS).logits
    for name, logits in (("first", expected[0]), ("second", expected[1]), ("first", expected[0])):
        model.set_adapter(name)
        assert torch.equal(model(input_ids=IDS).logits, logits), name
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, plain)
    model.delete_adapter("second")
    assert torch.equal(model.unload()(input_ids=IDS).logits, plain)


def test_an_adapter_of_the_original_model_loads_onto_the_packed_one(
    checkpoint: Path, packed: Path, tmp_path: Path
) -> None:
    original: Any = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    adapted(original, "all-linear").save_pretrained(tmp_path / "adapter")
    model = load(packed)
    dense = PeftModel.from_pretrained(twin(model), tmp_path / "adapter")
    ours = PeftModel.from_pretrained(model, tmp_path / "adapter")
    torch.testing.assert_close(loss_of(ours), loss_of(dense), rtol=1e-5, atol=0)
    assert value_of(ours) != value_of(load(packed))


@pytest.mark.parametrize(
    "merge",
    [
        lambda model: model.merge_and_unload(),
        lambda model: model.merge_and_unload(safe_merge=True),
        lambda model: model.merge_adapter(),
    ],
)
def test_merging_is_refused_and_leaves_the_model_as_it_was(packed: Path, merge: Callable[[Any], Any]) -> None:
    made = adapted(load(packed))
    before = made(input_ids=IDS).logits
    with pytest.raises(waterfill.WaterfillError, match=r"as merging an adapter does, since sums have no codes: leave"):
        merge(made)
    assert torch.equal(made(input_ids=IDS).logits, before)


# ------------------------------------------------------------------------------------------------------------- training


def test_checkpointed_activations_give_the_same_gradients(packed: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        made = adapted(load(packed)).train()
        if checkpointing:
            made.gradient_checkpointing_enable()
            made.enable_input_require_grads()
        loss_of(made).backward()
        gradients.append({n: p.grad for n, p in made.named_parameters() if p.requires_grad})
    assert all(grad is not None for grad in gradients[0].values())
    tree_map(torch.testing.assert_close, gradients[1], gradients[0])


def test_bfloat16_trains_near_float32(packed: Path) -> None:
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        made = adapted(load(packed, dtype=dtype), ["q_proj"]).to(dtype)  # PEFT's own are float32
        loss_of(made).backward()
        gradients.append(torch.cat([p.grad.float().flatten() for p in made.parameters() if p.grad is not None]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99


def test_gradients_pass_through_weights_that_are_streamed(checkpoint: Path, tmp_path: Path) -> None:
    path = pack(checkpoint, tmp_path / "trellis", "trellis")
    gradients = []
    for options in ({}, {"streamed": True, "tuning": streams.quick()}):
        made = adapted(load(path, **options), "all-linear")
        loss_of(made).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in made.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-5 * float(gradients[0].abs().max()))


def test_the_trainer_of_transformers_trains_an_adapter(packed: Path, tmp_path: Path) -> None:
    made = get_peft_model(load(packed), LoraConfig(r=4, target_modules=PROJECTIONS, task_type="CAUSAL_LM"))
    stored = {name: buffer.clone() for name, buffer in made.named_buffers() if name.endswith((".codes", ".scales"))}
    before = value_of(made.eval())
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, learning_rate=0.02, report_to=[], save_strategy="steps", save_steps=2,
        per_device_train_batch_size=2, gradient_checkpointing=True, disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    texts = [{"input_ids": row, "labels": row} for row in IDS]
    transformers.Trainer(model=made, args=arguments, train_dataset=texts).train()
    assert value_of(made.eval()) < before - 0.05
    saved = PeftModel.from_pretrained(load(packed), tmp_path / "checkpoint-2").eval()
    torch.testing.assert_close(loss_of(saved), loss_of(made))
    assert stored
    assert all(torch.equal(buffer, stored[name]) for name, buffer in made.named_buffers() if name in stored)


# ----------------------------------------------------------------------------------------------------------- generating


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an artifact that has a tokenizer, `packed`, and an adapter beside it, `adapter`."""
    root = tmp_path_factory.mktemp("spoken")
    path = pack(models.tiny_llama(root / "model", tokenizer=True), root / "packed")
    adapted(load(path), "all-linear").save_pretrained(root / "adapter")
    return root


def test_text_is_generated_with_an_adapter(spoken: Path, command: Command) -> None:
    asked = ("generate", spoken / "packed", "-p", "Once upon", "--temperature", "0", "--max-new-tokens", "8", "--json")
    plain, ours = (json.loads(command(*asked, *more).out) for more in ((), ("--adapter", spoken / "adapter")))
    model = PeftModel.from_pretrained(waterfill.load(spoken / "packed"), spoken / "adapter")
    tokenizer = transformers.AutoTokenizer.from_pretrained(spoken / "packed")
    ids = tokenizer("Once upon", return_tensors="pt")
    expected = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert ours["text"] == tokenizer.decode(expected)
    assert ours["text"] != plain["text"]


def test_what_is_no_adapter_of_this_model_is_refused(spoken: Path, packed: Path, tmp_path: Path) -> None:
    adapted(load(packed), ["q_proj"], layers_to_transform=[0]).save_pretrained(tmp_path / "other")
    config = tmp_path / "other" / "adapter_config.json"
    with pytest.raises(waterfill.WaterfillError, match="takes transformers"):
        waterfill.open_runner(spoken / "packed", adapter=spoken / "adapter", kv=4)
    for content in ("[]", "{", None):
        config.unlink() if content is None else config.write_text(content)
        with pytest.raises(waterfill.WaterfillError, match="is no adapter that PEFT has saved"):
            waterfill.open_runner(spoken / "packed", adapter=tmp_path / "other")
    gpt2 = pack(models.tiny_gpt2(tmp_path / "gpt2", tokenizer=True), tmp_path / "packed")
    with pytest.raises(waterfill.WaterfillError, match="does not fit this model"):
        waterfill.open_runner(gpt2, adapter=spoken / "adapter")
