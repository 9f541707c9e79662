"""The blocks of llama-perplexity against its definitions in plain Python."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from waterfill.evaluation.statistics import kl_statistics, perplexity_statistics, token_statistics

COUNT = 501


def sample(seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.rand(COUNT, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def mean_error(values: list[float]) -> tuple[float, float]:
    """llama.cpp's: variance with n below, over n - 1."""
    return statistics.mean(values), math.sqrt(statistics.pvariance(values) / (len(values) - 1))


def percentile(values: list[float], fraction: float) -> float:
    values, at = sorted(values), fraction * (len(values) - 1)
    low = int(at)
    return (1 - (at - low)) * values[low] + (at - low) * values[min(low + 1, len(values) - 1)]


def test_perplexity_block_carries_the_covariance() -> None:
    base = sample(1, 4)
    nll = base + 0.1 * sample(2)
    result = perplexity_statistics(nll, base)
    (m, dm), (b, db) = mean_error(nll.tolist()), mean_error(base.tolist())
    pairs = zip(nll.tolist(), base.tolist(), strict=True)
    covariance = (statistics.mean(x * y for x, y in pairs) - m * b) / (COUNT - 1)
    ratio_error = math.sqrt(dm**2 + db**2 - 2 * covariance)
    ppl, base_ppl = math.exp(m), math.exp(b)
    difference_error = math.sqrt((ppl * dm) ** 2 + (base_ppl * db) ** 2 - 2 * ppl * base_ppl * covariance)
    expected = {
        "ppl": (ppl, ppl * dm),
        "ppl_reference": (base_ppl, base_ppl * db),
        "log_ppl_ratio": (m - b, ratio_error),
        "ppl_ratio": (math.exp(m - b), math.exp(m - b) * ratio_error),
        "ppl_difference": (ppl - base_ppl, difference_error),
    }
    for name, (value, error) in expected.items():
        assert getattr(result, name).value == pytest.approx(value, rel=1e-9), name
        assert getattr(result, name).error == pytest.approx(error, rel=1e-9), name
    assert result.correlation == pytest.approx(covariance / (dm * db), rel=1e-9)
    differences = (nll - base).tolist()
    assert result.log_ppl_ratio.error == pytest.approx(mean_error(differences)[1], rel=1e-9)
    assert result.log_ppl_ratio.error < 0.1 * math.hypot(dm, db)  # the point of the covariance


def test_kl_and_token_blocks() -> None:
    kl, nll, base = sample(3).square(), sample(4, 5), sample(5, 5)
    agrees = (sample(6) < 0.9).double()
    block = kl_statistics(kl)
    assert (block.mean.value, block.mean.error) == pytest.approx(mean_error(kl.tolist()))
    deltas = [math.exp(-x) - math.exp(-y) for x, y in zip(nll.tolist(), base.tolist(), strict=True)]
    tokens = token_statistics(nll, base, agrees)
    for part, values in ((block, kl.tolist()), (tokens, deltas)):
        for name in part.__dataclass_fields__:
            if name.startswith("percentile_"):
                fraction = float(name.removeprefix("percentile_").replace("_", ".")) / 100
                assert getattr(part, name) == pytest.approx(percentile(values, fraction), rel=1e-9), name
        assert (part.minimum, part.median, part.maximum) == pytest.approx(
            (min(values), statistics.median(values), max(values))
        )
    mean_square, error = mean_error([delta**2 for delta in deltas])
    assert (tokens.mean.value, tokens.mean.error) == pytest.approx(mean_error(deltas))
    assert tokens.rms.value == pytest.approx(math.sqrt(mean_square))
    assert tokens.rms.error == pytest.approx(0.5 / math.sqrt(mean_square) * error)
    top = statistics.mean(agrees.tolist())
    assert tokens.same_top.value == pytest.approx(top)
    assert tokens.same_top.error == pytest.approx(math.sqrt(top * (1 - top) / (COUNT - 1)))


def test_equal_models_have_no_error() -> None:
    nll, certain = sample(7), torch.ones(COUNT, dtype=torch.float64)
    block = perplexity_statistics(nll, nll)
    assert (block.log_ppl_ratio.value, block.ppl_difference.value, block.ppl_ratio.value) == (0, 0, 1)
    assert block.log_ppl_ratio.error == pytest.approx(0, abs=1e-9)
    assert block.correlation == pytest.approx(1)
    tokens = token_statistics(nll, nll, certain)
    assert (tokens.rms.value, tokens.rms.error, tokens.same_top.value, tokens.same_top.error) == (0, 0, 1, 0)
    assert math.isnan(perplexity_statistics(certain, certain).correlation)
