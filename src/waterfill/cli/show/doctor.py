"""What `waterfill doctor` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from waterfill.planning.budget import format_size

if TYPE_CHECKING:  # it imports torch, which the command line does without until a command runs
    from waterfill.studies.diagnosis.doctor import Diagnosis

_REFERENCE = "the torch reference, which is slow"


def view(diagnosis: Diagnosis) -> Table:
    """A diagnosis, one line per subject."""
    lines = {
        "waterfill": Text(
            f"{diagnosis.waterfill}, Python {diagnosis.python}, torch {diagnosis.torch}, "
            f"transformers {diagnosis.transformers or 'is not installed'}"
        ),
        "machine": Text(
            f"{diagnosis.cpu}, {_count(diagnosis.cores, 'core')}, {_count(diagnosis.threads, 'thread')} in use"
        ),
        "memory": Text(_memory(diagnosis)),
        "library": _library(diagnosis),
        "instruction sets": Text(_instruction_sets(diagnosis)),
        "multiplied by": _choice(diagnosis),
        "activations": Text(f"as {diagnosis.activations}s"),
        "tokens made by": Text(", ".join(_way(*way) for way in diagnosis.ways.items()) or "nobody"),
        "self-check": Text("passed", "green")
        if diagnosis.error is None
        else Text(f"failed: {diagnosis.error}", "bold red"),
        "extras": Text(", ".join(_extra(*extra) for extra in diagnosis.extras.items()) or "none"),
    }
    grid = Table.grid(padding=(0, 2))
    for name, line in lines.items():
        grid.add_row(Text(name, "bold"), line)
    return grid


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _memory(diagnosis: Diagnosis) -> str:
    size = "" if diagnosis.memory_bytes is None else f"{format_size(diagnosis.memory_bytes)}, "
    return f"{size}read at {diagnosis.read_bytes_per_s / 1e9:.1f} GB/s"


def _library(diagnosis: Diagnosis) -> Text:
    if diagnosis.problem is None:
        return Text(diagnosis.library or "")
    return Text(
        f"{diagnosis.library}: {diagnosis.problem}" if diagnosis.library else f"none: {diagnosis.problem}", "yellow"
    )


def _instruction_sets(diagnosis: Diagnosis) -> str:
    usable = [name for name, here in diagnosis.instruction_sets.items() if here]
    others = [name for name, here in diagnosis.instruction_sets.items() if not here]
    return (", ".join(usable) or "none") + (f"; not here: {', '.join(others)}" if others else "")


def _choice(diagnosis: Diagnosis) -> Text:
    if diagnosis.multiplies is None:
        return Text("nobody", "bold red")
    if diagnosis.multiplies == "stored":
        return Text(f"{_REFERENCE}: {diagnosis.why}", "yellow")
    return Text(f"{diagnosis.multiplies}: {diagnosis.why}")


def _way(name: str, how: str) -> str:
    return name if how == "right" else f"not {name} ({how})"


def _extra(name: str, missing: list[str]) -> str:
    return f"{name} lacks {', '.join(missing)}" if missing else f"{name} is installed"
