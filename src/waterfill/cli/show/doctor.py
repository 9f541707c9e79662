"""What `waterfill doctor` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from waterfill.planning.budget import format_size

if TYPE_CHECKING:  # it imports torch, which the command line does without until a command runs
    from waterfill.studies.diagnosis.doctor import Diagnosis

_REFERENCE = "the torch reference, which is slow"


def view(found: Diagnosis) -> Table:
    """A diagnosis, one line per subject."""
    lines = {
        "waterfill": Text(
            f"{found.waterfill}, Python {found.python}, torch {found.torch}, "
            f"transformers {found.transformers or 'is not installed'}"
        ),
        "machine": Text(f"{found.cpu}, {_count(found.cores, 'core')}, {_count(found.threads, 'thread')} in use"),
        "memory": Text(_memory(found)),
        "library": _library(found),
        "instruction sets": Text(_instruction_sets(found)),
        "multiplied by": _choice(found),
        "activations": Text(f"as {found.activations}s"),
        "tokens made by": Text(", ".join(_way(*way) for way in found.ways.items()) or "nobody"),
        "self-check": Text("passed", "green") if found.error is None else Text(f"failed: {found.error}", "bold red"),
        "extras": Text(", ".join(_extra(*extra) for extra in found.extras.items()) or "none"),
    }
    grid = Table.grid(padding=(0, 2))
    for name, line in lines.items():
        grid.add_row(Text(name, "bold"), line)
    return grid


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _memory(found: Diagnosis) -> str:
    size = "" if found.memory_bytes is None else f"{format_size(found.memory_bytes)}, "
    return f"{size}read at {found.read_bytes_per_s / 1e9:.1f} GB/s"


def _library(found: Diagnosis) -> Text:
    if found.problem is None:
        return Text(found.library or "")
    return Text(f"{found.library}: {found.problem}" if found.library else f"none: {found.problem}", "yellow")


def _instruction_sets(found: Diagnosis) -> str:
    usable = [name for name, here in found.instruction_sets.items() if here]
    others = [name for name, here in found.instruction_sets.items() if not here]
    return (", ".join(usable) or "none") + (f"; not here: {', '.join(others)}" if others else "")


def _choice(found: Diagnosis) -> Text:
    if found.multiplies is None:
        return Text("nobody", "bold red")
    if found.multiplies == "stored":
        return Text(f"{_REFERENCE}: {found.why}", "yellow")
    return Text(f"{found.multiplies}: {found.why}")


def _way(name: str, how: str) -> str:
    return name if how == "right" else f"not {name} ({how})"


def _extra(name: str, missing: list[str]) -> str:
    return f"{name} lacks {', '.join(missing)}" if missing else f"{name} is installed"
