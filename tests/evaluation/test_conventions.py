"""The conventions against definitions written with Python loops over single predictions."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.support.measure_samples import random_ids, tiny_llama
from waterfill.base.errors import WaterfillError
from waterfill.evaluation import begin_token, convention, divergence, perplexity

Scored = tuple[list[int], int]  # what the model has read, and the token that it has to predict


def slow_nll(model: LlamaForCausalLM, scored: list[Scored]) -> float:
    """Mean -ln p, in float64, one forward pass per prediction."""
    losses = []
    with torch.no_grad():
        for read, target in scored:
            row = model(torch.tensor([read])).logits[0, -1].double().tolist()
            losses.append(math.log(sum(math.exp(logit) for logit in row)) - row[target])
    return statistics.mean(losses)


def slow_strided(ids: list[int], context: int, stride: int) -> list[Scored]:
    """The loop of transformers' documentation."""
    scored: list[Scored] = []
    previous_end = 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        new = end - previous_end
        scored += [(ids[begin:at], ids[at]) for at in range(max(begin + 1, end - new), end)]
        previous_end = end
        if end == len(ids):
            break
    return scored


def slow_llama_cpp(ids: list[int], context: int, bos: int | None) -> list[Scored]:
    scored = []
    for start in range(0, len(ids) - context + 1, context):
        window = ids[start : start + context]
        if bos is not None:
            window[0] = bos
        scored += [(window[:at], window[at]) for at in range(context // 2 + 1, context)]
    return scored


@pytest.mark.parametrize(
    ("tokens", "context", "stride"), [(50, 16, 4), (50, 16, 5), (16, 16, 4), (19, 16, 15), (9, 16, 4)]
)
def test_strided_is_that_of_transformers(tokens: int, context: int, stride: int) -> None:
    model, ids = tiny_llama(1), random_ids(tokens)
    result = perplexity(model, ids, context=context, convention="strided", stride=stride)
    scored = slow_strided(ids.tolist(), context, stride)
    assert result.nll == pytest.approx(slow_nll(model, scored), rel=1e-6)
    assert (result.tokens, result.convention, result.stride) == (tokens - 1, "strided", stride)


@pytest.mark.parametrize(("tokens", "context", "stride"), [(50, 16, 4), (50, 16, 5), (16, 16, 4), (19, 16, 15)])
def test_rows_of_exl3_overlap_and_are_scored_whole(tokens: int, context: int, stride: int) -> None:
    model, ids = tiny_llama(1), random_ids(tokens)
    result = perplexity(model, ids, context=context, convention="exl3", stride=stride)
    rows = [ids[start : start + context].tolist() for start in range(0, tokens - context + 1, stride)]
    scored = [(row[:at], row[at]) for row in rows for at in range(1, context)]
    assert result.nll == pytest.approx(slow_nll(model, scored), rel=1e-6)
    assert (result.tokens, result.convention, result.stride) == (len(rows) * (context - 1), "exl3", stride)
    how = convention("exl3", context=context, stride=stride)
    assert len(how.cut(how.first_windows(random_ids(10 * context), 3))) == 3


@pytest.mark.parametrize("bos", [None, 3])
@pytest.mark.parametrize("context", [15, 16])
def test_llama_cpp_scores_the_second_half_after_a_bos(context: int, bos: int | None) -> None:
    model, ids = tiny_llama(1), random_ids(3 * context + 5)
    before = ids.clone()
    result = perplexity(model, ids, context=context, convention="llama.cpp", bos=bos)
    assert result.nll == pytest.approx(slow_nll(model, slow_llama_cpp(ids.tolist(), context, bos)), rel=1e-6)
    assert result.tokens == 3 * (context - 1 - context // 2)
    assert (result.convention, result.bos) == ("llama.cpp", bos)
    assert torch.equal(ids, before)


@pytest.mark.parametrize("batch", [1, 3])
def test_decoding_gives_what_one_pass_gives(batch: int) -> None:
    """Of a model whose cache loses nothing, and it is the cache that is read."""
    model, other, ids = tiny_llama(1), tiny_llama(2), random_ids(3 * 16)
    whole = divergence(other, model, ids, context=16)
    seen: list[tuple[int, bool]] = []
    forward = model.forward

    def watched(input_ids: Tensor, **options: object) -> object:
        seen.append((input_ids.shape[1], bool(options["use_cache"])))
        return forward(input_ids, **options)

    model.forward = watched  # type: ignore[method-assign]
    result = divergence(other, model, ids, context=16, convention="decode", batch=batch)
    assert seen == [(1, True)] * (15 * 3 // batch)
    assert result.kl == pytest.approx(whole.kl, rel=1e-5)
    assert result.ppl == pytest.approx(whole.ppl, rel=1e-6)
    assert (result.tokens, result.convention) == (whole.tokens, "decode")


def test_usual_contexts() -> None:
    assert convention().context == convention("decode").context == 2048
    assert convention("llama.cpp", 1024).context == 512
    assert convention("gptq", 1024).context == 1024
    for name in ("strided", "exl3"):
        assert (convention(name).context, convention(name).stride) == (2048, 512)
    assert convention("strided", 100).stride == 50
    assert convention("gptq", bos=7).bos is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"name": "mlc"}, "'mlc' is no convention; choose one of gptq, strided, llama.cpp, decode, exl3"),
        ({"name": "gptq", "stride": 4}, "only the conventions strided and exl3 have one"),
        ({"name": "strided", "context": 16, "stride": 16}, "a stride of 16 tokens was asked for"),
        ({"name": "strided", "context": 16, "stride": 0}, "a stride of 0 tokens"),
    ],
)
def test_impossible_conventions_are_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(WaterfillError, match=sentence):
        convention(**options)  # type: ignore[arg-type]


def test_windows_without_a_target_are_refused() -> None:
    with pytest.raises(WaterfillError, match="a context of 2 tokens scores no target"):
        convention("llama.cpp", context=2).cut(random_ids(10))
    with pytest.raises(WaterfillError, match="the text holds 1 tokens"):
        convention("strided", context=8, stride=2).cut(random_ids(1))


@given(
    name=st.sampled_from(["gptq", "strided", "llama.cpp", "exl3"]),
    tokens=st.integers(12, 200),
    context=st.integers(4, 12),
    count=st.integers(1, 6),
)
def test_the_first_windows_are_those_of_the_whole_text(name: str, tokens: int, context: int, count: int) -> None:
    how = convention(name, context=context)
    ids = torch.arange(tokens)
    whole = how.cut(ids)[:count]
    part = how.cut(how.first_windows(ids, count))
    assert len(part) == len(whole)
    for one, other in zip(part, whole, strict=True):
        assert torch.equal(one.ids, other.ids)
        assert one.first == other.first


def test_begin_token(ref_llama: object) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ref_llama)
    assert begin_token(tokenizer) is None  # it has a BOS, but does not add it

    def adding(text: str, **options: object) -> dict[str, list[int]]:
        return {"input_ids": [5, *tokenizer(text)["input_ids"]]}

    adding.bos_token_id = 5  # type: ignore[attr-defined]
    assert begin_token(adding) == 5
