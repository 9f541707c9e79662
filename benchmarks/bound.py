"""How far the fixed-rate menu is from the Shannon bound of a Gaussian source, t² = 2^(-2R), grid by grid.

The gap is given as the ratio t² / 2^(-2R), in dB, and in bits: by how much the rate could shrink at the same t². R
counts indices alone; the scales cost 16 bits per group of 512 to 1535 weights on top, as the stored bits show. Draws
docs/images/rate-distortion.png where matplotlib is installed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks.allocation import PUBLISHED_T2
from benchmarks.shared.report import REPOSITORY, BenchmarkReport, parse_arguments
from waterfill.codecs import Higgs, get_codec
from waterfill.planning.menu import CODECS

FIGURE = REPOSITORY / "docs" / "images" / "rate-distortion.png"
WIDTHS = (256, 1024, 4096)
ROWS = 64  # of the matrices whose stored bits are counted
TOLERANCE = 0.003  # of the published t², which are Monte Carlo figures


@dataclass(frozen=True)
class BoundedCode:
    """One grid of the menu."""

    codec: Higgs

    @property
    def rate_bits(self) -> float:
        return math.log2(self.codec.n) / self.codec.p

    @property
    def t2(self) -> float:
        return self.codec.grid.t2

    @property
    def ratio(self) -> float:
        return self.t2 * 4**self.rate_bits

    @property
    def gap_bits(self) -> float:
        return 0.5 * math.log2(self.ratio)

    def stored_bits(self, width: int) -> float:
        return self.codec.menu_point((ROWS, width)).rate_bits

    def row(self) -> list[object]:
        stored = [round(self.stored_bits(width), 4) for width in WIDTHS]
        gaps = [self.ratio, 10 * math.log10(self.ratio), self.gap_bits]
        return [self.codec.name, self.rate_bits, *stored, self.t2, 4**-self.rate_bits, *gaps]


def main() -> None:
    arguments = parse_arguments(__doc__, figure={"type": Path, "default": FIGURE, "metavar": "FILE"})
    report = BenchmarkReport("the fixed-rate menu and the Gaussian bound")
    codecs = [codec for codec in map(get_codec, CODECS) if isinstance(codec, Higgs)]
    points = sorted(map(BoundedCode, codecs), key=lambda point: (point.rate_bits, point.codec.p))
    columns = ["codec", "R", *(f"stored at {width}" for width in WIDTHS)]
    columns += ["t²", "2^(-2R)", "ratio", "gap dB", "gap bits"]
    report.table("the menu", columns, [point.row() for point in points], key="menu")
    compare_published(report, points)
    if find_spec("matplotlib"):
        draw(points, arguments.figure)
        report.note(f"figure: {arguments.figure.name}")
    else:
        report.note("no figure: matplotlib is not installed")
    report.save(arguments.json)


def compare_published(report: BenchmarkReport, points: list[BoundedCode]) -> None:
    """Each grid that was published is matched, and the best ratio at every whole rate is told."""
    published = {(p, n): t2 for p, grids in PUBLISHED_T2.items() for n, t2 in grids.items()}
    excess = {}
    for point in points:
        t2 = published.get((point.codec.p, point.codec.n))
        if t2 is not None:
            excess[point.codec.name] = point.t2 / t2 - 1
    report.results["excess_over_published_t2"] = excess
    for name, value in excess.items():
        report.criterion(f"excess_over_published_t2_{name}", value, f"<= {TOLERANCE}", value <= TOLERANCE)
    by_rate = {rate: min(point.ratio for point in points if point.rate_bits == rate) for rate in range(1, 9)}
    report.note("best ratio to the bound: " + ", ".join(f"{r:.3f} at {bits} bits" for bits, r in by_rate.items()))
    report.results["best_ratio_at_bits"] = by_rate


def draw(points: list[BoundedCode], path: Path) -> None:
    """Distortion over rate, and the gap to the bound in bits, one line per dimension of the grids."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure = Figure(figsize=(9.6, 4.0), dpi=150, layout="constrained")
    distortion, gap = figure.subplots(1, 2)
    rates = [point.rate_bits for point in points]
    bound = [min(rates), max(rates)]
    distortion.plot(bound, [4**-rate for rate in bound], color="black", linewidth=1.2, label="bound $2^{-2R}$")
    gap.axhline(0, color="black", linewidth=1.2)
    for p, colour in zip((1, 2, 3, 4), ("#b2182b", "#ef8a62", "#4393c3", "#2166ac"), strict=True):
        own = [point for point in points if point.codec.p == p]
        style = {"color": colour, "marker": "o", "markersize": 4, "linewidth": 1}
        x = [point.rate_bits for point in own]
        distortion.plot(x, [point.t2 for point in own], label=f"p = {p}", **style)
        gap.plot(x, [point.gap_bits for point in own], **style)
    distortion.set(yscale="log", xlabel="rate R, bits per weight", ylabel="distortion t²")
    gap.set(xlabel="rate R, bits per weight", ylabel="gap to the bound, bits per weight", ylim=(-0.02, None))
    distortion.legend(frameon=False)
    for axes in (distortion, gap):
        axes.grid(color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")


if __name__ == "__main__":
    main()
