"""Probes, and the two estimators against the exact Fisher information of models small enough to have it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from models import tiny_gpt2, tiny_llama, tiny_mixtral
from waterfill import estimators
from waterfill.architecture import Matrix, describe
from waterfill.checkpoint import open_checkpoint
from waterfill.errors import WaterfillError
from waterfill.estimators import PERTURB_LEVELS, fisher_pass, group_power, matrix_view, perturb_pass
from waterfill.hadamard import groups
from waterfill.loss import Coefficients
from waterfill.probe import Probe, max_positions, probe_tokens
from waterfill.sensitivity import Sensitivity, measure

SMALL = {"hidden": 32, "layers": 1, "heads": 4, "vocab": 32, "dtype": torch.float32}
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "llama, several groups a row": lambda path: tiny_llama(path, intermediate=1600, **SMALL),
    "gpt2, Conv1D and tied": lambda path: tiny_gpt2(path, **SMALL),
    "mixtral, fused experts": lambda path: tiny_mixtral(path, intermediate=48, experts=3, **SMALL),
}


def load(path: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, tuple[Matrix, ...]]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, experts_implementation="eager")
    return model.eval(), describe(open_checkpoint(path)).matrices


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"), tied=True, dtype=torch.float32)


def random_tokens(vocabulary: int, *shape: int) -> torch.Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(1))


def matrix_of(parameter: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """The matrix `[out, in]` in its parameter."""
    part = parameter if matrix.expert is None else parameter[matrix.expert]
    return part.T if matrix.transposed else part


# -- the exact Fisher information -------------------------------------------------------------------------------------


def exact_coefficients(model: Any, matrices: Sequence[Matrix], tokens: torch.Tensor) -> dict[str, tuple[float, float]]:
    """alpha and beta by definition: the expectation over every label at every position, one backward pass for each."""
    parameters = {matrix.parameter: dict(model.named_parameters())[matrix.parameter] for matrix in matrices}
    log_p = model(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1).double().log_softmax(-1)
    sums = {matrix.name: [0.0, 0.0] for matrix in matrices}
    for row in log_p:
        for value in row:
            gradients = torch.autograd.grad(value, list(parameters.values()), retain_graph=True, allow_unused=True)
            found = dict(zip(parameters, gradients, strict=True))
            for matrix in matrices:
                if found[matrix.parameter] is None:
                    continue
                g = matrix_of(found[matrix.parameter], matrix).double()
                w = matrix_of(parameters[matrix.parameter].detach(), matrix).double()
                noise = sum(
                    (w[:, a:b].square().mean(1) * g[:, a:b].square().sum(1)).sum()
                    for a, b in ((group.start, group.stop) for group in groups(w.shape[1]))
                )
                probability = float(value.detach().exp())
                sums[matrix.name][0] += probability * float(noise)
                sums[matrix.name][1] += probability * float((g * w).sum()) ** 2
    return {name: (0.5 * alpha / len(log_p), 0.5 * beta / len(log_p)) for name, (alpha, beta) in sums.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_fisher_equals_the_exact_information(family: str, tmp_path: Path) -> None:
    """Within its own standard errors, which many passes make small, though rows differ much in power."""
    model, matrices = load(FAMILIES[family](tmp_path))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter[..., ::3, :] *= 3
    tokens = random_tokens(32, 1, 6)
    exact = exact_coefficients(model, matrices, tokens)
    passes = 250
    found = measure(model, matrices, tokens.repeat(passes, 1)).tensors
    assert list(found) == [matrix.name for matrix in matrices]
    for name, (alpha, beta) in exact.items():
        c = found[name]
        assert abs(c.alpha - alpha) <= 4 * c.alpha_stderr, name
        assert abs(c.beta - beta) <= 4 * c.beta_stderr, name
        assert c.alpha_stderr <= 0.2 * alpha or alpha == 0
    ratios = torch.tensor([found[name].alpha / alpha for name, (alpha, _) in exact.items() if alpha])
    assert float(ratios.median()) == pytest.approx(1, abs=0.08)
    unreached = [name for name, (alpha, _) in exact.items() if alpha == 0]
    assert all(found[name] == Coefficients(0.0, 0.0, 0.0, 0.0) for name in unreached)
    assert ("mixtral" in family) or not unreached


def test_standard_errors_are_the_spread_of_the_estimates(llama: Path) -> None:
    model, matrices = load(llama)
    tokens = random_tokens(256, 8, 6)
    runs = [measure(model, matrices, tokens, seed=seed).tensors for seed in range(15)]
    ratios = []
    for matrix in matrices:
        alphas = torch.tensor([run[matrix.name].alpha for run in runs])
        stated = torch.tensor([run[matrix.name].alpha_stderr for run in runs])
        ratios.append(float(stated.square().mean().sqrt() / alphas.std()))
    # The stated error also holds what differs between sequences, which are the same in every run.
    assert 0.8 < sorted(ratios)[len(ratios) // 2] < 3


def test_sequences_count_alike_in_batches_of_any_size(llama: Path) -> None:
    """Five sequences in batches of two: the last batch has half the weight."""
    model, matrices = load(llama)
    tokens = random_tokens(256, 5, 9)
    model.requires_grad_(True)
    samples = [
        fisher_pass(model, matrices, part, torch.Generator().manual_seed(7 * 1_000_003 + i))
        for i, part in enumerate(tokens.split(2))
    ]
    found = measure(model, matrices, tokens, seed=7, batch=2)
    assert found.tokens == 5 * 8
    for matrix in matrices:
        alphas, betas = ([getattr(s, key)[matrix.name] for s in samples] for key in ("alpha", "beta"))
        c = found.tensors[matrix.name]
        assert c.alpha == pytest.approx((2 * alphas[0] + 2 * alphas[1] + alphas[2]) / 5)
        assert c.beta == pytest.approx((2 * betas[0] + 2 * betas[1] + betas[2]) / 5)
        mean = c.alpha
        variance = (2 * (alphas[0] - mean) ** 2 + 2 * (alphas[1] - mean) ** 2 + (alphas[2] - mean) ** 2) / 5 / 2
        assert c.alpha_stderr == pytest.approx(math.sqrt(variance))
    loss = model(input_ids=tokens, labels=tokens).loss.item()
    assert found.nll == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_give_the_same_coefficients(dtype: torch.dtype, llama: Path) -> None:
    tokens = random_tokens(256, 4, 8)
    model, matrices = load(llama)
    expected = measure(model, matrices, tokens).tensors
    found = measure(model.to(dtype), matrices, tokens).tensors
    if dtype == torch.float64:
        for matrix in matrices:
            assert found[matrix.name].alpha == pytest.approx(expected[matrix.name].alpha, rel=1e-3)
    else:  # other labels may be drawn
        ratios = torch.tensor([found[matrix.name].alpha / expected[matrix.name].alpha for matrix in matrices])
        assert 0.5 < float(ratios.median()) < 2


def test_power_of_groups() -> None:
    weight = torch.randn(3, 2100)
    expected = torch.stack([weight[:, :1024].square().mean(1), weight[:, 1024:].square().mean(1)], dim=1)
    torch.testing.assert_close(group_power(weight), expected)


# -- perturbing -------------------------------------------------------------------------------------------------------


def test_the_two_estimators_agree_on_a_trained_model(ref_llama: Path) -> None:
    """A few matrices of every kind; the benchmarks compare all of them on a larger probe."""
    model, matrices = load(ref_llama)
    kinds = ("embed_tokens", "0.self_attn.q_proj", "1.self_attn.v_proj", "3.self_attn.o_proj", "5.mlp.down_proj")
    some = [matrix for matrix in matrices if matrix.name.endswith(kinds)]
    assert len(some) == len(kinds)
    tokens = probe_tokens(model, None, Probe(sequences=2, length=64))
    fisher = measure(model, some, tokens.repeat(10, 1)).tensors  # ten labellings of the same inputs
    perturb = measure(model, some, tokens, method="perturb").tensors
    for key, margin in (("alpha", 1.25), ("beta", 1.5)):
        a, b = (torch.tensor([getattr(run[m.name], key) for m in some]).log() for run in (fisher, perturb))
        assert float(torch.corrcoef(torch.stack([a, b]))[0, 1]) > 0.97, key
        assert 1 / margin < float((a - b).exp().median()) < margin, key


def test_perturbing_is_a_line_through_the_origin(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a loss that is exactly linear in the noise power, its slope; and beta from both scalings alike."""
    model, matrices = load(llama)
    weight = matrix_view(dict(model.named_parameters())[matrices[1].parameter], matrices[1])
    original = weight.detach().clone()
    power = group_power(original).sum() * original.shape[1]

    def pretended(reference: torch.Tensor, other: torch.Tensor) -> float:
        return 7 * float((weight - original).square().sum() / power)

    monkeypatch.setattr(estimators, "_kl", pretended)
    model.requires_grad_(False)
    sample = perturb_pass(model, [matrices[1]], random_tokens(256, 1, 4), torch.Generator().manual_seed(0))
    assert sample.alpha[matrices[1].name] == pytest.approx(7, rel=0.05)  # the noise is random
    assert sample.beta[matrices[1].name] == pytest.approx(7, rel=1e-4)
    assert max(PERTURB_LEVELS) < 0.09


# -- leaving no trace -------------------------------------------------------------------------------------------------


class StopHereError(Exception):
    pass


def interrupt(done: int, total: int) -> None:
    raise StopHereError


def state_of(model: Any) -> tuple[Any, ...]:
    return (
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
        {name: len(p._post_accumulate_grad_hooks or {}) for name, p in model.named_parameters()},
        {name: parameter.grad is None for name, parameter in model.named_parameters()},
    )


@pytest.mark.parametrize("method", ["fisher", "perturb"])
@pytest.mark.parametrize("stop", ["never", "between passes", "in a forward pass", "in a backward pass"])
def test_the_model_is_left_as_it_was(method: Any, stop: str, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, matrices = load(llama)
    model.train()
    model.model.layers[0].eval()  # not everything in one mode
    model.model.norm.weight.requires_grad_(False)
    before = state_of(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}

    calls = []

    def fail_at_the_third_call(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise StopHereError

    if stop == "in a forward pass":
        model.model.norm.register_forward_pre_hook(fail_at_the_third_call)
    elif stop == "in a backward pass":
        viewed = matrix_view

        def failing(parameter: torch.Tensor, matrix: Matrix) -> torch.Tensor:
            fail_at_the_third_call()
            return viewed(parameter, matrix)

        monkeypatch.setattr(estimators, "matrix_view", failing)
    tokens = random_tokens(256, 3, 6)
    if stop == "never":
        measure(model, matrices[:3], tokens, method=method)
    else:
        callback = interrupt if stop == "between passes" else None
        with pytest.raises(StopHereError):
            measure(model, matrices[:3], tokens, method=method, progress=callback)
    assert state_of(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_gradients_live_one_at_a_time(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What bounds memory: each is consumed and dropped as soon as the backward pass has it."""
    model, matrices = load(llama)
    viewed, alive = matrix_view, []

    def counting(parameter: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        alive.append(sum(p.grad is not None for p in model.parameters()))
        return viewed(parameter, matrix)

    monkeypatch.setattr(estimators, "matrix_view", counting)
    measure(model, matrices, random_tokens(256, 2, 6))
    assert alive == [1] * (2 * 2 * len(matrices))  # gradient and weight, in two passes


def test_dropout_is_off(tmp_path: Path) -> None:
    model, matrices = load(tiny_gpt2(tmp_path, dtype=torch.float32))
    tokens = random_tokens(256, 2, 6)
    expected = measure(model, matrices, tokens)
    assert model.config.resid_pdrop > 0
    assert measure(model.train(), matrices, tokens) == expected


def test_gradients_of_before_do_not_count(llama: Path) -> None:
    model, matrices = load(llama)
    tokens = random_tokens(256, 2, 6)
    expected = measure(model, matrices, tokens)
    model.requires_grad_(True)
    model(input_ids=tokens).logits.square().sum().backward()
    assert measure(model, matrices, tokens) == expected


def test_only_the_matrices_need_gradients(llama: Path) -> None:
    """Kept tensors cost no backward work: their gradients are never computed."""
    model, matrices = load(llama)
    required = []
    model.model.norm.register_forward_pre_hook(
        lambda *_: required.append({name for name, p in model.named_parameters() if p.requires_grad})
    )
    measure(model, matrices[1:4], random_tokens(256, 2, 6))
    assert required == [{matrix.parameter for matrix in matrices[1:4]}] * 2


@pytest.mark.parametrize("method", ["fisher", "perturb"])
def test_a_seed_repeats_the_measurement(method: Any, llama: Path) -> None:
    model, matrices = load(llama)
    tokens = random_tokens(256, 2, 6)
    first = measure(model, matrices[:3], tokens, method=method, seed=3)
    torch.manual_seed(99)
    assert measure(model, matrices[:3], tokens, method=method, seed=3) == first
    assert measure(model, matrices[:3], tokens, method=method, seed=4) != first


def test_progress_and_arguments(llama: Path) -> None:
    model, matrices = load(llama)
    seen: list[tuple[int, int]] = []
    tokens = random_tokens(256, 5, 6)
    found = measure(
        model,
        matrices[:1],
        tokens,
        batch=2,
        fingerprint="f",
        probe={"kind": "random"},
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert (found.fingerprint, found.probe, found.method) == ("f", {"kind": "random"}, "fisher")
    with pytest.raises(WaterfillError, match="5 sequences in batches of 8 make one pass; a standard error needs two"):
        measure(model, matrices, tokens, batch=8)
    with pytest.raises(WaterfillError, match="method 'gradient' is unknown; use fisher or perturb"):
        measure(model, matrices, tokens, method="gradient")  # type: ignore[arg-type]


# -- the file ---------------------------------------------------------------------------------------------------------


def example() -> Sensitivity:
    tensors = {"a.b": Coefficients(0.1, 2.0, 1e-3, 0.25), "a.c.3": Coefficients(-1e-30, 0.0, 0.0, 0.0)}
    probe = {"kind": "text", "sequences": 4, "length": 8, "seed": 0, "text": "héld-out.txt"}
    return Sensitivity("0123", "fisher", probe, 3.7, 28, tensors)


def test_json_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "sensitivity.json"
    file.write_text(example().to_json(), "utf-8")
    assert Sensitivity.load(file) == example()
    assert Sensitivity.load(file).to_json() == example().to_json()
    assert json.loads(example().to_json())["version"] == 1


def changed(**values: Any) -> str:
    return json.dumps(json.loads(example().to_json()) | values)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "Expecting value"),
        ("[]", ""),
        ("3", ""),
        ("null", ""),
        ("{}", "version"),
        ("[" * 100_000, "recursion"),
        ("\udcff", "utf-8"),
        (changed(version=2), "unknown version"),
        (changed(version="1"), "unknown version"),
        (changed(more=1), "more"),
        (changed(tensors=3), ""),
        (changed(tensors={"a": 3}), ""),
        (changed(tensors={"a": {"alpha": 1}}), "beta"),
        (changed(tensors={"a": {"alpha": 1, "beta": 1, "gamma": 1}}), "gamma"),
        (changed(tensors={"a": {"alpha": "1", "beta": 1}}), "real number"),
        (changed(tensors={"a": {"alpha": None, "beta": 1}}), "real number"),
        (changed(tensors={"a": {"alpha": math.nan, "beta": 1}}), "not finite"),
        (changed(nll=math.inf), "not finite"),
        (changed(nll="3"), "real number"),
    ],
)
def test_bad_files_are_refused(content: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "sensitivity.json"
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(WaterfillError, match=f"sensitivity.json is not a sensitivity file of this version.*{reason}"):
        Sensitivity.load(file)


def test_absent_files_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(WaterfillError, match="write one with `waterfill plan --save`"):
            Sensitivity.load(path)


# -- probes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequences": 1}, "1 sequences of 512 tokens cannot give a standard error"),
        ({"length": 1}, "32 sequences of 1 tokens cannot give a standard error"),
        ({"sequences": -3}, "use at least 2 sequences of 2 tokens"),
        ({"kind": "text"}, "probe 'text' and no text file do not go together"),
        ({"kind": "self", "text": Path("a.txt")}, "probe 'self' and the text file a.txt do not go together"),
        ({"kind": "wikitext"}, "probe 'wikitext' is unknown; use self, random, text"),
    ],
)
def test_impossible_probes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(WaterfillError, match=message):
        Probe(**options)


def test_self_probe_is_ancestral_sampling_from_the_first_token(llama: Path) -> None:
    """Token by token without a cache, the same draws give the same text."""
    model, _ = load(llama)
    probe = Probe(sequences=3, length=12, seed=5)
    seen: list[tuple[int, int]] = []
    tokens = probe_tokens(model, None, probe, lambda done, total: seen.append((done, total)))
    assert seen == [(position, 11) for position in range(1, 12)]
    assert tokens.dtype == torch.int64
    generator = torch.Generator().manual_seed(5)
    expected = torch.full((3, 1), model.config.bos_token_id)
    with torch.no_grad():
        for _ in range(11):
            probabilities = model(input_ids=expected).logits[:, -1].double().softmax(-1)
            draws = torch.rand(3, 1, generator=generator, dtype=torch.float64)
            token = (probabilities.cumsum(-1) < draws).sum(-1, keepdim=True)
            expected = torch.cat([expected, token], dim=1)
    assert torch.equal(tokens, expected)


def test_self_probe_has_the_models_distribution(llama: Path) -> None:
    model, _ = load(llama)
    count = 20_000
    tokens = probe_tokens(model, None, Probe(sequences=count, length=2))
    with torch.no_grad():
        expected = model(input_ids=tokens[:1, :1]).logits[0, -1].softmax(-1) * count
    observed = torch.bincount(tokens[:, 1], minlength=len(expected))
    common = expected > 5
    chi2 = ((observed - expected).square() / expected)[common].sum()
    freedom = int(common.sum())
    assert freedom > 50
    assert abs(float(chi2) - freedom) < 5 * math.sqrt(2 * freedom)


def test_self_probe_of_a_trained_model(ref_llama: Path) -> None:
    model, _ = load(ref_llama)
    tokens = probe_tokens(model, None, Probe(sequences=4, length=32))
    assert tokens.shape == (4, 32)
    assert tokens[:, 0].eq(model.config.bos_token_id).all()
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < 8192
    assert torch.equal(probe_tokens(model, None, Probe(sequences=4, length=32)), tokens)
    assert not torch.equal(probe_tokens(model, None, Probe(sequences=4, length=32, seed=1)), tokens)
    model.requires_grad_(True)
    with torch.no_grad():
        nll = float(model(input_ids=tokens, labels=tokens).loss)
    assert 1 < nll < 7  # nats: text that the model finds likely; uniform tokens cost more than 9


def test_self_probe_without_a_first_token(llama: Path) -> None:
    model, _ = load(llama)
    model.config.bos_token_id, model.config.eos_token_id = None, [7, 9]
    assert probe_tokens(model, None, Probe(sequences=3, length=3))[:, 0].eq(7).all()
    model.config.eos_token_id = None
    first = probe_tokens(model, None, Probe(sequences=50, length=2))[:, 0]
    assert len(first.unique()) > 10
    assert torch.equal(probe_tokens(model, None, Probe(sequences=50, length=2))[:, 0], first)


@pytest.mark.parametrize("kind", ["self", "random"])
def test_probes_end_where_the_models_positions_do(kind: Any, llama: Path) -> None:
    model, _ = load(llama)
    assert max_positions(model.config) == 128
    assert probe_tokens(model, None, Probe(kind=kind, sequences=2, length=400)).shape == (2, 128)


def test_random_probe(llama: Path) -> None:
    model, _ = load(llama)
    probe = Probe(kind="random", sequences=40, length=100, seed=2)
    tokens = probe_tokens(model, None, probe)
    assert tokens.shape == (40, 100)
    counts = torch.bincount(tokens.flatten(), minlength=256).double()
    assert len(counts) == 256
    chi2 = float((counts - 4000 / 256).square().sum() / (4000 / 256))
    assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255)
    assert torch.equal(probe_tokens(model, None, probe), tokens)
    assert not torch.equal(probe_tokens(model, None, Probe(kind="random", sequences=40, length=100)), tokens)


def test_text_probe_is_spread_over_the_text(ref_llama: Path, tmp_path: Path) -> None:
    model, tokenizer = load(ref_llama)[0], AutoTokenizer.from_pretrained(ref_llama)
    text = "\n".join(f"def function_{i}(x): return x + {i * i}  # é" for i in range(400))
    file = tmp_path / "some.txt"
    file.write_text(text, "utf-8")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    available = len(ids) // 50
    tokens = probe_tokens(model, tokenizer, Probe(kind="text", text=file, sequences=5, length=50))
    places = [round(i * (available - 1) / 4) for i in range(5)]
    assert torch.equal(tokens, torch.stack([ids[50 * place : 50 * place + 50] for place in places]))
    everything = probe_tokens(model, tokenizer, Probe(kind="text", text=file, sequences=available, length=50))
    assert torch.equal(everything.flatten(), ids[: 50 * available])
    with pytest.raises(WaterfillError, match=rf"some.txt holds {available} windows of 50 tokens, the probe needs 9999"):
        probe_tokens(model, tokenizer, Probe(kind="text", text=file, sequences=9999, length=50))


def test_text_that_cannot_be_read(ref_llama: Path, tmp_path: Path) -> None:
    model = load(ref_llama)[0]
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name in ("latin.txt", "absent.txt"):
        with pytest.raises(WaterfillError, match=f"cannot read .*{name} as UTF-8 text"):
            probe_tokens(model, None, Probe(kind="text", text=tmp_path / name))
