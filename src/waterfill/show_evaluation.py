"""What `waterfill eval` prints: tables for people, one object for programs (docs/cli.md)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from waterfill.budget import format_size
from waterfill.show import plain_table

if TYPE_CHECKING:  # they import torch, which the command line does without until a command runs
    from waterfill.evaluate import Divergence, Estimate, Perplexity
    from waterfill.evaluation import Evaluation

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
    return Group(*parts)


def record(result: Evaluation) -> dict[str, Any]:
    """An evaluation as one JSON object: everything measured, and what was predicted."""
    fields: dict[str, Any] = {}
    if result.divergence is not None:
        predicted = {name: getattr(result, name) for name in ("predicted_kl", "predicted_low", "predicted_high")}
        fields |= {**result.divergence.to_dict(), **predicted}
    if result.perplexity is not None:
        fields |= result.perplexity.to_dict()
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
    table.add_row("perplexity", f"{measured.ppl:.3f}", "", f"{measured.ppl_reference:.3f}")
    top1 = f"{100 * measured.top1_agreement:.2f} ± {100 * measured.top1_stderr:.2g}"
    table.add_row("top-1 agreement, %", top1, "", "")
    table.add_row("weight files", format_size(result.size_bytes), "", "")
    yield table
    yield Text(_measured_on(measured), style="dim")
    if measured.reference.form in ("top-k", "llama.cpp"):
        yield Text(_known(measured), style="dim")


def _perplexity(result: Evaluation, measured: Perplexity) -> Iterator[RenderableType]:
    table = plain_table(("", "left"), ("", "right"))
    table.add_row("perplexity", f"{measured.ppl:.4f} ± {measured.ppl * measured.nll_stderr:.2g}")
    table.add_row("weight files", format_size(result.size_bytes))
    yield table
    yield Text(_measured_on(measured), style="dim")


def _measured_on(measured: Divergence | Perplexity) -> str:
    name = CONVENTION_NAMES.get(measured.convention, f"strided by {measured.stride}")
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
