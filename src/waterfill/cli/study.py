"""The commands that study a model: `compare` and `report`. `cli` has the others, and puts these among them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from waterfill.cli import console
from waterfill.cli.commands import FILE, PATH, SectionedCommand, purpose_option
from waterfill.cli.progress import shown
from waterfill.cli.show import study as show_study
from waterfill.cli.stages import duration


@click.command(cls=SectionedCommand)
@click.argument("model")
@click.option("--text", "text_file", type=FILE, required=True, help="Text to measure on.")
@click.option("--size", "sizes", metavar="SIZES", multiple=True, help="Sizes of our plans, e.g. 2.5GB,3GB. Repeatable.")
@click.option(
    "--bits", "bits_per_weight", metavar="LIST", multiple=True, help="Bits per weight of our plans (2.5,3,3.5,4,5,6,8)."
)
@click.option(
    "--methods",
    metavar="NAMES",
    multiple=True,
    help="Names or patterns, e.g. 'waterfill,hqq-*'; '*' is all. Repeatable.",
)
@click.option("--no-match", is_flag=True, help="Without our plan at the bytes of every peer.")
@click.option("--plot", type=PATH, help="Draw KL against bytes into this file, e.g. a png, svg or pdf.")
@click.option("--context", type=int, metavar="N", help="Tokens per window (2048, or the model's limit).")
@click.option("--windows", "max_windows", type=click.IntRange(min=1), metavar="N", help="The first windows only.")
@click.option("--batch", type=int, metavar="N", help="Windows per forward pass (1).")
@click.option("--gain", type=click.Choice(["auto", "mse", "unbiased"]), help="Gain of our reconstructions.")
@click.option("--keep", metavar="GLOB", multiple=True, help="Keep matching tensors, for every method. Repeatable.")
@purpose_option
@click.option("--codec", "codecs", metavar="NAME", multiple=True, help="Codecs of our plans. Repeatable.")
@click.option(
    "--probe", type=click.Choice(["self", "random"]), help="Measure sensitivities, and calibrate peers, on this."
)
@click.option("--calibration", type=FILE, help="Measure sensitivities, and calibrate peers, on this text instead.")
@click.option("--sequences", type=int, metavar="N", help="Sequences of the probe (32).")
@click.option("--length", type=int, metavar="N", help="Tokens per sequence (512).")
@click.option("--seed", type=int, metavar="N", help="Of the probe (0).")
@click.option("--sensitivity", type=FILE, help="Reuse what an earlier `plan --save` measured.")
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def compare(
    model: str,
    text_file: Path,
    sizes: Sequence[str],
    bits_per_weight: Sequence[str],
    methods: Sequence[str],
    no_match: bool,
    plot: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Compare MODEL's plans with other methods, at true bytes.

    Every method stores the same matrices; KL divergence is measured on a text. Results are kept and reused.
    """
    from waterfill.studies.comparison.study import compare as compare_models

    start_s = time.perf_counter()
    if plot is not None:
        from waterfill.studies.comparison.plot import check

        check(plot)
    lists = {"sizes": _listed("--size", sizes), "methods": _listed("--methods", methods)}
    lists["bits"] = [_number(rate) for rate in _listed("--bits", bits_per_weight)]
    chosen = console.given(options) | {name: values for name, values in lists.items() if values}
    with shown() as progress:
        comparison = compare_models(model, text_file, match=not no_match, progress=progress, **chosen)
    if plot is not None:
        from waterfill.studies.comparison.plot import save as draw

        draw(comparison, plot)
    if as_json:
        console.print_json(comparison.to_dict())
    else:
        console.out().print(show_study.comparison_view(comparison))
    console.note(f"compared in {duration(time.perf_counter() - start_s)}")
    if plot is not None:
        console.note(f"drawn as {plot}")


@click.command(cls=SectionedCommand)
@click.argument("artifact", type=PATH)
@click.option("--original", metavar="MODEL", help="The model that it was packed from: shows what both write.")
@click.option("--text", "text_file", type=FILE, help="Text to measure on, beside --original.")
@click.option("--context", type=int, metavar="N", help="Tokens per window (2048, or the model's limit).")
@click.option("--windows", "max_windows", type=click.IntRange(min=1), metavar="N", help="The first windows only.")
@click.option("--batch", type=int, metavar="N", help="Windows per forward pass (1).")
@click.option("--prompt", "prompts", metavar="TEXT", multiple=True, help="What both models continue. Repeatable.")
@click.option("--max-new-tokens", type=int, metavar="N", help="Length of what they write (64).")
@click.option("--output", type=PATH, help="The page; ARTIFACT.html when not given.")
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def report(artifact: Path, text_file: Path | None, as_json: bool, **options: Any) -> None:
    """Write one HTML page about ARTIFACT: bytes, bits, promise, measurement.

    The page needs no network. With --original and --text, what was lost is measured.
    """
    from waterfill.studies.report.write import report as write_report

    with shown() as progress:
        made = write_report(artifact, text=text_file, progress=progress, **console.given(options))
    if as_json:
        console.print_json(show_study.report_record(made))
    else:
        console.out().print(show_study.report_view(made))


def _listed(option: str, values: Sequence[str]) -> list[Any]:
    """The items of comma-separated lists; a list that is given is not empty."""
    items = [item.strip() for value in values for item in value.split(",") if item.strip()]
    if values and not items:
        raise click.BadParameter("it names nothing", param_hint=option)
    return items


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a number", param_hint="--bits") from None
