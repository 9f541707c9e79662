"""What `waterfill prune` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from waterfill.cli.show.tables import plain_table
from waterfill.planning.budget import format_size

if TYPE_CHECKING:  # it imports torch, which the command line does without until a command runs
    from waterfill.tuning.pruning.prune import Dropped, Pruned


def pruned_view(made: Pruned) -> RenderableType:
    """What each layer lost, then sizes and the predicted loss."""
    table = plain_table(
        ("layer", "right"), ("KV heads that go", "left"), ("heads that go", "left"), ("channels", "right")
    )
    for dropped in made.dropped:
        table.add_row(str(dropped.layer), *_cells(dropped))
    before, after = made.before, made.after
    share = made.layer_weights_after / made.layer_weights_before
    estimated = "" if made.estimated is None else f"; parts alone add up to {made.estimated:.4g}"
    sentences = [
        f"{made.model}: {before.layers} layers of {before.kv_heads} KV heads and {before.channels:,} channels become "
        f"{after.layers} of {after.kv_heads} and {after.channels:,}.",
        f"{share:.1%} of the decoder layers' weights stay, {format_size(made.size_bytes_before)} become "
        f"{format_size(made.size_bytes_after)}.",
        f"predicted KL {made.kl:.4g} ± {made.kl_stderr:.2g} nats per token{estimated}.",
    ]
    return Group(table, "", *(Text(sentence, "dim") for sentence in sentences))


def _cells(dropped: Dropped) -> tuple[str, str, str]:
    if dropped.whole:
        return "all", "all", f"{dropped.channels:,}"
    return ", ".join(map(str, dropped.kv_heads)), ", ".join(map(str, dropped.heads)), f"{dropped.channels:,}"
