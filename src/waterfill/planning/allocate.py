"""Budget + menus -> one choice per tensor: least predicted loss within a byte budget, or least bytes within a loss.

What flows through: `Choice` menus, one per tensor -> flat arrays, tied tensors fused into one class (`Task`) -> the
multiple-choice knapsack of `knapsack.py` -> `Allocation`. The HIGGS paper (arXiv 2411.17525) poses the problem, and
rounds the budget for a dynamic program; here nothing is rounded: sizes are exact integers, and the optimum is found and
proven by a search around the Lagrangian solution. That module's docstring has the method and its limits.

Bytes that the least loss leaves over are spent where they cost nothing, on larger choices of equal loss, such as those
of a tensor with zero sensitivity. To that end a byte is worth a sliver: all the bytes that could be spent, together,
are worth SLIVER of all the loss that could be saved. "Least loss" therefore means least to 1e-12 of that spread. Where
choices take time, time that is saved has that worth instead; time may also be the budget, in place of bytes
(`Task.by_time`) or beside them (`allocate_timed`).

Losses may have any sign: an estimated sensitivity can be negative, and its tensor then takes its smallest choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import numpy as np

from waterfill.base.errors import BudgetError, WaterfillError
from waterfill.planning import knapsack
from waterfill.planning.knapsack import Floats, Ints, Problem

SLIVER = 1e-12  # well above the rounding of float64 sums, far below any estimate's error
UNSPENT = 1e-3  # share of the budget that may stay unspent although spending it would cost no loss
ROUNDING = 1e-14  # relative to the sum of |loss|: what rounding may do to a sum of losses


@dataclass(frozen=True, slots=True)
class Choice:
    """One point of a tensor's menu."""

    size_bytes: int
    loss: float  # predicted loss of giving the tensor this choice, KL in nats per token; any sign


@dataclass(frozen=True, eq=False)
class ChoiceTable:
    """Menus of one length, as those of a hundred thousand tensors are kept."""

    size_bytes: Floats  # [tensors, choices], whole numbers
    loss: Floats  # [tensors, choices], as of a `Choice`
    time: Floats | None = None  # [tensors, choices], whole numbers of any unit; None: it does not matter


ChoiceMenus: TypeAlias = Sequence[Sequence[Choice]] | ChoiceTable


@dataclass(frozen=True)
class Allocation:
    """One choice per tensor."""

    choices: tuple[int, ...]  # index into each tensor's menu
    size_bytes: int
    loss: float  # predicted, KL in nats per token
    bound: float  # nothing within the budget (for `smallest`: within size_bytes) is predicted to lose less than this
    exact: bool  # proven optimal


@dataclass(frozen=True)
class Relaxation:
    """The Lagrangian solution: within the budget, optimal up to one step of one tensor, found by sorting alone."""

    allocation: Allocation
    price: float  # loss that one more byte would save at the margin, nats per token; 0 where the budget does not bind


def allocate(menus: ChoiceMenus, budget_bytes: int, *, ties: Sequence[Sequence[int]] = ()) -> Allocation:
    """Least predicted loss with at most `budget_bytes`, proven optimal unless `exact` says otherwise.

    `ties` are groups of tensors (indices into `menus`) that must take the same menu index: menus of one length, and no
    tensor in two groups. An exact result never loses more than that of a smaller budget.

    Raises:
        BudgetError: the smallest choices exceed the budget.
        WaterfillError: a menu or tie is unusable.
    """
    return Task.of(menus, ties).allocate(budget_bytes)


def relax(menus: ChoiceMenus, budget_bytes: int, *, ties: Sequence[Sequence[int]] = ()) -> Relaxation:
    """The Lagrangian solution within the budget, and the price of a byte. Arguments and errors as for `allocate`."""
    task = Task.of(menus, ties)
    problem, limit, grain = task.within_bytes(budget_bytes)
    relaxed = knapsack.relax(problem, limit)
    price = max(0.0, relaxed.multiplier - task.sliver)
    return Relaxation(task.allocation(relaxed.picks, relaxed.gap, relaxed.gap <= grain), price)


def smallest(menus: ChoiceMenus, max_loss: float, *, ties: Sequence[Sequence[int]] = ()) -> Allocation:
    """Least bytes with a predicted loss of at most `max_loss` nats per token, and the least loss at that size.

    Arguments as for `allocate`.

    Raises:
        BudgetError: no allocation is predicted to lose so little.
        WaterfillError: as `allocate` does.
    """
    return Task.of(menus, ties).smallest(max_loss)


def feasible_bytes(menus: ChoiceMenus, *, ties: Sequence[Sequence[int]] = ()) -> tuple[int, int]:
    """Fewest and most bytes that any allocation can take."""
    task = Task.of(menus, ties)
    return task.smallest_bytes, task.largest_bytes


def certificate(allocation: Allocation) -> str:
    """How close the allocation is to the best one, in one sentence for people."""
    if allocation.exact:
        return (
            f"optimal: nothing within this budget is predicted to lose less than {allocation.loss:.6g} nats per token"
        )
    excess = allocation.loss - allocation.bound
    return f"within {excess:.1e} nats of the optimum, which is not below {allocation.bound:.6g} (Lagrangian bound)"


@dataclass(frozen=True, eq=False)
class Task:
    """The menus as flat arrays, to be allocated under any number of budgets. Tied tensors form one class, whose choices
    are the sums of theirs; others one each. Arguments and errors are those of the functions above."""

    tensor_first: Ints  # [tensors], where its menu begins in the array that follows
    tensor_loss: Floats  # [choices of all menus], nats per token
    class_of: Ints  # [tensors]
    first: Ints  # [classes], where its choices begin in the arrays that follow
    owner: Ints  # [choices], class
    size: Floats  # [choices], bytes: whole numbers; time, of a task `by_time`
    loss: Floats  # [choices], nats per token
    time: Floats | None = None  # [choices], whole numbers

    @staticmethod
    def of(menus: ChoiceMenus, ties: Sequence[Sequence[int]]) -> Task:
        lengths, size, loss = _flat(menus)
        time = menus.time if isinstance(menus, ChoiceTable) else None
        total = len(size)
        _check_menus(lengths, size, loss)
        class_of = _classes(lengths, ties)
        class_lengths = np.zeros(class_of.max(initial=-1) + 1, dtype=np.intp)
        class_lengths[class_of] = lengths
        first = np.cumsum(class_lengths) - class_lengths
        tensor_first = np.cumsum(lengths) - lengths
        place = np.arange(total) + np.repeat(first[class_of] - tensor_first, lengths)
        owner = np.repeat(np.arange(len(first)), class_lengths)
        columns = (size, loss) if time is None else (size, loss, time.ravel())
        fused = (np.bincount(place, weights=column).astype(np.float64) for column in columns)
        return Task(tensor_first, loss, class_of, first, owner, *fused)

    @cached_property
    def by_time(self) -> Task:
        """The same with time as what a budget is of: limits and `size_bytes` of its allocations are times."""
        assert self.time is not None
        return replace(self, size=self.time)

    @cached_property
    def smallest_bytes(self) -> int:
        return int(_per_class(np.minimum, self.size, self.first).sum())

    @cached_property
    def largest_bytes(self) -> int:
        return int(_per_class(np.maximum, self.size, self.first).sum())

    @cached_property
    def sliver(self) -> float:
        """Nats per token that a unit of what is preferred is worth where it saves no loss."""
        return SLIVER * (self._spread(self.loss) or 1.0) / max(1.0, self._spread(self.preferred))

    @property
    def preferred(self) -> Floats:
        """[choices], bytes, or time that is not taken."""
        return self.size if self.time is None else -self.time

    def _spread(self, values: Floats) -> float:
        """Between the most and the least that an allocation can have."""
        most, least = _per_class(np.maximum, values, self.first), _per_class(np.minimum, values, self.first)
        return float((most - least).sum())

    @cached_property
    def unit(self) -> int:
        """The factor that sizes share. It leaves a remainder of a budget that nothing can use; without that remainder
        the Lagrangian bound is tighter."""
        extra = self.size - np.repeat(_per_class(np.minimum, self.size, self.first), np.bincount(self.owner))
        return max(1, int(np.gcd.reduce(extra.astype(np.int64))))

    @cached_property
    def least_loss(self) -> Problem:
        """The knapsack of least loss, the same for every budget."""
        return Problem(len(self.first), self.owner, self.size, self.loss - self.sliver * self.preferred)

    def within_bytes(self, budget_bytes: int) -> tuple[Problem, float, float]:
        """The knapsack of least loss in a budget, its limit and its grain; BudgetError if the budget is too small."""
        smallest_bytes, largest_bytes = self.smallest_bytes, self.largest_bytes
        if not budget_bytes >= smallest_bytes:
            raise BudgetError(
                f"a budget of {budget_bytes:,} bytes was given for tensors that take at least {smallest_bytes:,} and "
                f"at most {largest_bytes:,} bytes: raise it into that range, or widen the menu with smaller choices",
                smallest_bytes,
                largest_bytes,
            )
        limit = smallest_bytes + (budget_bytes - smallest_bytes) // self.unit * self.unit
        whole = budget_bytes if self.time is None else self._spread(self.preferred)
        return self.least_loss, float(limit), self.sliver * UNSPENT * whole

    def check_loss(self, max_loss: float) -> None:
        """BudgetError if no allocation is predicted to lose at most max_loss."""
        safest = np.lexsort((self.size, self.loss, self.owner))[self.first]
        least = self.allocation(safest, gap=0.0, exact=True)
        if not max_loss >= least.loss:
            raise BudgetError(
                f"a predicted loss of at most {max_loss:.6g} nats per token was asked for, and the least that these "
                f"menus reach is {least.loss:.6g}, in {least.size_bytes:,} bytes: allow more loss, or widen the menus "
                f"with larger choices",
                self.smallest_bytes,
                self.largest_bytes,
            )

    def allocate(self, budget_bytes: int) -> Allocation:
        problem, limit, grain = self.within_bytes(budget_bytes)
        solution = knapsack.solve(problem, limit, grain)
        return self.allocation(solution.picks, solution.gap, solution.exact)

    def smallest(self, max_loss: float) -> Allocation:
        self.check_loss(max_loss)
        problem = Problem(len(self.first), self.owner, weight=self.loss, cost=self.size)
        rounding = ROUNDING * float(np.abs(self.loss).sum())
        # A sum that meets the limit may be rounded to just above it: look there first, below only if it does exceed.
        for limit in (max_loss + rounding, max_loss - rounding):
            solution = knapsack.solve(problem, limit, grain=0.5)
            picked = self.allocation(solution.picks, gap=math.inf, exact=False)
            best = self.allocate(picked.size_bytes)
            if picked.loss < best.loss:  # by rounding, or because that search was cut short
                best = replace(picked, bound=best.bound, exact=best.exact)
            if best.loss <= max_loss:
                break
        return replace(best, exact=best.exact and solution.exact)

    def picks(self, allocation: Allocation) -> Ints:
        """Classes' choices in the flat arrays."""
        picks = np.empty(len(self.first), np.intp)
        picks[self.class_of] = np.asarray(allocation.choices, np.intp)
        return picks + self.first

    def allocation(self, picks: Ints, gap: float, exact: bool) -> Allocation:
        """Classes' picks as the tensors' choices; `gap` counts the slivers of the bytes, which the bound must not."""
        choices = (picks - self.first)[self.class_of]
        size_bytes, loss = int(self.size[picks].sum()), math.fsum(self.tensor_loss[self.tensor_first + choices])
        least = _per_class(np.minimum, self.preferred, self.first)
        bound = loss - gap - self.sliver * float((self.preferred[picks] - least).sum())
        return Allocation(tuple(choices.tolist()), size_bytes, loss, bound, exact)


def _flat(menus: ChoiceMenus) -> tuple[Ints, Floats, Floats]:
    """Length of every menu; size and loss of all choices, menu by menu."""
    if isinstance(menus, ChoiceTable):
        tensors, length = menus.size_bytes.shape
        return np.full(tensors, length), menus.size_bytes.ravel(), menus.loss.ravel()
    lengths = np.fromiter((len(menu) for menu in menus), dtype=np.intp, count=len(menus))
    total = int(lengths.sum())
    size = np.fromiter((choice.size_bytes for menu in menus for choice in menu), dtype=np.float64, count=total)
    loss = np.fromiter((choice.loss for menu in menus for choice in menu), dtype=np.float64, count=total)
    return lengths, size, loss


def _per_class(function: np.ufunc, values: Floats, first: Ints) -> Floats:
    reduced: Floats = function.reduceat(values, first) if len(first) else values
    return reduced


def _classes(lengths: Ints, ties: Sequence[Sequence[int]]) -> Ints:
    """Number of the class of every tensor; WaterfillError for a tie that cannot be."""
    leader, tied = np.arange(len(lengths)), np.zeros(len(lengths), dtype=bool)
    for group in ties:
        members = np.asarray(group, dtype=np.intp)
        if not len(members):
            continue
        if members.min() < 0 or members.max() >= len(lengths):
            raise WaterfillError(f"a tie names tensors {list(group)} of {len(lengths)}: name them from 0 up")
        if len(np.unique(lengths[members])) > 1:
            raise WaterfillError(
                f"tied tensors {list(group)} have menus of {lengths[members].tolist()} choices: tie only tensors with "
                f"menus of one length, whose choices correspond"
            )
        if len(np.unique(members)) < len(members) or tied[members].any():
            raise WaterfillError(f"tie {list(group)} names a tensor twice, or one of another tie: join such ties")
        leader[members], tied[members] = members[0], True
    return np.unique(leader, return_inverse=True)[1]


def _check_menus(lengths: Ints, size: Floats, loss: Floats) -> None:
    """WaterfillError unless every menu has a choice, and every choice a finite loss and a size of 0 bytes or more."""
    if not lengths.all():
        raise WaterfillError(f"tensor {int(lengths.argmin())} has an empty menu: give it at least one choice")
    bad = np.flatnonzero(~np.isfinite(loss) | ~(size >= 0))
    if len(bad):
        tensor = int(np.searchsorted(np.cumsum(lengths), bad[0], side="right"))
        raise WaterfillError(
            f"tensor {tensor} has a choice of {size[bad[0]]:.0f} bytes and loss {loss[bad[0]]}: sizes are 0 or more, "
            f"losses finite"
        )
