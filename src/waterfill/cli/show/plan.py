"""What the command line prints: tables for people, objects for programs (docs/cli.md)."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.table import Table
from rich.text import Text

from waterfill.cli.show.tables import plain_table
from waterfill.planning.budget import format_size

if TYPE_CHECKING:  # they import torch, which the command line does without until a command runs
    from waterfill.api import Inspection
    from waterfill.packing.seal import Sealed
    from waterfill.planning.plan import KeptPlan, Plan, Prediction, TensorPlan
    from waterfill.planning.speed import Speed

MAX_ROWS = 60  # beyond this many matrices a table shows one line per kind of matrix unless asked otherwise
MOST_KL = 700.0  # whose perplexity is still a number
HARDLY_MEASURED = 0.5  # share of the measurement in its sensitivity, below which a matrix is named as assumed
NOTABLE_SHARE = 0.01  # of the artifact, that a kept tensor must have to be named

_PROBES = {"self": "text from the model itself", "random": "random tokens"}


# ---------------------------------------------------------------------------------------------------------- for people


def plan_view(plan: Plan, *, every: bool = False, measured_t2: Mapping[str, float] | None = None) -> RenderableType:
    """The plan's matrices and totals; `every` forces one line per matrix."""
    if plan.lossless:
        return Group(_kept_table(plan.kept, every=every), "", _summary(plan))
    detailed = every or len(plan.tensors) <= MAX_ROWS
    table = _matrix_table(plan.tensors, measured_t2) if detailed else _kind_table(plan.tensors)
    return Group(table, "", _summary(plan))


def inspection_view(inspection: Inspection, *, every: bool = False) -> RenderableType:
    """What is in an artifact: the plan it was packed by, beside what was measured while packing."""
    return plan_view(inspection.plan, every=every, measured_t2=inspection.measured_t2)


def sealed_view(sealed: Sealed) -> str:
    """The files that are others than before, one a line."""
    lines = [f"{how}  {name}" for how in ("changed", "added", "removed") for name in getattr(sealed, how)]
    return "\n".join(lines) or "nothing has changed"


def _summary(plan: Plan) -> Table:
    """The totals, and what they are predicted to cost."""
    kept_bytes = sum(kept.size_bytes for kept in plan.kept)
    budget = ", ".join(f"--{name.removesuffix('_bytes').replace('_', '-')} {v:,}" for name, v in plan.budget.items())
    lines: dict[str, str | Text] = {"model": f"{plan.model}, {format_size(plan.original_bytes)}"}
    times = plan.original_bytes / plan.size_bytes
    files = f"{plan.size_bytes:,} bytes ({format_size(plan.size_bytes)})"
    if plan.lossless:
        share = 100 * plan.size_bytes / plan.original_bytes
        lines |= {
            "tensors": f"{len(plan.kept)} at {plan.bits:.4g} bits per weight",
            "weight files": f"{files}, {share:.1f} % of the original",
            "predicted": Text(f"lossless: every bit {'of these ' if plan.unused else ''}comes back", style="green"),
        }
    else:
        lines |= {
            "budget": f"{budget}, gain {plan.gain}",
            "matrices": f"{len(plan.tensors)} at {plan.bits:.4g} bits per weight, scales included",
            "kept": f"{len(plan.kept)} other tensors, {format_size(kept_bytes)}{_largest_kept(plan)}",
            "weight files": f"{files}, {times:.1f} times smaller",
            "predicted": _prediction(plan.predicted, plan.probe),
            **_levels(plan),
            **_sampling(plan),
            **_feedback(plan),
            **_evidence(plan),
            **_speed(plan.speed),
            "allocation": plan.optimal,
        }
    lines |= _unused(plan)
    grid = Table.grid(padding=(0, 2))
    for name, line in lines.items():
        grid.add_row(Text(name, style="bold"), line)
    return grid


def _largest_kept(plan: Plan) -> str:
    """Names what costs much because it cannot be packed, or because the user keeps it."""
    largest = max(plan.kept, key=lambda kept: kept.size_bytes, default=None)
    if largest is None or largest.size_bytes < NOTABLE_SHARE * plan.size_bytes:
        return ""
    return f", of which {largest.name} has {format_size(largest.size_bytes)}"


def _prediction(predicted: Prediction, probe: Mapping[str, Any]) -> Text:
    """The promise, or why there is none."""
    if (borrowed := _borrowed(predicted, probe)) is not None:
        return Text(borrowed, style="yellow")
    if predicted.kl_high is None:
        return Text(
            f"beyond the range where predictions hold (the model says at least {predicted.kl_low:.2g} nats per token): "
            "measure with `waterfill eval`, or allow more bytes",
            style="yellow",
        )
    measured_on = probe.get("text") or _PROBES.get(str(probe.get("kind")), "an unknown probe")
    rise, low, high = (100 * math.expm1(min(kl, MOST_KL)) for kl in (predicted.kl, predicted.kl_low, predicted.kl_high))
    return Text(
        f"KL {predicted.kl:.4g} nats per token ({predicted.kl_low:.3g} to {predicted.kl_high:.3g}), "
        f"perplexity +{rise:.2f} % (+{low:.2f} to +{high:.2f}), measured on {measured_on}",
        style="green",
    )


def _borrowed(predicted: Prediction, probe: Mapping[str, Any]) -> str | None:
    """What is said in place of a promise where nothing was measured on the model."""
    kind, source = probe.get("kind"), probe.get("source")
    if kind == "uniform":
        return f"a mean relative squared error of the weights of {predicted.kl:.3g}; what that costs was not measured"
    if kind == "table":
        return f"no loss: the sensitivities are those of a table, {source}, and say only which matrices matter more"
    if kind == "sibling":
        return (
            f"KL {predicted.kl:.2g} nats per token if it is like the model of fingerprint {source}, which the "
            "sensitivities were measured on: a guess, no promise"
        )
    return None


def _feedback(plan: Plan) -> dict[str, str]:
    """What feeding errors back gives, and by what."""
    calibration, left = plan.calibration, plan.left_by_feedback
    if calibration is None:
        return {}
    share = "" if left is None else f", leaves {left:.0%} of their loss"
    by = f"{calibration.token_count:,} tokens of {calibration.text or _PROBES['self']}"
    return {"feedback": f"of errors in {len(plan.fed_back)} matrices{share}; by {by}"}


def _levels(plan: Plan) -> dict[str, str]:
    """The lower rates that it can be read at."""
    return {
        f"at {level.bits:.3g} bits": f"{level.size_bytes:,} bytes are read"
        + (f", predicted KL {level.predicted.kl:.4g}" if plan.promises else "")
        for level in plan.levels[:-1]
    }


def _speed(speed: Speed | None) -> dict[str, str]:
    """How fast products are, and where that holds; nothing for a plan that says nothing of it."""
    if speed is None:
        return {}
    work_ms, rate = 1000 * speed.working_s, f"{speed.tokens_per_second:.4g} tokens per second"
    if speed.storage_bytes_per_s is None:
        how = f"by the weights' products alone, {work_ms:.3g} ms, all weights in memory"
    else:
        how = (
            f"by the weights alone, streamed at {format_size(speed.storage_bytes_per_s)}/s and none kept in memory: "
            f"{1000 * speed.reading_s:.3g} ms of reading, {work_ms:.3g} ms of decoding and products"
        )
    threads = f"{speed.threads} thread{'s' * (speed.threads > 1)}"
    return {"speed": f"{rate}, {how}; on {speed.machine}, {speed.isa}, {threads}"}


def _unused(plan: Plan) -> dict[str, Text]:
    """A line about tensors of the checkpoint that the artifact does not have, if there are any."""
    if not plan.unused:
        return {}
    surprising = [tensor for tensor in plan.unused if not tensor.expected]
    size = format_size(sum(tensor.size_bytes for tensor in plan.unused))
    sentence = f"{len(plan.unused)} tensors of the checkpoint, {size}, such as {(surprising or plan.unused)[0].name}: "
    why = "the model of config.json has no place for them" if surprising else "transformers does without them, too"
    return {"left out": Text(sentence + why, style="yellow" if surprising else "")}


def _sampling(plan: Plan) -> dict[str, str | Text]:
    """How well the loss is known, where it was measured on a probe."""
    predicted, length = plan.predicted, plan.probe.get("length")
    sequences = predicted.tried or plan.probe.get("sequences")
    if not predicted.kl or not sequences:
        return {}
    share = 100 * predicted.sampling_error / predicted.kl
    known = f"±{share:.0f} % by {sequences} sequences of {length} tokens, besides the margin of predictions"
    if not predicted.tried:
        return {"known to": known}
    times = f"{predicted.factor:.2f} times what sensitivities add up to"
    return {"tried": f"with noise of this size in all matrices at once: {times}", "known to": known}


def _evidence(plan: Plan) -> dict[str, Text]:
    """A line about the matrices whose sensitivities were assumed rather than measured, if there are any."""
    assumed = [tensor for tensor in plan.tensors if tensor.measured < HARDLY_MEASURED]
    if not assumed:
        return {}
    unreached = sum(tensor.measured == 0 for tensor in assumed)
    share = 100 * sum(tensor.weights for tensor in assumed) / sum(tensor.weights for tensor in plan.tensors)
    like = Counter(_kind(tensor.like or "") for tensor in assumed).most_common()
    sentence = (
        f"the probe hardly reached {len(assumed)} matrices ({share:.2g} % of the weights), {unreached} of them not at "
        f"all; they are taken to be as sensitive as {like[0][0]}{' and others' if len(like) > 1 else ''} usually are, "
        "and the prediction does not cover text that uses them more; --keep keeps them as they are"
    )
    return {"not measured": Text(sentence, style="yellow")}


@dataclass(frozen=True)
class _Column:
    title: str
    cell: Callable[[TensorPlan], str]
    justify: Any = "right"
    rank: int = 0  # columns with the highest rank go first where the terminal is too narrow


@dataclass(frozen=True)
class _FittedTable:
    """Shows as many columns as fit, and none of them cut."""

    columns: Sequence[_Column]
    tensors: Sequence[TensorPlan]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[RenderableType]:
        columns = list(self.columns)
        while (
            console.measure(self._table(columns), options=options.update(max_width=1 << 20)).maximum > options.max_width
        ):
            least = max(columns, key=lambda column: column.rank)
            if least.rank == 0:
                break
            columns.remove(least)
        yield self._table(columns)

    def _table(self, columns: Sequence[_Column]) -> Table:
        table = plain_table(*((column.title, column.justify) for column in columns))
        for tensor in self.tensors:
            table.add_row(*(column.cell(tensor) for column in columns))
        return table


def _matrix_table(tensors: Sequence[TensorPlan], measured_t2: Mapping[str, float] | None) -> RenderableType:
    columns = [
        _Column("matrix", lambda t: t.name, "left"),
        _Column("shape", lambda t: f"{t.shape[0]}x{t.shape[1]}", "left", rank=4),
        _Column("codec", lambda t: t.codec, "left", rank=1),
        _Column("bits", lambda t: f"{t.rate_bits:.3f}"),
        _Column("bytes", lambda t: f"{t.size_bytes:,}", rank=3),
        _Column("alpha", lambda t: f"{t.alpha:.2g}", rank=5),
        _Column("t²", lambda t: f"{t.t2:.2g}", rank=2),
        _Column("KL", lambda t: f"{t.kl:.2g}"),
    ]
    if measured_t2 is not None:
        columns.insert(-1, _Column("t² measured", lambda t: f"{measured_t2.get(t.name, 0.0):.2g}", rank=2))
    return _FittedTable(columns, tensors)


def _kept_table(kept: Sequence[KeptPlan], *, every: bool) -> Table:
    """One line per tensor, or per kind where there are many."""
    kinds: dict[str, list[KeptPlan]] = {}
    for tensor in kept:
        kinds.setdefault(tensor.name if every or len(kept) <= MAX_ROWS else _kind(tensor.name), []).append(tensor)
    titles = ("count", "bytes", "of the original")
    table = plain_table(("tensors", "left"), ("dtype", "left"), *((title, "right") for title in titles))
    for name, members in kinds.items():
        size_bytes, original = sum(t.size_bytes for t in members), sum(t.original_bytes for t in members)
        share = f"{100 * size_bytes / original:.1f} %" if original else "-"
        table.add_row(name, members[0].dtype, str(len(members)), f"{size_bytes:,}", share)
    return table


def _kind(name: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _kind_table(tensors: Iterable[TensorPlan]) -> Table:
    """One line per kind: names with their layer and expert numbers left out."""
    kinds: dict[str, list[TensorPlan]] = {}
    for tensor in tensors:
        kinds.setdefault(_kind(tensor.name), []).append(tensor)
    titles = ("count", "bits", "least", "most", "bytes", "KL")
    table = plain_table(("matrices", "left"), *((title, "right") for title in titles))
    for kind, members in kinds.items():
        size_bytes = sum(t.size_bytes for t in members)
        rates = [t.rate_bits for t in members]
        table.add_row(
            kind,
            str(len(members)),
            f"{8 * size_bytes / sum(t.weights for t in members):.3f}",
            f"{min(rates):.3f}",
            f"{max(rates):.3f}",
            format_size(size_bytes),
            f"{sum(t.kl for t in members):.2g}",
        )
    return table


# -------------------------------------------------------------------------------------------------------- for programs


def plan_record(plan: Plan) -> dict[str, Any]:
    """A plan as one JSON object."""
    record: dict[str, Any] = json.loads(plan.to_json())
    return record


def inspection_record(inspection: Inspection) -> dict[str, Any]:
    """The plan of an artifact, its true size, and `t2_measured` of every packed matrix (0 for a raw one)."""
    record = plan_record(inspection.plan)
    for tensor in record["tensors"]:
        tensor["t2_measured"] = inspection.measured_t2.get(tensor["name"], 0.0)
    return {"path": str(inspection.path), **record, "size_bytes": inspection.size_bytes}
