"""What `waterfill compare`, `report` and `tune` print."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from waterfill.planning.budget import format_size

if TYPE_CHECKING:  # they import torch, which the command line does without until a command runs
    from waterfill.studies.comparison import Comparison, Row
    from waterfill.studies.report import Report
    from waterfill.tuning.tune import Tuned


def comparison_view(comparison: Comparison) -> RenderableType:
    """Measured methods by size, then those that cannot run here, with their reasons."""
    matched = any(row.ours_kl is not None for row in comparison.measured)
    titles = ["bytes", "bits", "KL", "±", "top-1 %", "ppl", "promised", *(["ours", "ratio"] if matched else [])]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("method", no_wrap=True)
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for row in comparison.measured:
        table.add_row(*_cells(row)[: 1 + len(titles)], style="bold" if row.family == "waterfill" else "")
    lines: list[RenderableType] = [table, ""]
    lines += [Text(f"{row.title}: {row.note}", "dim") for row in comparison.measured if row.note]
    lines += [Text(f"{row.title} was not measured: {row.problem}", "yellow") for row in comparison.rows if row.problem]
    lines.append(Text(_about(comparison, matched), "dim"))
    return Group(*lines)


def _about(comparison: Comparison, matched: bool) -> str:
    """What the figures are of, and what the columns mean."""
    perplexity = "" if comparison.ppl_reference is None else f", perplexity {comparison.ppl_reference:.3f}"
    sentences = [
        f"{comparison.model}, {format_size(comparison.original_bytes)}{perplexity}; "
        f"{comparison.tokens:,} tokens of {comparison.text} in windows of {comparison.context}."
    ]
    if matched:
        sentences.append("ours: KL of our plan within the method's bytes; ratio: that over the method's.")
    if any(row.calibrated for row in comparison.measured):
        sentences.append("*: calibrated on text.")
    return " ".join(sentences)


def _cells(row: Row) -> list[str]:
    promised = "" if row.predicted_kl is None else f"{row.predicted_kl:.3g}"
    if row.predicted_kl is not None and row.predicted_high is None:
        promised = "out of range"
    return [
        row.title + (" *" if row.calibrated else ""),
        f"{row.size_bytes:,}",
        f"{row.bits:.3f}",
        f"{row.kl:.4g}",
        f"{row.kl_stderr:.2g}",
        f"{100 * (row.top1_agreement or 0.0):.2f}",
        f"{row.ppl:.3f}",
        promised,
        "" if row.ours_kl is None else f"{row.ours_kl:.4g}",
        "" if row.ratio is None else f"{row.ratio:.2f}",
    ]


def report_view(report: Report) -> RenderableType:
    """Where the page is, and what it says in a line."""
    predicted, divergence = report.plan.predicted, report.divergence
    line = f"{report.plan.model} in {format_size(report.size_bytes)}: promised KL {predicted.kl:.4g}"
    if divergence is not None:
        line += f", measured {divergence.kl:.4g} ± {divergence.kl_stderr:.2g}"
    return Group(Text(str(report.path)), Text(line, "dim"))


def tuned_view(tuned: Tuned) -> RenderableType:
    """Where the result is, and what the held-out text says of it."""
    what = "an adapter" if tuned.what == "lora" else f"an artifact with other {tuned.what}"
    unit = "KL from the teacher" if tuned.loss == "kl" else "loss"
    losses = f"{tuned.before:.4g} → {tuned.after:.4g} nats per token"
    steps = f"best after step {tuned.best_step} of {tuned.steps}"
    line = f"{what} of {format_size(tuned.size_bytes)}; {unit} on held-out text {losses}, {steps}"
    return Group(Text(str(tuned.path)), Text(line, "dim"))


def report_record(report: Report) -> dict[str, Any]:
    """A report as one JSON object; its plan as `inspect` prints it is left out."""
    record = asdict(report)
    del record["plan"], record["measured_t2"]
    return {**record, "path": str(report.path), "model": report.plan.model, "predicted": asdict(report.plan.predicted)}
