"""docs/results.md from the files that the other scripts wrote: `python benchmarks/results.py FOLDER`.

FOLDER holds NAME.json for each script NAME (`python benchmarks/NAME.py --json FOLDER/NAME.json`); a chapter whose file
is missing is left out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.shared.report import REPOSITORY

RESULTS = REPOSITORY / "docs" / "results.md"
INTRODUCTION = """# Results

Printed by the scripts in `benchmarks/`, collected by `benchmarks/results.py`. ✓ and ✗ say whether a figure reaches its
goal. Model, where none is named: `examples/ref-llama` (6.8 M weights, tied embeddings, bf16), a small and lightly
trained Llama: compare methods and predictions with one another, its quality means nothing else. Text: Python source
that it has not seen.
"""
# Per script: heading, and what a reader needs to know beside its tables.
CHAPTERS = {
    "bound": (
        "The fixed-rate menu against the Gaussian bound",
        "![t² against rate](images/rate-distortion.png)\n\nt² is measured on an independent sample (p = 1: exact).",
    ),
    "prediction": (
        "Prediction against measurement",
        "Bits are those of the indices; stored bits count scales and padding. Above 0.1 nats per token the prediction "
        "is too low, and plans say so instead of giving an interval.",
    ),
    "gains": (
        "The three gains",
        "For the same codecs: the chosen gain, the MSE scale, the unbiased scale. The GPT-2 is trained by the script "
        "for minutes. Its allotted plans lose more than predicted, and at 3.25 bits the MSE scale's own plan, which "
        "allots other bits, loses less than the chosen gain's.",
    ),
    "sensitivity": ("The two estimators", ""),
    "quality": (
        "Against other methods at equal bytes",
        "`uniform` is one grid for all matrices that takes no more bits than the method it stands beside, `allotted` "
        "the plan within the same bits.",
    ),
    "conventions": (
        "Figures that people know",
        "What llama-perplexity prints against what waterfill computes on the same weights and windows, in units of the "
        "last digit printed; and lm-eval's figures for documents against those of `waterfill eval --tasks`.",
    ),
    "compare": (
        "Every method at true bytes, and the theorem under test",
        "![KL against bytes](images/compare.png)\n\nBeside every method stands our plan within the method's bytes, "
        "planned without data. Methods called calibrated have seen text of the kind that is measured on. In the second "
        "figure every point is one packed model.\n\n![Predicted and measured KL](images/theorem.png)",
    ),
    "streaming": (
        "Models that do not fit in memory",
        "Random weights in the shapes named, at 3 bits, streamed by the engine within a third of the artifact: `group` "
        "is what the control group counts, page cache included. `over the slowest` is the time of a token over the "
        "longest of reading, decoding and computing, each alone; decoding and computing share the cores, so where "
        "storage is fast it is their sum that counts. llama.cpp maps its file; what the limit leaves is page cache. "
        "accelerate and AirLLM do not end below the limit that they were given; we are then measured once more under "
        "the same one, in which all weights stay in memory. The device's own speed drifts: there we are measured once "
        "more right after each peer, and `times as fast` is of those two. Rows of one model and storage are of one "
        "run; beside fixed rates and peers, those of storage that is slowed down were measured some commits before "
        "the others, and are medians of passes where the others are means.",
    ),
    "allocation": ("Allocation", ""),
    "lossless": (
        "Lossless coding",
        "Share of the weights' bytes that is left, headers of streams included, beside the entropy of exponents (sign "
        "and mantissa as they are, trailing zeros of mantissas for nothing) and beside ZipNN, both with one thread. "
        "float16 weights that were bfloat16 take less than that entropy: their mantissas' lower bits are mostly zero.",
    ),
    "footprint": ("Memory and time of planning and packing", ""),
    "rate_distortion": (
        "Entropy-coded trellis quantisation",
        "Distances to the bound count every stored byte. Quoted rows are from public re-implementations. Speeds are of "
        "this machine's instruction sets; the peers decode indices alone, without a trellis and without scales. What "
        "quantised weights can be compressed to: [compressibility.md](compressibility.md).",
    ),
    "fuzz_streams": ("Damaged streams", "Every case goes through the reference and every native decoder."),
    "kernels": (
        "Kernels",
        "Sections measured one after the other; this virtual machine's DRAM reads at 25 to 56 GB/s from one minute to "
        "the next, which the spreads show. Whole models are run by the engine. Other libraries' 4-bit kernels reach "
        "the memory's speed too when it is the only load: between two that do, the ratio is that of their bits.",
    ),
}


def main() -> None:
    folder = Path(sys.argv[1])
    chapters = [INTRODUCTION]
    for name, (heading, text) in CHAPTERS.items():
        path = folder / f"{name}.json"
        if path.is_file():
            chapters.append(chapter(name, heading, text, json.loads(path.read_text("utf-8"))))
    RESULTS.write_text("\n".join(chapters), "utf-8")


def chapter(name: str, heading: str, text: str, report: dict[str, Any]) -> str:
    machine = report["machine"]
    where = f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}, torch {machine['torch']}"
    lines = [f"## {heading} (`{name}.py`)", "", *([text, ""] if text else []), f"*{where}.*", ""]
    for key, criterion in report["criteria"].items():
        mark = "✓" if criterion["holds"] else "✗"
        lines.append(f"- {mark} {key.replace('_', ' ')}: {cell(criterion['value'])} (goal {cell(criterion['goal'])})")
    for key, rows in report["results"].items():
        if isinstance(rows, list) and rows and isinstance(rows[0], dict):
            lines += ["", f"**{key.replace('_', ' ')}**", "", *table(rows)]
    return "\n".join([*lines, ""])


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    columns = list(rows[0])
    body = ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in rows]
    return ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *body]


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "—" if value is None else str(value)


if __name__ == "__main__":
    main()
