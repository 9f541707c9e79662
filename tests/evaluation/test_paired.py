"""Two models on the same windows: the difference, its interval, and the command that prints them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from scipy import stats

from tests.support.commands import Command
from tests.support.measure_samples import CONTEXT, random_ids, tiny_llama
from waterfill.evaluation import convention
from waterfill.evaluation.divergences import Scored, scored
from waterfill.evaluation.paired import paired

HOW = convention("gptq", context=CONTEXT)


def scores(noise: float, windows: int = 40) -> Scored:
    """Of a disturbed model, always by the same numbers."""
    model, generator = tiny_llama(1), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator)
    return scored(tiny_llama(1), model, random_ids(windows * CONTEXT), HOW)


def test_a_model_beside_itself() -> None:
    beside = paired(scores(0.02), scores(0.02), 7)
    assert (beside.kl_difference, beside.kl_difference_low, beside.kl_difference_high) == (0, 0, 0)
    assert (beside.nll_difference, beside.size_bytes) == (0, 7)


def test_differences_are_those_of_the_figures_and_known_better() -> None:
    one, other = scores(0.02), scores(0.022)
    beside, mine, its = paired(one, other, 0), one.divergence, other.divergence
    assert beside.kl == its.kl
    assert beside.ppl == its.ppl
    assert beside.kl_difference == pytest.approx(mine.kl - its.kl, rel=1e-9)
    assert beside.nll_difference == pytest.approx(math.log(mine.ppl / its.ppl), rel=1e-6)
    assert beside.kl_difference_stderr < 0.5 * math.hypot(mine.kl_stderr, its.kl_stderr)
    assert beside.kl_difference_low < beside.kl_difference_high < 0, "told apart"


def test_the_interval_is_students() -> None:
    one, other = scores(0.02), scores(0.03)
    beside = paired(one, other, 0)
    means = [float((a.kl - b.kl).mean()) for a, b in zip(one.windows, other.windows, strict=True)]
    low, high = stats.t.interval(0.95, len(means) - 1, loc=sum(means) / len(means), scale=stats.sem(means))
    assert (beside.kl_difference_low, beside.kl_difference_high) == pytest.approx((low, high), rel=2e-3)


def test_few_windows_take_tokens() -> None:
    one, other = scores(0.02, 2), scores(0.03, 2)
    beside = paired(one, other, 0)
    each = torch.cat([a.kl - b.kl for a, b in zip(one.windows, other.windows, strict=True)]).numpy()
    assert beside.kl_difference_stderr == pytest.approx(stats.sem(each), rel=1e-6)


def test_the_command(command: Command, work: Path, ref_llama: Path, tmp_path: Path) -> None:
    how = ["--text", work / "text.py", "--context", "64", "--windows", "9"]
    options = ["--against", ref_llama, "--beside", ref_llama, *how]
    shown = command("eval", work / "packed", *options)
    assert shown.code == 0, shown.err
    for start in ("beside the other", "KL, nats per token", "log perplexity", "weight files"):
        assert start in shown.out
    found = json.loads(command("eval", work / "packed", *options, "--json").out)
    assert found["beside"]["kl"] == 0
    assert found["beside"]["kl_difference"] == pytest.approx(found["kl"], rel=1e-12)
    assert found["beside"]["nll_difference"] == pytest.approx(found["log_ppl_ratio"], rel=1e-9)
    file = tmp_path / "ref.reference"
    assert command("eval", ref_llama, *how, "--save-reference", file).code == 0
    known = json.loads(command("eval", work / "packed", "--reference", file, "--beside", work / "packed", "--json").out)
    assert known["beside"]["kl_difference"] == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--text", "TEXT"], "against an original; give that as well"),
        (["--text", "TEXT", "--against", "MODEL", "--beside", "absent"], "absent"),
    ],
)
def test_what_does_not_go_together(
    arguments: list[str], sentence: str, command: Command, work: Path, ref_llama: Path
) -> None:
    names = {"TEXT": f"{work}/text.py", "MODEL": str(ref_llama)}
    result = command("eval", ref_llama, "--beside", ref_llama, *[names.get(part, part) for part in arguments])
    assert (result.code, result.out) == (2, "")
    assert re.search(sentence, result.err), result.err
