"""Drafted tokens change the speed of an answer, never its distribution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import waterfill
from tests.support import models, streams
from tests.support.plans import plan_for
from waterfill.base.errors import WaterfillError
from waterfill.files.original import load_tokenizer
from waterfill.planning.budget import Budget
from waterfill.running.hf.generate import drafted_by

RUNS = 250
CHOICES = 3  # likeliest tokens that are sampled among


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model at 5 bits, and the same at 2: a draft that is often wrong."""
    root = tmp_path_factory.mktemp("speculation")
    checkpoint = models.tiny_llama(root / "model", tokenizer=True)
    for name, codec in (("model-5", "trellis-s4-r5.0000"), ("model-2", "trellis-s4-r2.0000")):
        plan = plan_for(checkpoint, codecs=[codec], budget=Budget(bits=16.0), uniform=True)
        waterfill.pack(checkpoint, root / name, plan=plan)
    return root / "model-5", root / "model-2"


@torch.inference_mode()
def probabilities(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Of the next token, as it is sampled."""
    scores = model(tokens).logits[0, -1].float()
    kept = torch.full_like(scores, -torch.inf)
    best = scores.topk(CHOICES)
    kept[best.indices] = best.values
    return kept.softmax(-1)


def expected(model: Any, prompt: torch.Tensor, length: int) -> dict[tuple[int, ...], float]:
    """Probability of every continuation."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        longer = {}
        for begun, chance in found.items():
            p = probabilities(model, torch.cat([prompt, torch.tensor([begun], dtype=torch.int64)], dim=1))
            longer |= {(*begun, int(t)): chance * float(p[t]) for t in p.nonzero()[:, 0]}
        found = longer
    return found


def telling(model: Any, draft: Any) -> tuple[torch.Tensor, dict[tuple[int, ...], float]]:
    """A prompt that the draft continues otherwise than the model, though not always, and the model's chances for it."""
    for n in range(5, 50):
        prompt = torch.tensor([[*range(n, n + 4), *range(n, n + 4), n, n + 1]])
        chances, of_draft = expected(model, prompt, 2), expected(draft, prompt, 2)
        off = sum(abs(chances.get(said, 0) - of_draft.get(said, 0)) for said in {*chances, *of_draft}) / 2
        if 0.1 < off < 0.8:
            return prompt, chances
    raise AssertionError("no prompt tells the two apart")


@pytest.mark.parametrize("way", ["draft", "lookup"])
def test_samples_follow_the_models_own_distribution(artifacts: tuple[Path, Path], way: str) -> None:
    model = streams.load(artifacts[0], streams.decoded, dtype=torch.float32)
    draft = waterfill.load(artifacts[1], dtype=torch.float32)
    model.generation_config.eos_token_id = draft.generation_config.eos_token_id = None
    prompt, chances = telling(model, draft)
    options = drafted_by(draft) if way == "draft" else {"prompt_lookup_num_tokens": 3}
    counts: dict[tuple[int, ...], int] = {}
    model.streaming.reset()
    for _ in range(RUNS):
        out = model.generate(prompt, max_new_tokens=2, do_sample=True, top_k=CHOICES, pad_token_id=0, **options)
        said = tuple(out[0, prompt.shape[1] :].tolist())
        counts[said] = counts.get(said, 0) + 1
    if way == "draft":
        assert model.streaming.summary().passes < 1.9 * RUNS, "some passes gave two tokens"
    assert set(counts) <= set(chances)
    assert sum(chances.values()) == pytest.approx(1, abs=1e-4)
    chi2 = sum((counts.get(said, 0) - RUNS * p) ** 2 / (RUNS * p) for said, p in chances.items() if RUNS * p > 1)
    assert chi2 < 27.9, "the 99.9th percentile with CHOICES^2 = 9 degrees of freedom"


def test_a_draft_or_the_text_itself_but_not_both(artifacts: tuple[Path, Path]) -> None:
    model = waterfill.load(artifacts[1], dtype=torch.float32)
    tokenizer = load_tokenizer(artifacts[1])
    with pytest.raises(WaterfillError, match="give either draft or lookup"):
        waterfill.generate(model, tokenizer, "a", draft=model, lookup=3)
    with pytest.raises(WaterfillError, match="lookup is 0; choose a whole number from 1"):
        waterfill.generate(model, tokenizer, "a", lookup=0)
    greedy = {"temperature": 0.0, "max_new_tokens": 12}
    plain = "".join(waterfill.generate(model, tokenizer, "def f(x, x, x", **greedy))
    assert "".join(waterfill.generate(model, tokenizer, "def f(x, x, x", lookup=4, **greedy)) == plain
    assert "".join(waterfill.generate(model, tokenizer, "def f(x, x, x", draft=model, **greedy)) == plain
