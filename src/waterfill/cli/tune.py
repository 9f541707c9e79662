"""The command that trains: `tune`. `cli` has the others, and puts it among them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from waterfill.cli import console
from waterfill.cli.commands import FILE, PATH, SectionedCommand
from waterfill.cli.progress import shown
from waterfill.cli.show import study as show_study
from waterfill.cli.stages import duration


@click.command(cls=SectionedCommand)
@click.argument("artifact", type=PATH)
@click.argument("out", type=PATH)
@click.option("--text", "text_file", type=FILE, required=True, help="Text to train on.")
@click.option(
    "--what",
    type=click.Choice(["scales", "norms", "lora"]),
    help="scales (default) or norms: OUT is an artifact with the same codes; lora: OUT is an adapter as PEFT has them.",
)
@click.option("--teacher", metavar="MODEL", help="Learn this model's predictions, the original's best; none (default).")
@click.option("--steps", type=int, metavar="N", help="Steps at most (200).")
@click.option("--lr", type=float, metavar="X", help="Rate of AdamW (scales 0.01, norms 0.003, lora 0.001).")
@click.option("--batch", type=int, metavar="N", help="Windows per step (4).")
@click.option("--context", type=int, metavar="N", help="Tokens per window (256, or the model's limit).")
@click.option("--hold-out", type=float, metavar="SHARE", help="Of the text, only looked at: when to stop (0.1).")
@click.option("--rank", type=int, metavar="N", help="Of an adapter (16).")
@click.option("--alpha", type=int, metavar="N", help="Of an adapter; its rank when not given.")
@click.option(
    "--init",
    type=click.Choice(["default", "loftq", "apiq"]),
    help="An adapter's start: nothing; nearest to what weights lost; or nearest in activations. With --teacher.",
)
@click.option("--seed", type=int, metavar="N", help="The same seed gives the same bytes (0).")
@click.option("--overwrite", is_flag=True, help="Replace the artifact OUT once the new one is complete.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def tune(artifact: Path, out: Path, text_file: Path, as_json: bool, **options: Any) -> None:
    """Train what ARTIFACT leaves to be trained, and write it to OUT.

    Codes stay as they are, to the bit; scales, norms, or an adapter beside them learn from a text.
    """
    from waterfill.tuning.tune import tune as train

    start_s = time.perf_counter()
    with shown() as progress:
        tuned = train(artifact, out, text=text_file, progress=progress, **console.given(options))
    if as_json:
        console.print_json(tuned.to_dict())
    else:
        console.out().print(show_study.tuned_view(tuned))
    console.note(f"tuned in {duration(time.perf_counter() - start_s)}")
