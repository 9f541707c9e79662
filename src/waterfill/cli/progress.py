"""How far a long command is, on standard error: bars on a terminal, and elsewhere a line now and then.

with shown("reading") as step:     # what is being done until the first step
    step("measuring", 3, 32)       # (what, steps done, steps in all)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

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

from waterfill.base.progress import Progress

LINE_S = 30.0  # between two lines


def duration(elapsed_s: float) -> str:
    """Seconds as people say them: 8.3 s, 2 min 5 s, 1 h 7 min."""
    if elapsed_s < 60:
        return f"{elapsed_s:.1f} s"
    minutes, seconds = divmod(round(elapsed_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


@contextmanager
def shown(first: str = "preparing") -> Iterator[Progress]:
    """A bar with an ETA per stage on a terminal, else a line every `LINE_S` seconds; yields the callback.

    `first` is what is being done until that is called for the first time.
    """
    console = Console(stderr=True, markup=False)
    with _bars(console) if console.is_interactive else _lines(first) as step:
        yield step


@contextmanager
def _bars(console: Console) -> Iterator[Progress]:
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    bars = rich_progress.Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
    tasks: dict[str, TaskID] = {}

    def step(what: str, done: int, total: int) -> None:
        bars.start()  # not earlier: downloads have bars of their own
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=total)
        bars.update(tasks[what], completed=done, total=total)

    try:
        yield step
    finally:
        bars.stop()


@contextmanager
def _lines(first: str) -> Iterator[Progress]:
    """A thread writes the lines: they come whatever the command itself waits for."""
    stages, ended = Stages(first), threading.Event()

    def write() -> None:
        with suppress(OSError):  # standard error is closed
            while not ended.wait(LINE_S):
                click.echo(click.style(stages.line(), dim=True), err=True)

    writer = threading.Thread(target=write, name="waterfill-progress", daemon=True)
    writer.start()
    try:
        yield stages.step
    finally:
        ended.set()
        writer.join()


@dataclass
class _Stage:
    begun_s: float
    begun: int  # steps that were done by then: an interrupted run goes on where it was
    done: int
    total: int
    changed_s: float


class Stages:
    """What a command does, some of it inside of another, and how far it is. `clock` gives seconds."""

    def __init__(self, first: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._first, self._clock, self._start_s = first, clock, clock()
        self._stages: dict[str, _Stage] = {}

    def step(self, what: str, done: int, total: int) -> None:
        """Of a stage, so many steps are done."""
        now_s, known = self._clock(), self._stages.get(what)
        if known is None or done < known.done:  # it has begun, or begun anew
            self._stages[what] = _Stage(now_s, done, done, total, now_s)
        else:
            known.done, known.total, known.changed_s = done, total, now_s

    def line(self) -> str:
        """What is under way now: how far each stage is, and how long it will still take at this pace."""
        stages = [self._of(what, stage) for what, stage in list(self._stages.items()) if stage.done < stage.total]
        return "; ".join(stages) or self._between()

    def _of(self, what: str, stage: _Stage) -> str:
        line = f"{what}: {100 * stage.done // stage.total} % ({stage.done:,} of {stage.total:,})"
        steps, passed_s = stage.done - stage.begun, stage.changed_s - stage.begun_s
        if not steps or not passed_s:
            return f"{line} after {duration(self._clock() - stage.begun_s)}"
        left_s = passed_s * (stage.total - stage.done) / steps - (self._clock() - stage.changed_s)
        return f"{line}, {duration(max(0.0, left_s))} left"

    def _between(self) -> str:
        """Before the first stage, or behind the last one that is known."""
        ended = max((stage.changed_s for stage in self._stages.values()), default=self._start_s)
        what = f"after {list(self._stages)[-1]}" if self._stages else self._first
        return f"{what}: {duration(self._clock() - ended)} so far"
