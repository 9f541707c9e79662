"""The order of a pass is learnt from the one before; and what a meter has counted adds up."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from waterfill.running.streaming.meter import Meter
from waterfill.running.streaming.order import Order


def run(order: Order, matrices: Iterable[Any]) -> None:
    for matrix in matrices:
        assert not order.ends_pass(matrix)
        order.note(matrix)


def everything(_: Any) -> bool:
    return True


@given(st.permutations(range(6)))
def test_a_pass_in_another_order_is_followed(came: list[Any]) -> None:
    order = Order(range(6))  # type: ignore[arg-type]
    run(order, came)
    assert order.matrices == tuple(range(6)), "as long as the pass goes on"
    assert order.ends_pass(came[2])
    assert order.learn(everything) == (came != sorted(came))
    assert order.matrices == tuple(came)
    assert not order.amid_pass
    run(order, came)
    assert not order.learn(everything)


@given(st.lists(st.integers(0, 5), unique=True))
def test_what_was_left_out_comes_last_in_its_old_order(came: list[Any]) -> None:
    order = Order(range(6))  # type: ignore[arg-type]
    run(order, came)
    if order.learn(everything):
        assert order.matrices == (*came, *(matrix for matrix in range(6) if matrix not in came))
    else:
        assert came == sorted(came)
        assert order.matrices == tuple(range(6))


def test_what_does_not_matter_changes_nothing() -> None:
    """Such as a matrix that is in memory."""
    order = Order(range(4))  # type: ignore[arg-type]
    run(order, [3, 0, 1, 2])
    assert not order.learn(lambda matrix: matrix != 3)
    assert order.matrices == (0, 1, 2, 3)


def test_a_pass_may_be_forgotten() -> None:
    order = Order(range(2))  # type: ignore[arg-type]
    run(order, [1])
    assert order.amid_pass
    order.forget_pass()
    assert not order.amid_pass
    run(order, [1, 0])


def test_a_summary_says_what_was_counted() -> None:
    meter = Meter()
    meter.waited(time.perf_counter() - 2.0)
    meter.direct_bytes += 10
    meter.passes += 3
    meter.nanoseconds += 1
    meter.multiplied()
    found = meter.summary(form="storage", amid_pass=True, ahead_bytes=32, kept_bytes=5, cached_bytes=6)
    assert (found.passes, found.bytes_read, found.kept_bytes, found.cached_bytes) == (4, 42, 5, 6)
    assert found.waiting_s == pytest.approx(2.0, abs=0.5)
    assert 0 < found.decode_s == found.multiply_s <= 1e-9
    assert found.elapsed_s > 0
    meter.reset()
    nothing = meter.summary(form="storage", amid_pass=False, ahead_bytes=0, kept_bytes=5, cached_bytes=6)
    assert (nothing.passes, nothing.bytes_read, nothing.waiting_s, nothing.elapsed_s) == (0, 0, 0.0, 0.0)
