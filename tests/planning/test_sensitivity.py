"""The two estimators against the exact Fisher information of models small enough to have it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.models import tiny_gpt2, tiny_llama, tiny_mixtral
from waterfill.base.errors import WaterfillError
from waterfill.codecs.hadamard import groups
from waterfill.files.architecture import Matrix, describe
from waterfill.files.checkpoint import open_checkpoint
from waterfill.planning import costs, estimators
from waterfill.planning.costs import matrix_view, row_costs
from waterfill.planning.estimators import PERTURB_LEVELS, ProbePass, fisher_pass, group_power, perturb_pass
from waterfill.planning.probe import Probe, probe_tokens
from waterfill.planning.sensitivity import measure, summary
from waterfill.planning.spread import MOST

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
    assert all((found[name].alpha, found[name].beta) == (0, 0) for name in unreached)
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
    if done:
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
        place, name = (costs, "row_costs") if method == "fisher" else (estimators, "matrix_view")
        called = getattr(place, name)

        def failing(*arguments: Any) -> torch.Tensor:
            fail_at_the_third_call()
            return torch.as_tensor(called(*arguments))

        monkeypatch.setattr(place, name, failing)
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
    counted, alive = row_costs, []

    def counting(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        alive.append(sum(p.grad is not None for p in model.parameters()))
        return counted(weight, gradient)

    monkeypatch.setattr(costs, "row_costs", counting)
    measure(model, matrices, random_tokens(256, 2, 6))
    # The embedding's comes to its parameter; others are taken where the products are, and never are one's whole.
    assert sorted(alive) == [0] * (2 * (len(matrices) - 1)) + [1] * 2


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
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert (found.fingerprint, found.probe, found.method) == ("f", {"kind": "random"}, "fisher")
    with pytest.raises(WaterfillError, match="5 sequences in batches of 8 make one pass; a standard error needs two"):
        measure(model, matrices, tokens, batch=8)
    with pytest.raises(WaterfillError, match="method 'gradient' is unknown; use fisher or perturb"):
        measure(model, matrices, tokens, method="gradient")  # type: ignore[arg-type]


# -- what cannot be measured ------------------------------------------------------------------------------------------


def test_logits_that_are_not_finite_are_refused(llama: Path) -> None:
    model, matrices = load(llama)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.inf
    with pytest.raises(WaterfillError, match="the model gives NaN or infinite logits on the probe"):
        measure(model, matrices, random_tokens(256, 2, 6))
    with pytest.raises(WaterfillError, match="the model's loss on the probe comes out as nan"):
        measure(model, matrices[:1], random_tokens(256, 2, 6), method="perturb")


@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_gradients_that_are_not_finite_are_refused_by_name(factor: float, llama: Path) -> None:
    model, matrices = load(llama)

    def spoil(*arguments: Any) -> None:
        arguments[-1].register_hook(lambda gradient: gradient * factor)

    model.model.layers[0].self_attn.q_proj.register_forward_hook(spoil)
    with pytest.raises(WaterfillError, match=r"alpha of model\.layers\.0\.self_attn\.q_proj comes out as (nan|inf)"):
        measure(model, matrices[1:], random_tokens(256, 2, 6))


def test_a_pass_out_of_all_proportion_counts_as_some_times_the_median() -> None:
    """Few passes are taken as they are, and so is what few tokens come by."""

    def alpha(*values: float, tokens: int = 100, length: int = 100) -> float:
        passes = [ProbePass({"m": value}, {"m": 1.0}, {"m": tokens}, 1.0) for value in values]
        return summary(passes, [1] * len(passes), length * len(passes), method="fisher").tensors["m"].alpha

    assert alpha(1.0, 2.0, 3.0, 1e6) == pytest.approx((1 + 2 + 3 + MOST * 2.5) / 4)
    for few in ({"tokens": 99}, {"tokens": 40, "length": 40}):
        assert alpha(1.0, 2.0, 3.0, 1e6, **few) == pytest.approx((1 + 2 + 3 + 1e6) / 4)
    assert alpha(1.0, 2.0, 1e6) == pytest.approx((1 + 2 + 1e6) / 3)
    assert alpha(1.0, 2.0, 3.0, 8.0) == pytest.approx(3.5)
