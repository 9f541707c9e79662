"""Tables for people: plans, artifacts and evaluations. Programs use `--json`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from waterfill.api import Evaluation, Inspection
from waterfill.budget import format_size
from waterfill.plan import Plan, Prediction, TensorPlan

MAX_ROWS = 60  # beyond this many matrices a table shows one line per kind of matrix unless asked otherwise


def plan_view(plan: Plan, *, every: bool = False, measured_t2: Mapping[str, float] | None = None) -> RenderableType:
    """The plan's matrices and totals; `every` forces one line per matrix."""
    detailed = every or len(plan.tensors) <= MAX_ROWS
    table = _matrix_table(plan.tensors, measured_t2) if detailed else _kind_table(plan.tensors)
    kept_bytes = sum(kept.size_bytes for kept in plan.kept)
    lines = [
        Text(f"{len(plan.tensors)} matrices at {plan.bits:.4g} bits per weight, scales included; "
             f"{len(plan.kept)} other tensors kept ({format_size(kept_bytes)})"),
        Text(f"weight files: {plan.size_bytes:,} bytes ({format_size(plan.size_bytes)})", style="bold"),
        prediction_text(plan.predicted, plan.probe),
        Text(f"allocation: {plan.optimal}", style="dim"),
    ]  # fmt: skip
    return Group(table, *lines)


def prediction_text(predicted: Prediction, probe: Mapping[str, object]) -> Text:
    """The promise in one line, or why there is none."""
    if not predicted.in_regime:
        return Text(
            f"predicted loss: beyond the range where predictions hold (the model says at least {predicted.kl_low:.2g} "
            "nats per token); pack it and measure with `waterfill eval`, or allow more bytes",
            style="bold yellow",
        )
    return Text(
        f"predicted loss: KL {predicted.kl:.4g} nats per token ({predicted.kl_low:.3g} to {predicted.kl_high:.3g}), "
        f"perplexity +{100 * (predicted.ppl / predicted.ppl_reference - 1):.2f} % "
        f"({predicted.ppl_reference:.2f} to {predicted.ppl:.2f} on the probe, {probe.get('kind')})",
        style="bold green",
    )


def _matrix_table(tensors: Iterable[TensorPlan], measured_t2: Mapping[str, float] | None) -> Table:
    table = Table("matrix", "shape", "codec", "bits", "bytes", "alpha", "t²", "KL share", header_style="bold")
    if measured_t2 is not None:
        table.add_column("t² measured")
    for column in table.columns[3:]:
        column.justify = "right"
    for t in tensors:
        row = [t.name, f"{t.shape[0]}x{t.shape[1]}", t.codec, f"{t.rate_bits:.3f}", f"{t.size_bytes:,}",
               f"{t.alpha:.3g}", f"{t.t2:.3g}", f"{t.kl:.3g}"]  # fmt: skip
        if measured_t2 is not None:
            row.append(f"{measured_t2[t.name]:.3g}" if t.name in measured_t2 else "")
        table.add_row(*row)
    return table


def _kind_table(tensors: Iterable[TensorPlan]) -> Table:
    """One line per kind: names with their layer and expert numbers left out."""
    kinds: dict[str, list[TensorPlan]] = {}
    for tensor in tensors:
        kind = ".".join("*" if part.isdecimal() else part for part in tensor.name.split("."))
        kinds.setdefault(kind, []).append(tensor)
    table = Table("matrices", "count", "bits: mean", "least", "most", "bytes", "alpha", "KL share", header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for kind, members in kinds.items():
        size_bytes = sum(t.size_bytes for t in members)
        rates = [t.rate_bits for t in members]
        table.add_row(
            kind,
            str(len(members)),
            f"{8 * size_bytes / sum(t.weights for t in members):.3f}",
            f"{min(rates):.3f}",
            f"{max(rates):.3f}",
            f"{size_bytes:,}",
            f"{sum(t.alpha for t in members):.3g}",
            f"{sum(t.kl for t in members):.3g}",
        )
    return table


def inspection_view(inspection: Inspection, *, every: bool = False) -> RenderableType:
    """What is in an artifact."""
    plan = inspection.plan
    title = Text(f"{inspection.path}: {plan.model}, packed for {dict(plan.budget)}, gain {plan.gain}", style="bold")
    return Group(title, plan_view(plan, every=every, measured_t2=inspection.measured_t2))


def evaluation_view(result: Evaluation) -> RenderableType:
    """Prediction beside measurement."""
    table = Table("", "measured", "predicted", "reference", header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    if result.predicted_kl is None:
        predicted = "-"
    elif result.predicted_high is None:
        predicted = "out of range"
    else:
        predicted = f"{result.predicted_kl:.5f} ({result.predicted_low:.4f} to {result.predicted_high:.4f})"
    table.add_row("KL, nats per token", f"{result.kl:.5f} ± {result.kl_stderr:.5f}", predicted, "0")
    table.add_row(f"perplexity (context {result.context})", f"{result.ppl:.3f}", "", f"{result.ppl_reference:.3f}")
    table.add_row("top-1 agreement", f"{100 * result.top1_agreement:.2f} %", "", "100 %")
    table.add_row("weight files", f"{result.size_bytes:,} bytes", "", "")
    return Group(
        table, Text(f"{result.tokens:,} tokens scored, non-overlapping windows (GPTQ convention)", style="dim")
    )
