"""The plot and the page of `compressibility.py`. Every number on the page comes from its report.

python -m benchmarks.compressibility.page REPORT.json PAGE.md    writes the page again from a report that was kept
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from benchmarks.results import table
from benchmarks.shared.models import Measured

COLOURS = {"tensor": "#b2182b", "row": "#ef8a62", "g128": "#d9a441", "g64": "#7fbf7b", "g32": "#1b7837"}
MARKERS = {"NF4 g64": "D", "Q4_0": "s"}
TEMPLATE = Path(__file__).with_suffix(".md")


class DrawnPoint(Protocol):
    """Of `compressibility.py`."""

    name: str
    size_bytes: int
    best_bytes: int
    measured: Measured


def draw(points: Sequence[DrawnPoint], joint: Mapping[str, Sequence[DrawnPoint]], path: Path) -> None:
    """KL over bytes of the matrices."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure = Figure(figsize=(9.6, 6.0), dpi=150, layout="constrained")
    axes = figure.subplots()
    plain = [point for point in points if "Hadamard" not in point.name]
    for group, colour in COLOURS.items():
        family = [point for point in plain if point.name.startswith("INT") and point.name.endswith(f" {group}")]
        draw_family(axes, family, f"INT3 … INT8, scale per {group}", colour, "o")
    for name, marker in MARKERS.items():
        draw_family(axes, [point for point in plain if point.name == name], name, "#762a83", marker)
    grids = [point for point in plain if point.name.startswith("HIGGS p2")]
    draw_family(axes, grids, "HIGGS p = 2", "#2166ac", "^")
    for (what, curve), style in zip(joint.items(), ("--", "-"), strict=True):
        axes.plot(*coordinates(curve, coded=True), style, color="black", linewidth=1.6, label=what)
    axes.set(yscale="log", xlabel="bytes of all matrices, MB", ylabel="KL, nats per token")
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")


def draw_family(axes: Any, points: Sequence[DrawnPoint], label: str, colour: str, marker: str) -> None:
    style = {"color": colour, "marker": marker, "markersize": 5}
    points = sorted(points, key=lambda point: point.size_bytes)
    axes.plot(*coordinates(points, coded=False), linestyle=":", linewidth=0.8, markerfacecolor="white", **style)
    axes.plot(*coordinates(points, coded=True), linestyle="-", linewidth=1.0, label=label, **style)


def coordinates(points: Sequence[DrawnPoint], *, coded: bool) -> tuple[list[float], list[float]]:
    sizes = [(point.best_bytes if coded else point.size_bytes) / 1e6 for point in points]
    return sizes, [point.measured.kl for point in points]


def write_page(results: Mapping[str, Any], used: Mapping[str, Any], path: Path) -> None:
    """All of docs/compressibility.md."""
    sizes = {row["method"]: row for row in results["sizes"]}
    equal = {row["method"]: row for row in results["equal_kl"]}

    def span(column: str) -> tuple[float, float]:
        values = [row[column] for row in equal.values() if row[column] is not None]
        return min(values), max(values)

    def excess(coder: str) -> tuple[float, float]:
        values = [row[coder] / (row["entropy"] + row["scales coded"]) - 1 for row in sizes.values()]
        return min(values), max(values)

    stored = [
        row["trellis, allotted, at that KL"] / row["stored bytes"]
        for row in equal.values()
        if row["trellis, allotted, at that KL"] is not None
    ]
    names = {"tensor": "INT4 tensor", "row": "INT4 row", "g128": "INT4 g128", "g64": "INT4 g64", "g32": "INT4 g32"}
    shares = {"nf4": "NF4 g64", "q4": "Q4_0", "p1n16": "HIGGS p1-n16", "p2n16": "HIGGS p2-n16"}
    shares |= {"8tensor": "INT8 tensor", "8g64": "INT8 g64"}
    shares |= {"p2n64": "HIGGS p2-n64", "p2n256": "HIGGS p2-n256", **names}
    values: dict[str, Any] = {f"int4_{key}": f"{sizes[name]['entropy']:.2f}" for key, name in names.items()}
    values |= {f"saved_{key}": sizes[name]["saved by the best"] for key, name in shares.items()}
    for key, column in (("one", "one rate / coded"), ("all", "allotted / coded")):
        values[f"{key}_low"], values[f"{key}_high"] = span(column)
    values["raw_low"], values["raw_high"] = min(stored), max(stored)
    values["rans_low"], values["rans_high"] = excess("rANS")
    values["huff_low"], values["huff_high"] = excess("Huff0")
    row, n64, rotated = sizes["INT4 row"], sizes["HIGGS p2-n64"], "INT4 row + Hadamard"
    values |= {
        "zstd1_row": row["zstd -1"],
        "zstd19_row": row["zstd -19"],
        "lz4_row": f"{row['lz4']} of {row['stored']}",
    }
    values |= {"zstd1_n64": n64["zstd -1"], "stored_n64": n64["stored"]}
    values |= {"int4_row_had": f"{sizes[rotated]['entropy']:.2f}", "row_had_kl": equal[rotated]["KL"]}
    values["row_kl"] = equal["INT4 row"]["KL"]
    one, all_rates = "trellis, one rate, at that KL", "trellis, allotted, at that KL"
    values["over_row"] = equal["INT4 row"]["best coded"] / equal["INT4 row"][one] - 1
    for key in ("g128", "nf4", "q4", "p2n256"):
        values[f"over_{key}"] = equal[shares[key]]["stored bytes"] / equal[shares[key]][one] - 1
    known = [row for row in equal.values() if row[one] is not None and row[all_rates] is not None]
    values["nearest"] = max(known, key=lambda row: row["one rate / coded"])["method"]
    allotting = [1 - row[all_rates] / row[one] for row in known]
    values["allot_low"], values["allot_high"] = min(allotting), max(allotting)
    page = TEMPLATE.read_text("utf-8").format(
        **values,
        weights=results["weights"],
        windows=results["text"],
        sizes="\n".join(table(results["sizes"])),
        equal="\n".join(table(results["equal_kl"])),
        uniform="\n".join(table(results["trellis_one_rate"])),
        allotted="\n".join(table(results["trellis_allotted"])),
        where=f"{used['cpu']}, Python {used['python']}, torch {used['torch']}. Nothing here is a speed.",
    )
    path.write_text(page, "utf-8")


if __name__ == "__main__":
    kept = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    write_page(kept["results"], kept["machine"], Path(sys.argv[2]))
