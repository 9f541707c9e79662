"""How far a long command is, on standard error: bars on a terminal, elsewhere a line now and then, with --json events.

with shown("reading") as step:     # what is being done until the first step
    step("measuring", 3, 32)       # (what, steps done, steps in all)
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

import click
from rich import progress as rich_progress
from rich.console import Console
from rich.progress import (
    BarColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from waterfill.base.progress import OPENING, Progress
from waterfill.cli import events, stages
from waterfill.cli.stages import EventLog, Lines

TICK_S = 1.0  # between two looks at whether a line is due


def shown(first: str = "preparing", *, every_s: float = stages.EVENT_S) -> AbstractContextManager[Progress]:
    """A bar with an ETA per stage on a terminal, else lines, and with `--json` events; yields the callback.

    `first` is what is being done until that is called for the first time; a stage has an event at most every `every_s`
    seconds between its beginning and its end.
    """
    if events.wanted():
        return _events(first, every_s)
    console = Console(stderr=True, markup=False)
    return _bars(console) if console.is_interactive else _lines(first)


@contextmanager
def _events(first: str, every_s: float) -> Iterator[Progress]:
    log = EventLog(first, events.write, every_s)
    yield log.step
    log.close()


@contextmanager
def _bars(console: Console) -> Iterator[Progress]:
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    bars = rich_progress.Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
    tasks: dict[str, TaskID] = {}
    before: dict[str, int] = {}  # steps done

    def step(what: str, done: int, total: int) -> None:
        if what == OPENING:  # downloads have bars of their own
            return
        bars.start()
        if what not in tasks:  # steps that were done before say nothing of the pace
            tasks[what] = bars.add_task(what, total=_countable(total), completed=done)
        elif done < before[what]:  # it begins anew
            bars.reset(tasks[what], total=_countable(total), completed=done, visible=True)
        else:
            bars.update(tasks[what], completed=done, total=_countable(total), visible=total > 1 or done < total)
        before[what] = done

    try:
        yield step
    finally:
        bars.stop()


def _countable(total: int) -> int | None:
    """One step is a bar that moves to and fro."""
    return total if total > 1 else None


@contextmanager
def _lines(first: str) -> Iterator[Progress]:
    """A thread writes the lines: they come whatever the command itself waits for."""
    lines, ended = Lines(first, stages.FIRST_S, stages.LINE_S), threading.Event()

    def write() -> None:
        with suppress(OSError):  # standard error is closed
            while not ended.wait(TICK_S):
                if (line := lines.due()) is not None:
                    click.echo(click.style(line, dim=True), err=True)

    writer = threading.Thread(target=write, name="waterfill-progress", daemon=True)
    writer.start()
    try:
        yield lines.step
    finally:
        ended.set()
        writer.join()
