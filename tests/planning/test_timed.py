"""Allocations by time: against brute force, within their bounds, and never better for being asked for more speed."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from waterfill.base.errors import BudgetError
from waterfill.planning.allocate import Allocation, ChoiceTable, Task
from waterfill.planning.timed import allocate_timed, least_time

Row = tuple[int, float, int]  # bytes, loss in eighths, time


class Case:
    """Tensors with menus of one length, some of them tied."""

    def __init__(self, menus: list[list[Row]], tie: bool) -> None:
        columns = np.array(menus, np.float64)
        self.size, self.loss, self.time = (columns[:, :, i] for i in range(3))
        self.ties = [(0, 1)] if tie and len(menus) > 1 else []
        self.task = Task.of(ChoiceTable(self.size, self.loss, self.time), self.ties)

    def sums(self, choices: tuple[int, ...]) -> Row:
        size, loss, time = (
            math.fsum(column[i, choice] for i, choice in enumerate(choices))
            for column in (self.size, self.loss, self.time)
        )
        return int(size), loss, int(time)

    def every(self) -> list[Row]:
        tensors, length = self.size.shape
        choices = itertools.product(range(length), repeat=tensors)
        return [self.sums(c) for c in choices if all(len({c[i] for i in tie}) == 1 for tie in self.ties)]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    row = st.tuples(st.integers(0, 30), st.integers(0, 40).map(lambda eighths: eighths / 8), st.integers(0, 30))
    length = draw(st.integers(1, 4))
    menus = draw(st.lists(st.lists(row, min_size=length, max_size=length), min_size=1, max_size=5))
    return Case(menus, draw(st.booleans()))


def assert_consistent(case: Case, found: Allocation) -> tuple[int, float, int]:
    size, loss, time = case.sums(found.choices)
    assert (size, loss) == (found.size_bytes, found.loss)
    return size, loss, time


@given(cases(), st.integers(0, 150), st.integers(0, 150))
@settings(max_examples=300)
def test_within_bytes_and_time(case: Case, limit_bytes: int, limit_time: int) -> None:
    small = [row for row in case.every() if row[0] <= limit_bytes]
    if not small:
        with pytest.raises(BudgetError):
            least_time(case.task, limit_bytes)
        return
    assert least_time(case.task, limit_bytes) == min(time for _, _, time in small)
    feasible = [loss for _, loss, time in small if time <= limit_time]
    if not feasible:
        assert least_time(case.task, limit_bytes) > limit_time
        return
    found = allocate_timed(case.task, limit_bytes, limit_time)
    size, loss, time = assert_consistent(case, found)
    assert size <= limit_bytes
    assert time <= limit_time
    assert found.bound - 1e-9 <= min(feasible) <= loss, "neither the loss nor its bound beats brute force"
    if found.exact:
        assert loss == min(feasible)


@given(cases(), st.integers(0, 150))
@settings(max_examples=200)
def test_time_as_the_budget(case: Case, limit: int) -> None:
    feasible = [(loss, time) for _, loss, time in case.every() if time <= limit]
    if not feasible:
        with pytest.raises(BudgetError):
            case.task.by_time.allocate(limit)
        return
    found = case.task.by_time.allocate(limit)
    _, loss, time = case.sums(found.choices)
    assert found.exact
    assert (loss, time) == min(feasible), "of equal losses the fastest"


@given(cases(), st.floats(0, 20))
@settings(max_examples=200)
def test_least_time_within_a_loss(case: Case, most: float) -> None:
    feasible = [(time, loss) for _, loss, time in case.every() if loss <= most]
    if not feasible:
        with pytest.raises(BudgetError):
            case.task.by_time.smallest(most)
        return
    found = case.task.by_time.smallest(most)
    _, loss, time = case.sums(found.choices)
    assert found.exact
    assert (time, loss) == min(feasible), "and at that time the least loss"


@given(cases(), st.integers(0, 150))
@settings(max_examples=100)
def test_of_equal_losses_within_bytes_the_fastest(case: Case, limit: int) -> None:
    feasible = [(loss, time) for size, loss, time in case.every() if size <= limit]
    if feasible:
        _, loss, time = assert_consistent(case, case.task.allocate(limit))
        assert (loss, time) == min(feasible)


@given(cases(), st.integers(0, 150), st.integers(0, 30), st.integers(0, 150))
@settings(max_examples=150)
def test_more_speed_never_has_less_loss(case: Case, limit: int, faster: int, limit_bytes: int) -> None:
    if limit - faster < case.task.by_time.smallest_bytes:
        return
    slow, fast = case.task.by_time.allocate(limit), case.task.by_time.allocate(limit - faster)
    assert fast.loss >= slow.loss
    if limit_bytes >= case.task.smallest_bytes and least_time(case.task, limit_bytes) <= limit - faster:
        both = allocate_timed(case.task, limit_bytes, limit - faster)
        assert both.loss >= fast.loss, "nor a limit of bytes as well"
        assert both.loss >= allocate_timed(case.task, limit_bytes, limit).bound - 1e-9


def test_the_stated_bound_is_close_where_menus_are_fine() -> None:
    draw = np.random.default_rng(0)
    rates, weights = np.arange(1, 8, 1 / 16), draw.integers(1000, 9000, 60)
    alpha = np.exp(draw.normal(0, 2, 60))
    size = np.ceil(weights[:, None] * rates / 8)
    loss = alpha[:, None] * 4.0**-rates
    time = np.rint(weights[:, None] * (1 + 3 * (np.arange(len(rates)) % 2)))  # every second rate is slow
    task = Task.of(ChoiceTable(size, loss, time), ())
    budget, fastest = int(3 * weights.sum() / 8), int(weights.sum())
    for share in (1.1, 1.5, 2.0):
        found = allocate_timed(task, budget, int(share * fastest))
        assert found.bound <= found.loss <= 1.01 * found.bound
