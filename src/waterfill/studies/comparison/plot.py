"""KL against bytes on disk, both logarithmic: one figure per comparison."""

from __future__ import annotations

from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from waterfill.base.errors import WaterfillError
from waterfill.base.writing import prepare_file, write_file
from waterfill.planning.budget import format_size
from waterfill.studies.comparison.base import FED_BACK, PLAIN, UNIFORM
from waterfill.studies.comparison.run import Comparison

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE = "#0b5fa5"
# Okabe and Ito's colours, which colour-blind readers tell apart, and markers that do without colour.
STYLES = (
    ("#d55e00", "s"), ("#009e73", "D"), ("#cc79a7", "^"), ("#e69f00", "v"), ("#56b4e9", "P"), ("#6a4fa3", "X"),
    ("#8c6d31", "<"), ("#5c6670", ">"), ("#000000", "*"),
)  # fmt: skip


def check(path: Path | None = None) -> None:
    """Look whether a file can be drawn: before minutes of measuring, not after.

    Raises:
        WaterfillError: matplotlib is not installed, or a file of this name cannot be drawn or written.
    """
    if find_spec("matplotlib") is None:
        raise WaterfillError("plots need matplotlib; pip install 'waterfill[plot]'")
    if path is not None:
        from matplotlib.backend_bases import FigureCanvasBase

        known = FigureCanvasBase.get_supported_filetypes()
        if _kind(path) not in known:
            raise WaterfillError(f"{path} is no kind of picture; let it end in one of .{', .'.join(sorted(known))}")
        prepare_file(path)


def save(comparison: Comparison, path: Path) -> None:
    """Draw into a file, of the kind that its name ends in."""
    drawn = BytesIO()
    plot(comparison).savefig(drawn, format=_kind(path))
    write_file(path, drawn.getvalue())


def _kind(path: Path) -> str:
    return path.suffix.removeprefix(".").lower()


def plot(comparison: Comparison) -> Figure:
    """Measured methods with their error bars, and the curve that our plans promise with its interval.

    Raises:
        WaterfillError: matplotlib is not installed.
    """
    check()
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(9.6, 6.0), dpi=150, layout="constrained")
    axes = figure.subplots()
    _draw_curve(axes, comparison)
    families = list(dict.fromkeys(row.family for row in comparison.measured if row.family != "waterfill"))
    for family, (colour, marker) in zip(families, _cycle(len(families)), strict=True):
        rows = [row for row in comparison.measured if row.family == family]
        _draw_rows(axes, rows, {"color": colour, "marker": marker, "markersize": 5.5, "label": family})
    ours = [row for row in comparison.measured if row.family == "waterfill"]
    for name, marker, filled in ((PLAIN, "o", BLUE), (UNIFORM, "o", "white"), (FED_BACK, "D", BLUE)):
        rows = [row for row in ours if row.method == name]
        style = {"color": BLUE, "marker": marker, "markerfacecolor": filled, "markersize": 7, "zorder": 5}
        _draw_rows(axes, rows, {**style, "label": name.replace("-", ", ")})
    axes.set(xscale="log", yscale="log", xlabel="bytes on disk", ylabel="KL divergence, nats per token")
    axes.set_title(_title(comparison), loc="left", fontsize=10)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_size(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8.5)
    return figure


def _draw_curve(axes: Any, comparison: Comparison) -> None:
    curve = comparison.curve
    axes.plot([p.size_bytes for p in curve], [p.kl for p in curve], color=BLUE, linewidth=1.4, label="promised")
    inside = [(p.size_bytes, p.kl_low, p.kl_high) for p in curve if p.kl_high is not None]
    if inside:
        sizes, low, high = zip(*inside, strict=True)
        axes.fill_between(sizes, low, high, color=BLUE, alpha=0.15, linewidth=0, label="its interval")


def _draw_rows(axes: Any, rows: list[Any], style: dict[str, Any]) -> None:
    if rows:
        errors = [2 * (row.kl_stderr or 0.0) for row in rows]
        losses = [max(row.kl, 1e-9) for row in rows]
        axes.errorbar([row.size_bytes for row in rows], losses, errors, linestyle="", elinewidth=1, **style)


def _cycle(count: int) -> list[tuple[str, str]]:
    return [STYLES[i % len(STYLES)] for i in range(count)]


def _title(comparison: Comparison) -> str:
    return (
        f"{comparison.model}: {comparison.tokens:,} tokens of {comparison.text}, windows of {comparison.context}; "
        "bars are two standard errors"
    )
