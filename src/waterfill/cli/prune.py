"""The commands that change a checkpoint before it is packed: `prune`. `cli` puts it among the others."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from waterfill.cli import console
from waterfill.cli.commands import FILE, PATH, SectionedCommand
from waterfill.cli.progress import shown
from waterfill.cli.show import tune as show_tune
from waterfill.cli.stages import duration

_IMPORTANCES = ["fisher", "taylor-first", "taylor-second", "taylor-mix", "taylor-vector", "l1", "l2", "random"]


@click.command(cls=SectionedCommand)
@click.argument("model")
@click.argument("out", type=PATH)
@click.option("--keep-share", type=float, metavar="X", help="Share of the decoder layers' weights that stays, e.g. .8.")
@click.option("--size", "out_size", metavar="SIZE", help="Or bytes of all weight files of OUT, e.g. 2.5GB or 800MiB.")
@click.option(
    "--what",
    type=click.Choice(["parts", "heads", "channels", "layers"]),
    help="What may go: attention heads and MLP channels (parts, default), one of these, or whole layers.",
)
@click.option(
    "--importance",
    type=click.Choice(_IMPORTANCES),
    metavar="NAME",
    help="What tells how much a part matters: fisher (default), the loss without it; taylor-first, taylor-second, "
    "taylor-mix and taylor-vector, as LLM-Pruner has them; l1, l2; random.",
)
@click.option("--multiple", type=int, metavar="N", help="Channels stay in multiples of this (32).")
@click.option("--kv-heads", type=int, metavar="N", help="KV heads to keep in every layer, instead of trying.")
@click.option("--refit", is_flag=True, help="Fit what stays to do what went did; wants many sequences.")
@click.option("--text", type=FILE, help="Measure on this text instead of the model's own.")
@click.option("--sequences", type=int, metavar="N", help="Sequences to measure on (48).")
@click.option("--length", type=int, metavar="N", help="Tokens per sequence (160).")
@click.option("--seed", type=int, metavar="N", help="Of the text and what is drawn (0).")
@click.option("--no-cache", is_flag=True, help="Keep nothing of the text on disk, and use nothing kept.")
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def prune(model: str, out: Path, out_size: str | None, as_json: bool, **options: Any) -> None:
    """Leave the least important parts out of MODEL: OUT is a smaller checkpoint of the same class.

    MODEL is a local Hugging Face directory or a hub id, of the Llama kind.
    """
    from waterfill import api

    start_s = time.perf_counter()
    chosen = console.given({**options, "size": out_size})
    with shown() as progress:
        made = api.prune(model, out, progress=progress, **chosen)
    if as_json:
        console.print_json(made.to_dict())
    else:
        console.out().print(show_tune.pruned_view(made))
    console.note(f"pruned into {out} in {duration(time.perf_counter() - start_s)}")
