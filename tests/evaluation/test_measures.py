"""Perplexity and divergence against slow references written with Python loops, and on the example model."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import waterfill
from tests.support import models
from tests.support.measure_samples import CONTEXT, VOCABULARY, random_ids, tiny_llama
from waterfill import api
from waterfill.base.errors import WaterfillError
from waterfill.base.records import flattened
from waterfill.evaluation import default_context, divergence, perplexity, scoring, subjects, token_ids, windows
from waterfill.evaluation.on_text import agreed_ids
from waterfill.evaluation.subjects import open_subject


def slow_log_probabilities(model: LlamaForCausalLM, window: Tensor) -> list[list[float]]:
    """Log-probabilities [context - 1][vocab] of one window by itself, in float64."""
    with torch.no_grad():
        rows = model(window[None]).logits[0, :-1].double().tolist()
    result = []
    for row in rows:
        total = math.log(sum(math.exp(logit) for logit in row))
        result.append([logit - total for logit in row])
    return result


def slow_scores(reference: LlamaForCausalLM, model: LlamaForCausalLM, ids: Tensor) -> dict[str, list[list[float]]]:
    """KL, agreement and both negative log-likelihoods, each [windows][context - 1]."""
    scores: dict[str, list[list[float]]] = {"kl": [], "agrees": [], "nll": [], "nll_reference": []}
    for first in range(0, len(ids) - CONTEXT + 1, CONTEXT):
        window = ids[first : first + CONTEXT]
        targets = window[1:].tolist()
        log_p, log_q = slow_log_probabilities(reference, window), slow_log_probabilities(model, window)
        pairs = list(zip(log_p, log_q, strict=True))
        scores["kl"].append([sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)) for p, q in pairs])
        scores["agrees"].append([float(p.index(max(p)) == q.index(max(q))) for p, q in pairs])
        scores["nll"].append([-q[target] for q, target in zip(log_q, targets, strict=True)])
        scores["nll_reference"].append([-p[target] for p, target in zip(log_p, targets, strict=True)])
    return scores


def flat(scores: list[list[float]]) -> list[float]:
    return [score for window in scores for score in window]


def slow_error(scores: list[list[float]], by_window: bool) -> float:
    units = [statistics.mean(window) for window in scores] if by_window else flat(scores)
    return statistics.stdev(units) / math.sqrt(len(units))


@pytest.mark.parametrize("count", [3, 9])  # fewer than 8 windows: tokens are the units; more: windows are
def test_perplexity_equals_the_slow_reference(count: int) -> None:
    model, ids = tiny_llama(1), random_ids(count * CONTEXT + 5)
    nll = slow_scores(model, model, ids)["nll"]
    result = perplexity(model, ids, context=CONTEXT)
    assert result.nll == pytest.approx(statistics.mean(flat(nll)), rel=1e-6)
    assert result.ppl == pytest.approx(math.exp(statistics.mean(flat(nll))), rel=1e-6)
    assert result.nll_stderr == pytest.approx(slow_error(nll, by_window=count >= 8), rel=1e-5)
    assert (result.tokens, result.windows, result.context) == (count * (CONTEXT - 1), count, CONTEXT)
    assert result.convention == "gptq"


@pytest.mark.parametrize("count", [3, 9])
def test_divergence_equals_the_slow_reference(count: int) -> None:
    reference, model, ids = tiny_llama(1), tiny_llama(2), random_ids(count * CONTEXT + 5)
    slow = slow_scores(reference, model, ids)
    rise = [
        [a - b for a, b in zip(*pair, strict=True)] for pair in zip(slow["nll"], slow["nll_reference"], strict=True)
    ]
    result = divergence(reference, model, ids, context=CONTEXT)
    kl = sorted(flat(slow["kl"]))
    assert result.kl == pytest.approx(statistics.mean(kl), rel=1e-6)
    assert result.kl_median == pytest.approx(statistics.median(kl), rel=1e-6)
    assert result.kl_max == pytest.approx(kl[-1], rel=1e-6)
    assert kl[-3] <= result.kl_p99 <= kl[-1]
    assert result.top1_agreement == pytest.approx(statistics.mean(flat(slow["agrees"])), abs=1e-12)
    assert result.ppl == pytest.approx(math.exp(statistics.mean(flat(slow["nll"]))), rel=1e-6)
    assert result.ppl_reference == pytest.approx(math.exp(statistics.mean(flat(slow["nll_reference"]))), rel=1e-6)
    assert result.log_ppl_ratio == pytest.approx(math.log(result.ppl / result.ppl_reference), rel=1e-9)
    by_window = count >= 8
    assert result.kl_stderr == pytest.approx(slow_error(slow["kl"], by_window), rel=1e-5)
    assert result.top1_stderr == pytest.approx(slow_error(slow["agrees"], by_window), rel=1e-5)
    assert result.log_ppl_ratio_stderr == pytest.approx(slow_error(rise, by_window), rel=1e-5)


def test_divergence_is_from_the_reference_to_the_model() -> None:
    one, two, ids = tiny_llama(1), tiny_llama(2), random_ids(4 * CONTEXT)
    there, back = divergence(one, two, ids, context=CONTEXT), divergence(two, one, ids, context=CONTEXT)
    assert there.ppl == back.ppl_reference
    assert abs(there.kl - back.kl) > 0.01 * there.kl


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_does_not_differ_from_itself(dtype: torch.dtype) -> None:
    model, ids = tiny_llama(1).to(dtype), random_ids(9 * CONTEXT)
    result = divergence(model, model, ids, context=CONTEXT, batch=4)
    assert (result.kl, result.kl_max, result.kl_stderr) == (0.0, 0.0, 0.0)
    assert (result.top1_agreement, result.top1_stderr) == (1.0, 0.0)
    assert (result.log_ppl_ratio, result.log_ppl_ratio_stderr) == (0.0, 0.0)
    assert result.ppl == result.ppl_reference


def test_a_small_divergence_is_not_lost_in_rounding() -> None:
    """Logits scaled by 1 + e have KL = e^2/2 Var_p(logit) to first order: e = 1e-4 is far below float32's noise."""
    model, scaled, ids = tiny_llama(1), tiny_llama(1), random_ids(9 * CONTEXT)
    model.double()
    scaled.double()
    with torch.no_grad():
        scaled.lm_head.weight.mul_(1 + 1e-4)
        logits = model(windows(ids, CONTEXT)).logits[:, :-1]
    p = logits.softmax(-1)
    variance = (p * logits**2).sum(-1) - (p * logits).sum(-1) ** 2
    expected = 0.5e-8 * float(variance.mean())
    assert divergence(model, scaled, ids, context=CONTEXT).kl == pytest.approx(expected, rel=1e-3)


def test_the_loss_of_a_bf16_model_is_taken_in_float32() -> None:
    model, ids = tiny_llama(1).to(torch.bfloat16), random_ids(3 * CONTEXT)
    nll = flat(slow_scores(model, model, ids)["nll"])
    assert perplexity(model, ids, context=CONTEXT).nll == pytest.approx(statistics.mean(nll), rel=1e-6)


@pytest.mark.parametrize("batch", [2, 4, 100])
def test_batches_and_scratch_change_nothing(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, model, ids = tiny_llama(1), tiny_llama(2), random_ids(9 * CONTEXT + 3)
    seen: list[tuple[int, int]] = []
    ppl = perplexity(model, ids, context=CONTEXT).ppl
    whole = divergence(reference, model, ids, context=CONTEXT)
    monkeypatch.setattr(scoring, "SCRATCH_BYTES", 4 * 32 * VOCABULARY)  # a few positions at a time
    parts = divergence(
        reference, model, ids, context=CONTEXT, batch=batch, progress=lambda done, total: seen.append((done, total))
    )
    assert perplexity(model, ids, context=CONTEXT, batch=batch).ppl == pytest.approx(ppl, rel=1e-6)
    for name, value in flattened(whole.to_dict()).items():
        expected = pytest.approx(value, rel=1e-5, abs=1e-12) if isinstance(value, float) else value
        assert flattened(parts.to_dict())[name] == expected, name
    assert seen == [(min(done, 9), 9) for done in range(0, 9 + batch, batch)]


def test_dropout_does_not_reach_the_figures() -> None:
    model, ids = tiny_llama(1), random_ids(3 * CONTEXT)
    ppl = perplexity(model, ids, context=CONTEXT).ppl
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    assert perplexity(model, ids, context=CONTEXT).ppl == ppl


@given(tokens=st.integers(2, 200), context=st.integers(2, 64))
def test_windows_cover_the_text_up_to_a_tail_shorter_than_one(tokens: int, context: int) -> None:
    ids = torch.arange(tokens)
    if tokens < context:
        with pytest.raises(WaterfillError, match=f"{tokens} tokens, less than one window of {context}"):
            windows(ids, context)
        return
    parts = windows(ids, context)
    assert parts.shape[1] == context
    assert torch.equal(parts.flatten(), ids[: parts.numel()])
    assert tokens - parts.numel() < context


def test_inputs_that_cannot_be_scored_are_refused() -> None:
    model, ids = tiny_llama(1), random_ids(4 * CONTEXT)
    with pytest.raises(WaterfillError, match="expected \\[tokens\\]"):
        perplexity(model, ids[None], context=CONTEXT)
    with pytest.raises(WaterfillError, match="scores no target"):
        perplexity(model, ids, context=1)
    with pytest.raises(WaterfillError, match="choose at least 1"):
        perplexity(model, ids, context=CONTEXT, batch=0)
    with pytest.raises(WaterfillError, match="context of 64 tokens was asked for, but the model has 32"):
        perplexity(model, ids, context=64)
    with pytest.raises(WaterfillError, match=f"holds token {VOCABULARY}, but the model knows {VOCABULARY} tokens"):
        perplexity(model, torch.full((CONTEXT,), VOCABULARY), context=CONTEXT)
    with pytest.raises(WaterfillError, match="over 70 and 61 tokens"):
        divergence(tiny_llama(1, vocabulary=70), model, ids, context=CONTEXT)


def test_logits_that_are_not_finite_are_refused_with_the_guilty_model() -> None:
    model, broken, ids = tiny_llama(1), tiny_llama(1), random_ids(2 * CONTEXT)
    with torch.no_grad():
        broken.lm_head.weight[3] = torch.nan
    with pytest.raises(WaterfillError, match="the model gives NaN or infinite logits"):
        perplexity(broken, ids, context=CONTEXT)
    with pytest.raises(WaterfillError, match="the model gives NaN"):
        divergence(model, broken, ids, context=CONTEXT)
    with pytest.raises(WaterfillError, match="the reference gives NaN"):
        divergence(broken, model, ids, context=CONTEXT)


def test_token_ids_are_those_of_the_whole_text(ref_llama: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ref_llama)
    text = "def waterfill(budget):\n    return 'bytes'  # größer\n" * 9
    path = tmp_path / "text.txt"
    path.write_text(text, "utf-8")
    ids = token_ids(tokenizer, path)
    assert ids.dtype == torch.int64
    assert tokenizer.decode(ids) == text
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(WaterfillError, match=r"text\.txt cannot be read as UTF-8"):
        token_ids(tokenizer, path)
    with pytest.raises(WaterfillError, match=r"absent\.txt"):
        token_ids(tokenizer, tmp_path / "absent.txt")


def test_tokenizers_are_looked_at_before_models_are_loaded(
    work: Path, ref_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(subjects, "load_checkpoint_in")
    other = Path(shutil.copytree(ref_llama, tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text("utf-8"))
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:100]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(WaterfillError, match=r"have tokenizers that cut \S+text\.py into different tokens"):
        waterfill.evaluate(work / "packed", other, work / "text.py")
    for content in (b"{}", b"\xff", None):
        (other / "tokenizer.json").unlink()
        if content is not None:
            (other / "tokenizer.json").write_bytes(content)
        with pytest.raises(WaterfillError, match="other has no tokenizer that transformers can load"):
            waterfill.evaluate(work / "packed", other, work / "text.py")


@pytest.mark.parametrize("family", [models.tiny_llama, models.tiny_gpt2, models.tiny_gemma])
def test_models_without_a_tokenizer(family: Callable[[Path], Path], tmp_path: Path, ref_llama: Path) -> None:
    """Some classes make one that knows nothing but special tokens. An artifact does not need one to be measured."""
    path = family(tmp_path / "model")
    with pytest.raises(WaterfillError, match="model has no tokenizer that transformers can load"):
        api.load_tokenizer(path)
    text = tmp_path / "text.txt"
    text.write_text("def f(x): return x")
    assert torch.equal(
        agreed_ids(open_subject(path), open_subject(ref_llama), text),
        token_ids(api.load_tokenizer(ref_llama), text),
    )


def held_out_perplexity(model_path: Path, data: Path, tmp_path: Path, count: int) -> float:
    text = tmp_path / "held-out.txt"
    text.write_text((data / "heldout-code.txt").read_text("utf-8")[:260_000], "utf-8")
    ids = token_ids(AutoTokenizer.from_pretrained(model_path), text)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    assert default_context(model) == 1024
    return perplexity(model, ids[: count * 512], context=512).ppl


def test_example_model_on_the_first_held_out_windows(ref_llama: Path, shared_data: Path, tmp_path: Path) -> None:
    assert held_out_perplexity(ref_llama, shared_data, tmp_path, 8) == pytest.approx(77.78, abs=0.05)


@pytest.mark.slow
def test_example_model_has_its_published_perplexity(ref_llama: Path, shared_data: Path, tmp_path: Path) -> None:
    assert held_out_perplexity(ref_llama, shared_data, tmp_path, 60) == pytest.approx(46.8, abs=0.05)
