"""What `waterfill eval` prints: tables for people, one object for programs (docs/cli.md)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from waterfill.cli.show.tables import plain_table
from waterfill.planning.budget import format_size

if TYPE_CHECKING:  # they import torch, which the command line does without until a command runs
    from waterfill.evaluation import Divergence, Estimate, Perplexity
    from waterfill.evaluation.efficiency import Efficiency
    from waterfill.evaluation.evaluate import Evaluation
    from waterfill.evaluation.paired import Paired
    from waterfill.evaluation.tasks import TaskResults, TaskScore

CONVENTION_NAMES = {"gptq": "GPTQ convention", "llama.cpp": "llama.cpp's convention", "decode": "decode mode"}


def view(result: Evaluation, *, statistics: bool = False) -> RenderableType:
    """What was measured; `statistics` adds the three blocks of llama-perplexity."""
    parts: list[RenderableType] = []
    if result.divergence is not None:
        parts += _divergence(result, result.divergence)
        if statistics:
            parts += ["", *_blocks(result.divergence)]
    if result.perplexity is not None:
        parts += _perplexity(result, result.perplexity)
    if result.tasks is not None:
        parts += ["", _tasks(result.tasks, result.tasks_reference)]
    if result.efficiency is not None:
        parts += ["", *_efficiency(result.efficiency)]
    return Group(*(parts if parts[0] else parts[1:]))


def record(result: Evaluation) -> dict[str, Any]:
    """An evaluation as one JSON object: everything measured, and what was predicted."""
    fields: dict[str, Any] = {}
    if result.divergence is not None:
        predicted = {name: getattr(result, name) for name in ("predicted_kl", "predicted_low", "predicted_high")}
        fields |= {**result.divergence.to_dict(), **predicted}
    if result.beside is not None:
        fields["beside"] = result.beside.to_dict()
    if result.perplexity is not None:
        fields |= result.perplexity.to_dict()
    for name in ("tasks", "tasks_reference", "efficiency"):
        part = getattr(result, name)
        if part is not None:
            fields[name] = part.to_dict()
    return {**fields, "size_bytes": result.size_bytes}


def _divergence(result: Evaluation, measured: Divergence) -> Iterator[RenderableType]:
    """Prediction beside measurement."""
    if result.predicted_kl is None:
        predicted = "-"
    elif result.predicted_low is None or result.predicted_high is None:
        predicted = "out of range"
    else:
        predicted = f"{result.predicted_kl:.4g} ({result.predicted_low:.3g} to {result.predicted_high:.3g})"
    table = plain_table(("", "left"), ("packed", "right"), ("predicted", "right"), ("original", "right"))
    table.add_row("KL, nats per token", f"{measured.kl:.4g} ± {measured.kl_stderr:.2g}", predicted, "")
    tail = measured.kl_statistics
    most = " / ".join(f"{kl:.3g}" for kl in (tail.percentile_90, tail.percentile_99, tail.percentile_99_9))
    table.add_row("  at most, of 90 / 99 / 99.9 % of tokens", most, "", "")
    table.add_row("perplexity", f"{measured.ppl:.3f}", "", f"{measured.ppl_reference:.3f}")
    top1 = f"{100 * measured.top1_agreement:.2f} ± {100 * measured.top1_stderr:.2g}"
    table.add_row("top-1 agreement, %", top1, "", "")
    table.add_row("weight files", format_size(result.size_bytes), "", "")
    yield table
    if result.beside is not None:
        yield from ("", _beside(result.beside), "")
    yield Text(_measured_on(measured), style="dim")
    if measured.reference.form in ("top-k", "llama.cpp"):
        yield Text(_known(measured), style="dim")


def _beside(other: Paired) -> Table:
    """What another model loses on the same windows, and the intervals of what it is less."""
    table = plain_table(
        ("beside the other", "left"), ("the other", "right"), ("difference", "right"), ("95 %", "right")
    )
    for name, value, figure in (("KL, nats per token", f"{other.kl:.4g}", "kl"), ("log perplexity", "", "nll")):
        mean, low, high = (getattr(other, f"{figure}_difference{end}") for end in ("", "_low", "_high"))
        table.add_row(name, value, f"{mean:+.3g}", f"{low:+.3g} to {high:+.3g}")
    table.add_row("perplexity", f"{other.ppl:.3f}", "", "")
    table.add_row("weight files", format_size(other.size_bytes), "", "")
    return table


def _perplexity(result: Evaluation, measured: Perplexity) -> Iterator[RenderableType]:
    table = plain_table(("on this text", "left"), ("", "right"))
    table.add_row("perplexity", f"{measured.ppl:.4f} ± {measured.ppl * measured.nll_stderr:.2g}")
    table.add_row("weight files", format_size(result.size_bytes))
    yield table
    yield Text(_measured_on(measured), style="dim")


def _tasks(results: TaskResults, original: TaskResults | None) -> Table:
    others = {} if original is None else {(s.task, s.metric, s.filter): s for s in original.scores}
    columns = [("task", "left"), ("metric", "left"), ("shots", "right"), ("questions", "right"), ("score", "right")]
    table = plain_table(*columns, *([("original", "right")] if original is not None else []))
    for score in results.scores:
        name = score.metric if score.filter == "none" else f"{score.metric} ({score.filter})"
        counts = ("" if count is None else str(count) for count in (score.shots, score.samples))
        other = others.get((score.task, score.metric, score.filter))
        table.add_row(score.task, name, *counts, _score(score), *([] if other is None else [_score(other)]))
    return table


def _score(score: TaskScore) -> str:
    return f"{score.value:.4f}" if score.stderr is None else f"{score.value:.4f} ± {score.stderr:.4f}"


def _efficiency(measured: Efficiency) -> Iterator[RenderableType]:
    table = plain_table(("efficiency", "left"), ("", "right"))
    table.add_row("weight files", f"{measured.size_bytes:,} bytes ({format_size(measured.size_bytes)})")
    table.add_row("bits per weight, all files and tensors", f"{measured.bits_per_weight:.3f}")
    table.add_row("peak memory before loading", format_size(measured.memory_start_bytes))
    table.add_row("  after loading", format_size(measured.memory_load_bytes))
    table.add_row("  after the prompt", format_size(measured.memory_prefill_bytes))
    table.add_row("  after generation", format_size(measured.memory_generation_bytes))
    table.add_row(f"  after generation, batch {measured.batch}", format_size(measured.memory_batch_bytes))
    table.add_row("time to first token", f"{measured.first_token_s:.3g} s")
    table.add_row("tokens per second", f"{measured.tokens_per_s:.1f}")
    table.add_row(f"tokens per second, batch {measured.batch}", f"{measured.tokens_per_s_batch:.1f}")
    joule = measured.energy_j_per_token
    table.add_row("energy per token", "this machine does not tell" if joule is None else f"{joule:.3g} J")
    yield table
    yield Text(
        f"{measured.prompt_tokens} tokens read, {measured.new_tokens} written, greedily; "
        f"{measured.threads} threads, {measured.dtype}",
        style="dim",
    )


def _measured_on(measured: Divergence | Perplexity) -> str:
    usual = "rows of exllamav3, one every {} tokens" if measured.convention == "exl3" else "strided by {}"
    name = CONVENTION_NAMES.get(measured.convention, usual.format(measured.stride))
    return f"{measured.tokens:,} tokens in windows of {measured.context} ({name})"


def _known(measured: Divergence) -> str:
    """What the form of the reference means for the KL."""
    reference = measured.reference
    if reference.form == "llama.cpp":
        return (
            "reference: 16-bit log-probabilities of llama-perplexity; what is 16 nats below the likeliest is left out"
        )
    return (
        f"reference: the likeliest {reference.kept:,} tokens of each position and a sample of the rest; KL of this "
        f"text within ± {reference.kl_sampling_stderr:.1g} (standard error), for certain "
        f"{reference.kl_low:.4g} to {reference.kl_high:.4g}"
    )


def _blocks(measured: Divergence) -> Iterator[RenderableType]:
    """As `llama-perplexity --kl-divergence` prints them: the same names, order and digits."""
    ppl, kl, token = measured.perplexity_statistics, measured.kl_statistics, measured.token_statistics
    block = _block("Perplexity statistics")
    block.add_row("Mean PPL(Q)", *_plus_minus(ppl.ppl))
    block.add_row("Mean PPL(base)", *_plus_minus(ppl.ppl_reference))
    block.add_row("Cor(ln(PPL(Q)), ln(PPL(base)))", f"{100 * ppl.correlation:.2f}%", "")
    block.add_row("Mean ln(PPL(Q)/PPL(base))", *_plus_minus(ppl.log_ppl_ratio))
    block.add_row("Mean PPL(Q)/PPL(base)", *_plus_minus(ppl.ppl_ratio))
    block.add_row("Mean PPL(Q)-PPL(base)", *_plus_minus(ppl.ppl_difference))
    yield block
    yield ""
    block = _block("KL divergence statistics")
    block.add_row("Mean    KLD", *_plus_minus(kl.mean))
    for name, value in _percentiles(kl.to_dict()):
        block.add_row(f"{name} KLD", f"{value:.6f}", "")
    yield block
    yield ""
    block = _block("Token probability statistics")
    block.add_row("Mean    Δp", *_plus_minus(token.mean, percent=True))
    for name, value in _percentiles(token.to_dict()):
        block.add_row(f"{name} Δp", f"{100 * value:.3f}%", "")
    block.add_row("RMS Δp", *_plus_minus(token.rms, percent=True))
    block.add_row("Same top p", *_plus_minus(token.same_top, percent=True))
    yield block


def _block(title: str) -> Table:
    return plain_table((title, "left"), ("", "right"), ("±", "right"))


def _plus_minus(estimate: Estimate, *, percent: bool = False) -> tuple[str, str]:
    if percent:
        return f"{100 * estimate.value:.3f}%", f"{100 * estimate.error:.3f}%"
    return f"{estimate.value:.6f}", f"{estimate.error:.6f}"


def _percentiles(fields: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in fields.items():
        if name.startswith("percentile_"):
            yield f"{float(name.removeprefix('percentile_').replace('_', '.')):4.1f}%  ", value
        elif name in ("maximum", "median", "minimum"):
            yield f"{name.capitalize():7}", value
