"""Peers through their own libraries, where these are installed: what they give back, and what they are charged."""

from __future__ import annotations

import ctypes
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support import models
from tests.support.plans import sensitivity_of
from waterfill.files.architecture import describe
from waterfill.files.checkpoint import open_checkpoint
from waterfill.studies.comparison import StudiedModel, Unavailable, ggml, gptq, mixtures, peers
from waterfill.studies.comparison.stored import QuantisedMatrix

ROWS, WIDTH = 64, 512


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)) * 0.02


@pytest.fixture
def subject(tmp_path: Path) -> StudiedModel:
    path = models.tiny_llama(tmp_path / "llama", hidden=256, intermediate=384, tied=True)
    checkpoint = open_checkpoint(path)
    architecture = describe(checkpoint)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens = torch.randint(0, 60, (3, 24), generator=torch.Generator().manual_seed(1))
    return StudiedModel("tiny", checkpoint, architecture, model, sensitivity_of(architecture), tokens)


def t2(result: QuantisedMatrix, weight: Tensor) -> float:
    assert result.weight.dtype == torch.float32
    assert result.weight.shape == weight.shape
    return float((result.weight - weight).square().sum() / weight.square().sum())


# ---------------------------------------------------------------------------------------------------------------- ggml


@pytest.fixture
def _ggml() -> None:
    pytest.importorskip("llama_cpp")


@pytest.mark.usefixtures("_ggml")
def test_q8_0_equals_its_definition(weight: Tensor) -> None:
    result = ggml.quantise(weight, "Q8_0")
    blocks = weight.reshape(-1, 32)
    step = blocks.abs().amax(1, keepdim=True) / 127
    codes = (blocks * (1 / step)).round()
    expected = codes * step.half().float()
    assert (result.weight.reshape(-1, 32) - expected).abs().max() <= 1.001 * step.max(), "a code may fall either way"
    assert ((result.weight.reshape(-1, 32) - expected).abs() > 1e-7).float().mean() < 0.01
    assert result.size_bytes == ROWS * WIDTH // 32 * 34


@pytest.mark.usefixtures("_ggml")
@pytest.mark.parametrize(
    ("kind", "bits", "low", "high"),
    [("Q2_K", 2.625, 0.05, 0.2), ("Q3_K", 3.4375, 0.01, 0.05), ("Q4_0", 4.5, 0.004, 0.02), ("IQ4_NL", 4.5, 0.003, 0.01),
     ("Q4_K", 4.5, 0.003, 0.012), ("Q5_K", 5.5, 0.0007, 0.004), ("Q6_K", 6.5625, 0.0001, 0.001),
     ("IQ3_S", 3.4375, 0.01, 0.05), ("IQ2_S", 2.5625, 0.05, 0.15)],
)  # fmt: skip
def test_gguf_types(kind: str, bits: float, low: float, high: float, weight: Tensor) -> None:
    result = ggml.quantise(weight, kind)
    assert 8 * result.size_bytes / weight.numel() == bits
    assert low < t2(result, weight) < high
    column = torch.ones(WIDTH)
    column[:64] = 100.0
    weighted = ggml.quantise(weight, kind, column)
    if kind not in ("Q4_0", "IQ4_NL"):  # whose blocks of 32 are all inside or all outside
        assert weighted.size_bytes == result.size_bytes
        error = (result.weight - weight)[:, :64].square().sum(), (weighted.weight - weight)[:, :64].square().sum()
        assert error[1] < error[0] * 1.05


@pytest.mark.usefixtures("_ggml")
@pytest.mark.parametrize(
    ("kind", "width", "stands_in"),
    [("Q4_K", 768, "Q4_K"), ("Q4_K", 96, "Q5_0"), ("Q3_K", 96, "Q4_0"), ("Q6_K", 96, "Q8_0"), ("IQ3_S", 96, "IQ4_NL"),
     ("Q5_K", 96, "Q5_1"), ("Q4_0", 96, "Q4_0"), ("Q4_0", 40, "F16"), ("Q2_K", 40, "F16")],
)  # fmt: skip
def test_rows_that_do_not_fit_blocks_are_stored_as_llama_cpp_does(kind: str, width: int, stands_in: str) -> None:
    assert ggml.fitting(kind, width) == stands_in
    weight = torch.randn(8, width, generator=torch.Generator().manual_seed(0))
    result = ggml.quantise(weight, kind)
    assert list(result.buffers) == [stands_in.lower()]
    if stands_in == "F16":
        assert torch.equal(result.weight, weight.half().float())


@pytest.mark.usefixtures("_ggml")
def test_gguf_of_a_model_says_what_did_not_fit(subject: StudiedModel) -> None:
    weights: dict[str, Tensor] = {}
    plain = ggml.run("Q4_K", subject, weights.__setitem__)
    assert set(weights) == {matrix.name for matrix in subject.architecture.matrices}
    assert plain.note == "2 of 15 matrices are Q5_0: rows of 384 do not fit Q4_K's blocks"
    assert 4.5 < plain.bits < 4.7
    weighted: dict[str, Tensor] = {}
    ggml.run("Q4_K", subject, weighted.__setitem__, weighted=True)
    same = {name for name in weights if torch.equal(weights[name], weighted[name])}
    assert same == {"model.embed_tokens"}, "there is no importance of token embeddings"


@pytest.mark.usefixtures("_ggml")
def test_mixtures_are_llama_cpps_own(ref_llama: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(ref_llama)
    subject = StudiedModel("ref", checkpoint, describe(checkpoint), None, None)  # type: ignore[arg-type]
    types = mixtures.chosen_types("Q4_K_M", subject)
    assert types.pop("model.embed_tokens") == "Q6_K", "it is the head too"
    large = {name for name, kind in types.items() if kind == "Q6_K"}
    assert {name.rpartition(".")[2] for name in large} == {"v_proj", "down_proj"}
    assert 0 < len(large) < 12, "in some layers only"
    assert set(types.values()) == {"Q4_K", "Q6_K"}
    small = mixtures.chosen_types("Q3_K_S", subject)
    assert set(small.values()) == {"Q3_K", "Q6_K"}
    other = open_checkpoint(models.tiny_gpt2(tmp_path / "gpt2"))
    with pytest.raises(Unavailable, match="llama and mistral models"):
        mixtures.chosen_types("Q4_K_M", StudiedModel("gpt2", other, describe(other), None, None))  # type: ignore[arg-type]


def test_the_callback_that_llama_cpp_logs_through_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps the address, and calls it when it likes."""
    kept: list[weakref.ref[Any]] = []

    class Parameters(ctypes.Structure):
        _fields_ = (("ftype", ctypes.c_int), ("nthread", ctypes.c_int))

    class Api:
        llama_log_callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
        llama_model_quantize_default_params = Parameters
        llama_model_quantize = staticmethod(lambda *_: 1)

        @staticmethod
        def llama_log_set(callback: Any, _: object) -> None:
            kept.append(weakref.ref(callback))

    monkeypatch.setattr(mixtures, "library", lambda *_: Api)
    for _ in range(2):
        with pytest.raises(Unavailable, match="refuses a miniature"):
            mixtures._types(2, 1, 1, 1, True)
    gc.collect()
    assert len(kept) == 1
    assert kept[0]() is not None


@pytest.mark.usefixtures("_ggml")
def test_a_mixture_is_charged_for_its_types(subject: StudiedModel) -> None:
    weights: dict[str, Tensor] = {}
    found = mixtures.run("Q4_K_M", subject, weights.__setitem__)
    assert len(weights) == 15
    types = mixtures.chosen_types("Q4_K_M", subject)
    assert found.note.startswith("a mixture of ")
    parameters = dict(subject.model.named_parameters())
    payload = 0
    for matrix in subject.architecture.matrices:
        expected = ggml.quantise(parameters[matrix.parameter].detach(), types[matrix.name])
        assert torch.equal(weights[matrix.name], expected.weight)
        payload += expected.size_bytes
    assert found.bits == pytest.approx(8 * payload / sum(weight.numel() for weight in weights.values()))
    assert found.size_bytes > payload


def test_second_moments_are_those_of_the_inputs(subject: StudiedModel) -> None:
    found = subject.moments
    name = "model.layers.1.mlp.down_proj"
    seen: list[Tensor] = []
    handle = subject.model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        subject.model(input_ids=subject.calibration)
    handle.remove()
    assert torch.allclose(found[name], seen[0].flatten(0, 1).square().mean(0), rtol=1e-4)
    assert len(found) == 14
    assert subject.moments is found, "measured once"


# ----------------------------------------------------------------------------------------------------- other libraries


@pytest.mark.parametrize(
    ("kind", "double", "low", "high"),
    [("nf4", False, 0.004, 0.012), ("nf4", True, 0.004, 0.012), ("fp4", False, 0.01, 0.03)],
)
def test_bitsandbytes(kind: str, double: bool, low: float, high: float, weight: Tensor) -> None:
    pytest.importorskip("bitsandbytes")
    result = peers.bnb_4bit(weight, kind, double=double)
    assert low < t2(result, weight) < high
    blocks = ROWS * WIDTH // 64
    described = sum(b.size_bytes for key, b in result.buffers.items() if "quant_state" in key)
    tables = 16 * 4 + (256 * 4 if double else 0)
    scales = blocks + 4 * -(-blocks // 256) if double else 4 * blocks
    assert result.size_bytes == ROWS * WIDTH // 2 + scales + tables + described
    assert 0 < described < 300


def test_bitsandbytes_int8(weight: Tensor) -> None:
    pytest.importorskip("bitsandbytes")
    result = peers.bnb_int8(weight)
    assert result.size_bytes == ROWS * WIDTH + 4 * ROWS
    step = weight.half().float().abs().amax(1, keepdim=True) / 127
    assert ((result.weight - weight).abs() <= 0.55 * step).all()


@pytest.mark.parametrize(("bits", "stored_bits"), [(2, 2.5), (3, 3.25 + 0.5), (4, 4.5), (8, 8.5)])
def test_hqq(bits: int, stored_bits: float, weight: Tensor) -> None:
    pytest.importorskip("hqq")
    result = peers.hqq(weight, bits)
    assert 8 * result.size_bytes / weight.numel() == pytest.approx(stored_bits, rel=0.01)
    assert t2(result, weight) < {2: 0.3, 3: 0.06, 4: 0.02, 8: 1e-4}[bits]
    with pytest.raises(Unavailable, match="rows are not whole groups of 64"):
        peers.hqq(weight[:, :96], bits)


@pytest.mark.parametrize(("kind", "bits"), [("qint2", 2.25), ("qint4", 4.25), ("qint8", 8.03), ("qfloat8", 8.03)])
def test_quanto(kind: str, bits: float, weight: Tensor) -> None:
    pytest.importorskip("optimum.quanto")
    result = peers.quanto(weight, kind)
    assert 8 * result.size_bytes / weight.numel() == pytest.approx(bits, abs=0.15)
    assert t2(result, weight) < {"qint2": 0.9, "qint4": 0.02, "qint8": 2e-4, "qfloat8": 2e-3}[kind]


def test_torchao(weight: Tensor) -> None:
    pytest.importorskip("torchao")
    eight, four = peers.torchao_int8(weight), peers.torchao_int4(weight)
    assert t2(eight, weight) < 3e-4
    assert 8 <= 8 * eight.size_bytes / weight.numel() < 8.2
    assert 0.002 < t2(four, weight) < 0.02
    assert 4.5 <= 8 * four.size_bytes / weight.numel() <= 5.0


def test_gptq(subject: StudiedModel) -> None:
    pytest.importorskip("gptqmodel")
    weights: dict[str, Tensor] = {}
    candidate = gptq.run(4, subject, weights.__setitem__)
    assert len(weights) == 15
    assert 4.2 < candidate.bits < 4.6
    name = "model.layers.0.mlp.up_proj"
    original = subject.model.get_submodule(name).weight.detach()
    assert 0 < float((weights[name] - original).square().sum() / original.square().sum()) < 0.05
    assert torch.equal(original, subject.model.get_submodule(name).weight), "the model itself stays as it is"


class _Solver:
    """Stands in for gptqmodel's, so that the order of things is tested where that is not installed."""

    seen: dict[int, list[Tensor]]

    def __init__(self, module: nn.Linear, config: dict[str, Any]) -> None:
        self.module, self.inputs, self.quantizer = module, [], self

    def configure(self, **_: Any) -> None:
        pass

    def add_batch(self, inputs: Tensor, output: Tensor) -> None:
        self.inputs.append(inputs)

    def quantize(self) -> tuple[Tensor]:
        _Solver.seen[id(self.module)] = self.inputs
        return (self.module.weight.data * 0.5,)


def test_gptq_goes_layer_by_layer(subject: StudiedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    _Solver.seen = {}
    library = type("L", (), {"GPTQ": _Solver, "QuantizeConfig": dict})
    monkeypatch.setattr(gptq, "library", lambda *_: library)
    weights: dict[str, Tensor] = {}
    candidate = gptq.run(3, subject, weights.__setitem__)
    for matrix in subject.architecture.matrices:
        original = dict(subject.model.named_parameters())[matrix.parameter]
        assert torch.equal(weights[matrix.name], original * 0.5)
    assert candidate.note == ""
    counts = {len(inputs) for inputs in _Solver.seen.values()}
    assert counts == {3}, "every matrix sees every sequence once"
    assert len(_Solver.seen) == 15
    from dataclasses import replace

    with pytest.raises(Unavailable, match="calibration"):
        gptq.run(3, replace(subject, calibration=None), weights.__setitem__)
