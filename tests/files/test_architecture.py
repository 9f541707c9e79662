"""Which tensors are matrices, and that their rows are the rows that transformers would load."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CamembertConfig,
    CamembertForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
)

from tests.support.checkpoints import described, edit_tensors, failure
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
from waterfill.files.architecture import Architecture, Kept, read_kept, read_rows
from waterfill.files.checkpoint import Checkpoint
from waterfill.files.skeleton import Part

FAMILIES: dict[str, Callable[[Path], Path]] = {
    "llama": tiny_llama,
    "llama tied, three shards": lambda path: tiny_llama(path, tied=True, shards=3),
    "llama fp32": lambda path: tiny_llama(path, dtype=torch.float32),
    "llama fp16, width 576": lambda path: tiny_llama(
        path, hidden=576, heads=9, kv_heads=3, intermediate=896, layers=1, dtype=torch.float16
    ),
    "gpt2": tiny_gpt2,
    "qwen2": tiny_qwen2,
    "gemma": tiny_gemma,
    "mixtral": tiny_mixtral,
    "mixtral, twelve experts, three shards": lambda path: tiny_mixtral(path, experts=12, layers=1, shards=3),
    "granite moe": tiny_granite_moe,
    "gpt-oss": tiny_gpt_oss,
    "deepseek v3": tiny_deepseek_v3,
}


def assert_equals_transformers(path: Path, checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Matrices and kept tensors are, value by value, the state dict that transformers loads, each tensor once."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    seen: dict[str, int] = dict.fromkeys(state, 0)
    for matrix in architecture.matrices:
        expected = state[matrix.parameter] if matrix.expert is None else state[matrix.parameter][matrix.expert]
        expected = expected.t() if matrix.transposed else expected
        rows = read_rows(checkpoint, matrix, 0, matrix.shape[0])
        assert rows.is_contiguous()
        assert rows.dtype == expected.dtype
        assert tuple(rows.shape) == matrix.shape
        assert torch.equal(rows, expected), matrix.name
        seen[matrix.parameter] += rows.numel()
    for kept in architecture.kept:
        tensor = read_kept(checkpoint, kept)
        assert tuple(tensor.shape) == kept.shape
        assert torch.equal(tensor, state[kept.name]), kept.name
        seen[kept.name] += tensor.numel()
    assert seen == {name: tensor.numel() for name, tensor in state.items()}


# -- every family -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_all_tensors_are_those_that_transformers_loads(tmp_path: Path, family: str) -> None:
    path = FAMILIES[family](tmp_path)
    checkpoint, architecture = described(path)
    assert architecture.ignored == ()
    assert_equals_transformers(path, checkpoint, architecture)
    quantised = sum(prod(matrix.shape) for matrix in architecture.matrices)
    assert quantised > 0.97 * sum(prod(tensor.shape) for tensor in checkpoint.tensors.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_row_ranges_are_rows_of_the_whole(tmp_path: Path, family: str) -> None:
    checkpoint, architecture = described(FAMILIES[family](tmp_path))
    for matrix in architecture.matrices:
        whole = read_rows(checkpoint, matrix, 0, matrix.shape[0])
        rows = matrix.shape[0]
        # Across the seam of two pieces, too, which lies in the middle.
        for start, stop in [(0, 1), (rows - 1, rows), (rows // 2 - 3, rows // 2 + 2), (rows // 3, rows)]:
            part = read_rows(checkpoint, matrix, start, stop)
            assert part.is_contiguous()
            assert torch.equal(part, whole[start:stop])
        for start, stop in [(-1, 3), (3, 3), (0, rows + 1)]:
            with pytest.raises(IndexError, match=matrix.name):
                read_rows(checkpoint, matrix, start, stop)


def test_reference_model(ref_llama: Path) -> None:
    checkpoint, architecture = described(ref_llama)
    assert_equals_transformers(ref_llama, checkpoint, architecture)
    assert architecture.tied_head
    assert len(architecture.matrices) == 1 + 6 * 7
    assert len(architecture.kept) == 1 + 6 * 2
    assert {matrix.dtype for matrix in architecture.matrices} == {"BF16"}


# -- roles and names --------------------------------------------------------------------------------------------------


def test_llama_names_in_execution_order(tmp_path: Path) -> None:
    _, architecture = described(tiny_llama(tmp_path, layers=1))
    assert [(tensor.name, getattr(tensor, "role", None)) for tensor in architecture.tensors] == [
        ("model.embed_tokens", "embedding"),
        ("model.layers.0.self_attn.q_proj", "linear"),
        ("model.layers.0.self_attn.k_proj", "linear"),
        ("model.layers.0.self_attn.v_proj", "linear"),
        ("model.layers.0.self_attn.o_proj", "linear"),
        ("model.layers.0.mlp.gate_proj", "linear"),
        ("model.layers.0.mlp.up_proj", "linear"),
        ("model.layers.0.mlp.down_proj", "linear"),
        ("model.layers.0.input_layernorm.weight", None),
        ("model.layers.0.post_attention_layernorm.weight", None),
        ("model.norm.weight", None),
        ("lm_head", "head"),
    ]
    assert not architecture.tied_head
    assert architecture.matrices[-1].parameter == "lm_head.weight"


def test_conv1d_is_presented_transposed(tmp_path: Path) -> None:
    checkpoint, architecture = described(tiny_gpt2(tmp_path))
    matrix = next(matrix for matrix in architecture.matrices if matrix.name == "transformer.h.1.attn.c_attn")
    assert (matrix.shape, matrix.transposed, matrix.role) == ((192, 64), True, "linear")
    assert checkpoint.tensors[matrix.pieces[0].source].shape == (64, 192)
    assert {matrix.role for matrix in architecture.matrices} == {"embedding", "linear"}
    assert architecture.tied_head


def test_biases_norms_and_routers_are_kept(tmp_path: Path) -> None:
    _, architecture = described(tiny_gpt_oss(tmp_path))
    kept = {tensor.name.partition("layers.1.")[2] for tensor in architecture.kept if "layers.1." in tensor.name}
    assert kept == {
        *(f"self_attn.{name}" for name in ("sinks", "q_proj.bias", "k_proj.bias", "v_proj.bias", "o_proj.bias")),
        *("mlp.router.weight", "mlp.router.bias", "mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj_bias"),
        *("input_layernorm.weight", "post_attention_layernorm.weight"),
    }


@pytest.mark.parametrize(
    ("build", "experts_path", "gate_up", "fused_on_disk", "transposed"),
    [
        (tiny_mixtral, "mlp.experts", (344, 64), False, False),
        (tiny_granite_moe, "block_sparse_moe.experts", (344, 64), True, False),
        (tiny_gpt_oss, "mlp.experts", (344, 64), True, True),
    ],
)
def test_each_expert_is_a_matrix(
    tmp_path: Path,
    build: Callable[..., Path],
    experts_path: str,
    gate_up: tuple[int, int],
    fused_on_disk: bool,
    transposed: bool,
) -> None:
    checkpoint, architecture = described(build(tmp_path, experts=3))
    parameter = f"model.layers.1.{experts_path}.gate_up_proj"
    experts = [matrix for matrix in architecture.matrices if matrix.parameter == parameter]
    assert [matrix.name for matrix in experts] == [f"{parameter}.{expert}" for expert in range(3)]
    assert [matrix.expert for matrix in experts] == [0, 1, 2]
    for matrix in experts:
        assert (matrix.role, matrix.shape, matrix.transposed) == ("expert", gate_up, transposed)
        assert [piece.rows for piece in matrix.pieces] == ([344] if fused_on_disk else [172, 172])
        first_axes = {checkpoint.tensors[piece.source].shape[0] for piece in matrix.pieces}
        assert first_axes == {3 if fused_on_disk else 172}


def test_small_matrices_are_kept(tmp_path: Path) -> None:
    _, architecture = described(tiny_llama(tmp_path, hidden=32, heads=2, kv_heads=1, intermediate=31, layers=1))
    kept = {kept.name for kept in architecture.kept if "proj" in kept.name}
    assert kept == {  # 16 x 32 = 512 weights; 31 x 32 = 992; 31 inputs
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
    }
    assert "model.layers.0.self_attn.q_proj" in {matrix.name for matrix in architecture.matrices}  # 32 x 32 = 1024


def test_buffers_are_kept_if_they_are_stored(tmp_path: Path) -> None:
    path = tiny_deepseek_v3(tmp_path)
    buffer = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert buffer in {kept.name for kept in described(path)[1].kept}
    edit_tensors(path, lambda tensors: {name: tensors[name] for name in tensors if name != buffer})
    assert buffer not in {tensor.name for tensor in described(path)[1].tensors}


def test_experts_are_known_by_how_they_are_multiplied_with(tmp_path: Path) -> None:
    config = Llama4TextConfig(
        hidden_size=64,
        intermediate_size=96,
        intermediate_size_mlp=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        vocab_size=256,
        dtype=torch.float32,
    )
    Llama4ForCausalLM(config).save_pretrained(tmp_path)
    checkpoint, architecture = described(tmp_path)
    experts = {
        (matrix.parameter.rpartition(".")[2], matrix.shape) for matrix in architecture.matrices if matrix.transposed
    }
    assert experts == {("gate_up_proj", (192, 64)), ("down_proj", (64, 96))}
    assert_equals_transformers(tmp_path, checkpoint, architecture)


def test_tied_tensor_has_the_embedding_s_name_even_if_the_head_comes_first(tmp_path: Path) -> None:
    config = CamembertConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=256,
        is_decoder=True,
    )
    CamembertForCausalLM(config).save_pretrained(tmp_path)
    checkpoint, architecture = described(tmp_path)
    assert architecture.tied_head
    embedding = "roberta.embeddings.word_embeddings"
    assert [m.name for m in architecture.matrices if m.shape == (256, 64)] == [embedding]
    assert_equals_transformers(tmp_path, checkpoint, architecture)


def test_a_single_expert_is_a_stack_of_one(tmp_path: Path) -> None:
    path = tiny_mixtral(tmp_path, experts=1, num_experts_per_tok=1)
    checkpoint, architecture = described(path)
    assert {matrix.expert for matrix in architecture.matrices if matrix.role == "expert"} == {0}
    assert_equals_transformers(path, checkpoint, architecture)
    checkpoint, architecture = described(path, keep=["*.experts.*"])
    assert_equals_transformers(path, checkpoint, architecture)


# -- keep -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["lm_head", "lm_head.weight", "lm_*"])
def test_keep_by_tensor_or_parameter_name(tmp_path: Path, pattern: str) -> None:
    path = tiny_llama(tmp_path)
    checkpoint, architecture = described(path, keep=[pattern])
    assert architecture.tensors[-1] == Kept("lm_head.weight", (256, 64), "BF16", ((Part("lm_head.weight"),),))
    assert "lm_head" not in {matrix.name for matrix in architecture.matrices}
    assert_equals_transformers(path, checkpoint, architecture)


@pytest.mark.parametrize("build", [tiny_mixtral, tiny_granite_moe, tiny_gpt_oss])
def test_keeping_one_expert_keeps_the_whole_parameter(tmp_path: Path, build: Callable[[Path], Path]) -> None:
    path = build(tmp_path)
    checkpoint, architecture = described(path, keep=["*.layers.0.*.gate_up_proj.2", "*.1.*.down_proj*"])
    experts = {matrix.parameter for matrix in architecture.matrices if matrix.role == "expert"}
    assert {name.replace("block_sparse_moe", "mlp") for name in experts} == {
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
    }
    assert_equals_transformers(path, checkpoint, architecture)


def test_a_pattern_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path)
    described(path, keep=["*norm*"])  # kept anyway, but there
    message = failure(path, keep=["lm_head", "*.mpl.*"])
    assert "'*.mpl.*' matches no tensor" in message
    assert "model.embed_tokens" in message


# -- names on disk ----------------------------------------------------------------------------------------------------


def test_base_model_prefix_may_be_absent(tmp_path: Path) -> None:
    path = tiny_gpt2(tmp_path)
    edit_tensors(path, lambda tensors: {name.removeprefix("transformer."): tensors[name] for name in tensors})
    checkpoint, architecture = described(path)
    assert "transformer.h.0.mlp.c_fc" in {matrix.name for matrix in architecture.matrices}
    assert_equals_transformers(path, checkpoint, architecture)


def test_experts_already_fused_on_disk(tmp_path: Path) -> None:
    path = tiny_mixtral(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    model.save_pretrained(path, save_original_format=False)
    checkpoint, architecture = described(path)
    assert "model.layers.0.mlp.experts.gate_up_proj" in checkpoint.tensors
    assert_equals_transformers(path, checkpoint, architecture)


def test_tensors_that_the_model_does_not_use_are_listed(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "mtp.ids": torch.arange(3)}
    edit_tensors(path, lambda tensors: tensors | extra)
    checkpoint, architecture = described(path)
    assert set(architecture.ignored) == extra.keys()
    assert_equals_transformers(path, checkpoint, architecture)


@pytest.mark.parametrize("stored", ["head only", "both"])
def test_tied_head_wherever_it_is_stored(tmp_path: Path, stored: str) -> None:
    path = tiny_llama(tmp_path, tied=True)

    def store_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        embedding = tensors["model.embed_tokens.weight"]
        if stored == "head only":
            del tensors["model.embed_tokens.weight"]
        return tensors | {"lm_head.weight": embedding.clone()}

    edit_tensors(path, store_head)
    checkpoint, architecture = described(path)
    assert architecture.tied_head
    assert [matrix.name for matrix in architecture.matrices if matrix.shape[0] == 256] == ["model.embed_tokens"]
    assert_equals_transformers(path, checkpoint, architecture)
