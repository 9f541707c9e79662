"""What a command does, some of it inside of another, and how far it is: when `cli/progress.py` says what.

    step(what, done, total) ──► Stages: what is under way ──► EventLog: events as they are due
                                                         └──► Lines: a line for people when it is due

Every `clock` gives seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

FIRST_S = 5.0  # until the first line, and until a stage is named that no line has named
LINE_S = 30.0  # between two lines
EVENT_S = 5.0  # between two events of a stage

Clock = Callable[[], float]


def duration(elapsed_s: float) -> str:
    """Seconds as people say them: 8.3 s, 2 min 5 s, 1 h 7 min."""
    if elapsed_s < 60:
        return f"{elapsed_s:.1f} s"
    minutes, seconds = divmod(round(elapsed_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


@dataclass(eq=False)
class Stage:
    """One thing that is being done."""

    name: str
    begun: int  # steps that were done by then: an interrupted run goes on where it was
    total: int
    begun_s: float
    done: int
    changed_s: float
    said: int = -1  # steps done when an event last told of it
    said_s: float = 0.0

    @property
    def over(self) -> bool:
        return self.done >= self.total

    def left_s(self, now_s: float) -> float | None:
        """Seconds that it will still take at its pace; None while that is not known."""
        if self.over:
            return 0.0
        steps, passed_s = self.done - self.begun, self.changed_s - self.begun_s
        if not steps or not passed_s:
            return None
        return max(0.0, passed_s * (self.total - self.done) / steps - (now_s - self.changed_s))

    def line(self, now_s: float) -> str:
        """As people read it."""
        elapsed_s, left_s = now_s - self.begun_s, self.left_s(now_s)
        if self.total == 1:
            return f"{self.name}: {duration(elapsed_s)} so far"
        said = f"{self.name}: {100 * self.done // self.total} % ({self.done:,} of {self.total:,})"
        return f"{said} after {duration(elapsed_s)}" if left_s is None else f"{said}, {duration(left_s)} left"


class Stages:
    """What is under way. `first` is that until the first step of something else."""

    def __init__(self, first: str, clock: Clock = time.monotonic) -> None:
        self.clock = clock
        self._stages: dict[str, Stage] = {}  # in the order in which they began: later ones are inside earlier ones
        self._first: Stage | None = self._begin(first, 0, 1)

    def step(self, what: str, done: int, total: int) -> Stage:
        """Of a stage, so many steps are done."""
        if self._first is not None and what != self._first.name:
            self.end_first()
        self._first = None
        known = self._stages.get(what)
        if known is None or done < known.done:  # it begins, or begins anew
            return self._begin(what, done, total)
        if done > known.done:
            known.changed_s = self.clock()
            self._leave_inner(what)
        known.done, known.total = done, total
        return known

    def end_first(self) -> None:
        """What came before all stages is over."""
        if self._first is not None:
            self._first.done, self._first.changed_s, self._first = 1, self.clock(), None

    @property
    def under_way(self) -> list[Stage]:
        """The outermost first."""
        return [stage for stage in list(self._stages.values()) if not stage.over]

    def line(self) -> str:
        """What is under way now: how far each stage is, and how long it will still take at this pace."""
        now_s = self.clock()
        return "; ".join(stage.line(now_s) for stage in self.under_way) or self._between(now_s)

    def _begin(self, what: str, done: int, total: int) -> Stage:
        self._stages.pop(what, None)
        now_s = self.clock()
        stage = self._stages[what] = Stage(what, done, total, now_s, done, now_s)
        return stage

    def _leave_inner(self, what: str) -> None:
        """A stage that goes on has left what began inside of it, were it by a failure."""
        names = list(self._stages)
        for name in names[names.index(what) + 1 :]:
            del self._stages[name]

    def _between(self, now_s: float) -> str:
        """Behind the last stage that is known."""
        last = list(self._stages.values())[-1]
        return f"after {last.name}: {duration(now_s - last.changed_s)} so far"


class EventLog:
    """Has events written: as a stage begins and ends, and between at most every `every_s` seconds."""

    def __init__(
        self, first: str, write: Callable[..., Any], every_s: float = EVENT_S, clock: Clock = time.monotonic
    ) -> None:
        self._stages, self._write, self._every_s, self._clock = Stages(first, clock), write, every_s, clock
        self._say_all(self._stages.under_way)

    def step(self, what: str, done: int, total: int) -> None:
        """Of a stage, so many steps are done."""
        before = self._stages.under_way
        stage = self._stages.step(what, done, total)
        now = self._stages.under_way
        self._say_all([each for each in before if each not in now and each is not stage])
        if stage.said < 0 or stage.over or self._clock() - stage.said_s >= self._every_s:
            self._say_all([stage])

    def close(self) -> None:
        """Nothing comes any more: tell how far what is under way has come."""
        last = self._stages.under_way
        self._stages.end_first()
        self._say_all(last)

    def _say_all(self, stages: list[Stage]) -> None:
        for stage in stages:
            if stage.said != stage.done:
                stage.said, stage.said_s = stage.done, self._clock()
                self._say(stage, stage.said_s)

    def _say(self, stage: Stage, now_s: float) -> None:
        left_s = stage.left_s(now_s)
        self._write(
            "progress",
            stage=stage.name,
            done=stage.done,
            total=stage.total,
            elapsed_s=round(now_s - stage.begun_s, 1),
            left_s=None if left_s is None else round(left_s, 1),
        )


class Lines:
    """Says when people should read a line: soon for what takes long, and then now and then."""

    def __init__(
        self, first: str, first_s: float = FIRST_S, line_s: float = LINE_S, clock: Clock = time.monotonic
    ) -> None:
        self._stages = Stages(first, clock)
        self._first_s, self._line_s, self._clock = first_s, line_s, clock
        self._start_s, self._last_s = clock(), float("-inf")
        self._named: set[str] = set()

    def step(self, what: str, done: int, total: int) -> None:
        """Of a stage, so many steps are done."""
        self._stages.step(what, done, total)

    def due(self) -> str | None:
        """The line that is to be written now; None where none is."""
        now_s = self._clock()
        if now_s - self._start_s < self._first_s or not (self._is_time(now_s) or self._is_new(now_s)):
            return None
        self._last_s = now_s
        self._named |= {stage.name for stage in self._stages.under_way}
        return self._stages.line()

    def _is_time(self, now_s: float) -> bool:
        return now_s - self._last_s >= self._line_s

    def _is_new(self, now_s: float) -> bool:
        """Whether a stage takes long that no line has named."""
        return any(
            stage.name not in self._named and now_s - stage.begun_s >= self._first_s for stage in self._stages.under_way
        )
