"""Least predicted loss within bytes and a time at once: the knapsack of `knapsack.py` with a price on time.

    loss + price · time, within the bytes ──relax──► the least price whose solution keeps to the time ──► single steps

For every price, the relaxed solution's cost less its gap and less price · limit bounds from below what any solution
within both limits loses (Lagrangian duality); the best of these bounds is stated with the result. What relaxation
leaves over of either limit, a step of a tensor or two, is spent by single steps, those that save the most loss first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from waterfill.planning import knapsack
from waterfill.planning.allocate import ROUNDING, Allocation, Task
from waterfill.planning.knapsack import Floats, Ints, Problem

RISES, RISE = 60, 8.0  # of the price, until a solution keeps to the time
BISECTIONS = 40
STEPS = 200  # single ones, at most


def least_time(task: Task, limit_bytes: int) -> int:
    """That any allocation within the bytes takes.

    Raises:
        BudgetError: the smallest choices exceed the bytes.
    """
    return int(_Search.of(task, limit_bytes).time_of(_fastest(task, limit_bytes)))


def allocate_timed(task: Task, limit_bytes: int, limit_time: int) -> Allocation:
    """Least predicted loss with at most so many bytes and so much time, which `least_time` must not exceed; within the
    bound that it states. As good as the allocation by bytes alone where that keeps to the time.

    Raises:
        BudgetError: the smallest choices exceed the bytes.
    """
    free, search = task.allocate(limit_bytes), _Search.of(task, limit_bytes)
    if search.time_of(task.picks(free)) <= limit_time:
        return free
    best, bound = search.priced(_fastest(task, limit_bytes), free.bound, limit_time)
    best = search.stepped(best, limit_time)
    gap = max(0.0, search.loss_of(best) - bound)
    exact = gap <= ROUNDING * float(np.abs(task.loss).sum())
    return replace(task.allocation(best, 0.0, exact), bound=search.loss_of(best) - gap)


def _fastest(task: Task, limit_bytes: int) -> Ints:
    """Classes' picks of least time."""
    search = _Search.of(task, limit_bytes)
    problem = Problem(len(task.first), task.owner, task.size, search.time)
    return knapsack.solve(problem, search.limit_bytes, grain=0.5).picks


@dataclass(frozen=True)
class _Search:
    task: Task
    time: Floats  # [choices]
    limit_bytes: float

    @staticmethod
    def of(task: Task, limit_bytes: int) -> _Search:
        assert task.time is not None
        return _Search(task, task.time, task.within_bytes(limit_bytes)[1])

    def time_of(self, picks: Ints) -> float:
        return float(self.time[picks].sum())

    def loss_of(self, picks: Ints) -> float:
        return math.fsum(self.task.loss[picks])

    def priced(self, best: Ints, bound: float, limit_time: float) -> tuple[Ints, float]:
        """The best of `best` and of the solutions of some prices of time; the best of `bound` and theirs."""
        low, high, kept = 0.0, self._usual_price(), False
        for _ in range(RISES + BISECTIONS):
            price = (low + high) / 2 if kept else high
            picks, below = self._relaxed(price)
            bound = max(bound, below - price * limit_time)
            if self.time_of(picks) <= limit_time:
                high, kept = price, True
                best = min(best, picks, key=self.loss_of)
            else:
                low, high = price, high if kept else RISE * high
            if high - low <= 1e-12 * high:
                break
        return best, bound

    def _usual_price(self) -> float:
        """Of the order of what time is worth."""
        return float(np.ptp(self.task.loss)) / max(1.0, float(np.ptp(self.time))) or 1.0

    def _relaxed(self, price: float) -> tuple[Ints, float]:
        """A solution of little loss + price · time, and what no solution within the bytes is below."""
        task = self.task
        problem = Problem(len(task.first), task.owner, task.size, task.loss + price * self.time)
        relaxed = knapsack.relax(problem, self.limit_bytes)
        return relaxed.picks, math.fsum(problem.cost[relaxed.picks]) - relaxed.gap

    def stepped(self, picks: Ints, limit_time: float) -> Ints:
        """With choices of single classes changed while that saves loss within both limits."""
        task, picks = self.task, picks.copy()
        for _ in range(STEPS):
            home = picks[task.owner]
            fits = task.size - task.size[home] <= self.limit_bytes - task.size[picks].sum()
            fits &= self.time - self.time[home] <= limit_time - self.time[picks].sum()
            saved = np.where(fits, task.loss[home] - task.loss, 0.0)
            step = int(saved.argmax())
            if saved[step] <= 0:
                break
            picks[task.owner[step]] = step
        return picks
