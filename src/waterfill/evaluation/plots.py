"""Figures of evaluations. Each function returns a matplotlib figure and shows nothing: a notebook does that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from waterfill.base.errors import WaterfillError

if TYPE_CHECKING:
    from waterfill.evaluation.evaluate import Evaluation

FIGURE_INCHES = (7.0, 4.5)
_PERCENTILES = ("minimum", "0.1", "1", "5", "10", "median", "90", "95", "99", "99.9", "maximum")


def plot_kl_against_size(evaluations: Mapping[str, Evaluation]) -> Any:
    """KL divergence with its error (logarithmic) against bytes of weight files, one point per label; predictions, where
    there are any, as hollow points with their interval.

    Raises:
        WaterfillError: there is nothing to draw.
    """
    known = {label: each for label, each in evaluations.items() if each.kl is not None}
    if not known:
        raise WaterfillError("none of the evaluations has a KL divergence; evaluate against the original model")
    figure, axes = _figure()
    for label, each in sorted(known.items(), key=lambda item: item[1].size_bytes):
        megabytes = each.size_bytes / 1e6
        drawn = axes.errorbar([megabytes], [each.kl], yerr=[each.kl_stderr], marker="o", capsize=3, label=label)
        if each.predicted_kl is not None and each.predicted_low is not None and each.predicted_high is not None:
            below, above = each.predicted_kl - each.predicted_low, each.predicted_high - each.predicted_kl
            axes.errorbar(
                [megabytes],
                [each.predicted_kl],
                yerr=[[max(0.0, below)], [max(0.0, above)]],
                marker="o",
                markerfacecolor="none",
                color=drawn.lines[0].get_color(),
                alpha=0.5,
            )
    axes.set(xlabel="weight files, MB", ylabel="KL divergence, nats per token", yscale="log")
    axes.legend(title="measured; hollow: predicted")
    axes.grid(alpha=0.3)
    return figure


def plot_kl_percentiles(evaluations: Mapping[str, Evaluation]) -> Any:
    """How the KL divergence is spread over tokens: its percentiles (logarithmic), one line per label.

    Raises:
        WaterfillError: there is nothing to draw.
    """
    known = {label: each.divergence for label, each in evaluations.items() if each.divergence is not None}
    if not known:
        raise WaterfillError("none of the evaluations has a KL divergence; evaluate against the original model")
    figure, axes = _figure()
    for label, divergence in known.items():
        fields = divergence.kl_statistics.to_dict()
        values = [fields[name if name.isalpha() else f"percentile_{name.replace('.', '_')}"] for name in _PERCENTILES]
        positive = [value if value > 0 else float("nan") for value in values]
        axes.plot(range(len(values)), positive, marker="o", label=label)
    axes.set_xticks(range(len(_PERCENTILES)), [n if n.isalpha() else f"{n} %" for n in _PERCENTILES], rotation=45)
    axes.set(xlabel="percentile of tokens", ylabel="KL divergence, nats per token", yscale="log")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def _figure() -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure  # not pyplot, which would choose a screen and keep every figure
    except ImportError as error:
        raise WaterfillError("plots need matplotlib; install the extra with pip install 'waterfill[plot]'") from error
    figure = Figure(figsize=FIGURE_INCHES, layout="constrained")
    return figure, figure.subplots()
