"""The multiple-choice knapsack, solved exactly: one choice per class, least cost, total weight within a limit.

What flows through: flat arrays of choices -> lower convex hull of every class -> Lagrangian solution and bound
(`relax`) -> exact search around it (`solve`). Pure numpy; costs may have any sign; weights may be bytes or nats.

Method. The multiplier λ of the linear relaxation gives every choice a reduced cost r = (cost + λ·weight) − (the least
such value in its class) ≥ 0, and a complete solution exceeds the Lagrangian bound by exactly Σ r + λ·(unused weight):
its *gap*. The optimum's gap is tiny, so only the few choices with a tiny r can take part in it. A search with reach ε
covers every solution of gap ≤ ε. It deals the classes that have other choices with r ≤ ε into two halves, merges each
half class by class into a list of (weight, cost) states, dropping those that are dominated or have Σ r > ε (Nemhauser
and Ullmann 1969), and finds the best pair of states that fits (Horowitz and Sahni 1974). The reach doubles its choices
until the best solution lies inside it (the expanding core of Pisinger 1995): that solution is then optimal, and a reach
without any solution raises the lower bound by ε.

Discretisation: none. A dynamic program over a byte axis must round 10¹⁰ bytes to buckets, which either wastes budget or
costs classes × choices × buckets; the state lists keep exact weights, merge equal ones, and are as long as the instance
is hard, not as its numbers are large. Only rounding remains: weights that are whole numbers add exactly in float64 up
to 2⁵³, costs to about 1e-15 of their spread.

The limit of exactness: a list stops growing after EFFORT candidate states (thousands of *identical* classes, say), and
the classes not merged yet keep their relaxed choice. The result is then the best solution seen, `exact` is false, and
`gap` still bounds its distance to the optimum: at worst the relaxed solution's own gap, which is less than one step
between neighbouring hull points of one class, less the widest reach that was searched to the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.intp]
Floats = npt.NDArray[np.float64]

EFFORT = 2**23  # candidate states of one list: about a second, and at most 64 MB of back-pointers
MERGE_EFFORT = 2**22  # candidate states of one merge: at most 200 MB of scratch
SEARCHES = 4  # lists' worth of effort in one solve, beyond which no search starts
FIRST_MOVES = 16  # moves in the first search


@dataclass(frozen=True, eq=False)
class Problem:
    """All classes' choices, flat: choice k belongs to class owner[k]. Every class has at least one choice."""

    classes: int
    owner: Ints  # [choices], ascending
    weight: Floats  # [choices]
    cost: Floats  # [choices]

    @cached_property
    def walk(self) -> _Walk:
        """The same for every limit."""
        return _Walk.of(self)


@dataclass(frozen=True, eq=False)
class _Walk:
    """Every class's hull, and its steps from vertex to vertex, the steepest first."""

    hull: Ints  # [vertices], indices into the problem's choices, class by class
    first: Ints  # [classes], where its vertices begin
    steps: Ints  # [steps], from vertex s to s + 1
    slope: Floats  # [steps], falling: cost saved per unit of weight
    weight: Floats  # [steps], of this and all steps before

    @staticmethod
    def of(problem: Problem) -> _Walk:
        hull = _hull(problem)
        owner = problem.owner[hull]
        steps = np.flatnonzero(owner[1:] == owner[:-1])
        heavier = problem.weight[hull[steps + 1]] - problem.weight[hull[steps]]
        slope = (problem.cost[hull[steps]] - problem.cost[hull[steps + 1]]) / heavier
        order = np.argsort(-slope, kind="stable")  # stable: rounding may tie two steps of one class
        first = np.searchsorted(owner, np.arange(problem.classes))
        return _Walk(hull, first, steps[order], slope[order], np.cumsum(heavier[order]))


@dataclass(frozen=True)
class Relaxed:
    """The best hull solution within the limit. No solution costs less than this one's cost minus `gap`."""

    picks: Ints  # [classes], indices into the problem's choices
    multiplier: float  # cost per unit of weight at the margin, ≥ 0; 0 where the limit does not bind
    gap: float


@dataclass(frozen=True)
class Solution:
    """A solution that costs at most `gap` more than the optimum; exact: at most the grain that was asked for."""

    picks: Ints  # [classes], indices into the problem's choices
    gap: float
    exact: bool


def relax(problem: Problem, limit: float) -> Relaxed:
    """Walk every class's hull from its lightest point, steepest steps first, until the next step exceeds the limit.

    The limit must not be less than the weight of the lightest choices, beyond rounding. The step that no longer fits
    gives the multiplier; where every step fits the result is optimal and its multiplier and gap are zero.
    """
    walk = problem.walk
    at = walk.first.copy()
    slack = limit - math.fsum(problem.weight[walk.hull[at]])
    taken = int(np.searchsorted(walk.weight, slack, side="right"))
    steps = walk.steps[:taken]
    np.maximum.at(at, problem.owner[walk.hull[steps]], steps + 1)
    picks = walk.hull[at]
    if taken == len(walk.steps):
        return Relaxed(picks, 0.0, 0.0)
    multiplier = float(walk.slope[taken])
    return Relaxed(picks, multiplier, multiplier * max(0.0, limit - math.fsum(problem.weight[picks])))


def solve(problem: Problem, limit: float, grain: float) -> Solution:
    """Least cost within the limit; differences of cost up to `grain` do not count. The limit is as for `relax`."""
    relaxed = relax(problem, limit)
    picks, gap, proven = relaxed.picks, relaxed.gap, 0.0  # the best solution, its gap, and the least that one can have
    neighbourhood = _Neighbourhood.of(problem, relaxed, limit)
    reach, effort = 0.0, 0
    while gap - proven > grain and effort < SEARCHES * EFFORT:
        reach = min(max(neighbourhood.wider(reach), grain), gap)
        result = _search(neighbourhood, reach)
        effort += result.effort
        if result.complete:
            proven = min(reach, result.gap)
        elif reach == gap <= result.gap:
            break  # the widest search was cut short and found nothing better
        if result.gap < gap:
            gap, picks = result.gap, relaxed.picks.copy()
            picks[problem.owner[result.moves]] = result.moves
    return Solution(picks, gap - proven, exact=gap - proven <= grain)


@dataclass(frozen=True)
class _Neighbourhood:
    """The moves that a better solution may be made of, away from the relaxed one, by ascending reduced cost."""

    choice: Ints  # [moves], indices into the problem's choices
    owner: Ints  # [moves]
    weight: Floats  # [moves], that of the choice less that of its class's relaxed choice
    cost: Floats  # [moves], likewise
    reduced: Floats  # [moves] = cost + multiplier·weight ≥ 0
    multiplier: float
    slack: float  # limit less the relaxed solution's weight, ≥ 0

    @staticmethod
    def of(problem: Problem, relaxed: Relaxed, limit: float) -> _Neighbourhood:
        home = relaxed.picks[problem.owner]
        weight, cost = problem.weight - problem.weight[home], problem.cost - problem.cost[home]
        reduced = np.maximum(cost + relaxed.multiplier * weight, 0.0)  # below zero by rounding only
        moves = np.flatnonzero((reduced <= relaxed.gap) & ((weight < 0) | (cost < 0)))
        moves = moves[np.argsort(reduced[moves], kind="stable")]
        columns = (problem.owner[moves], weight[moves], cost[moves], reduced[moves])
        return _Neighbourhood(moves, *columns, relaxed.multiplier, limit - math.fsum(problem.weight[relaxed.picks]))

    def wider(self, reach: float) -> float:
        """The reach that takes in twice as many moves."""
        target = max(2 * int(np.searchsorted(self.reduced, reach, side="right")), FIRST_MOVES)
        return float(self.reduced[target]) if target < len(self.reduced) else math.inf

    def groups(self, reach: float) -> list[_Group]:
        """The classes with a move within reach, those of dear moves first: they combine least and keep lists short."""
        within = int(np.searchsorted(self.reduced, reach, side="right"))
        _, nearest, group = np.unique(self.owner[:within], return_index=True, return_inverse=True)
        moves = np.argsort(-nearest[group], kind="stable")
        starts = np.flatnonzero(np.diff(self.owner[moves])) + 1
        return [
            _Group(self.choice[m], np.append(0.0, self.weight[m]), np.append(0.0, self.cost[m]))
            for m in np.split(moves, starts)
            if len(m)
        ]


@dataclass(frozen=True)
class _Group:
    """One class in a search: it stays (entry 0 of weight and cost) or makes one of its moves."""

    choice: Ints  # [moves], indices into the problem's choices
    weight: Floats  # [1 + moves]
    cost: Floats  # [1 + moves]


@dataclass(frozen=True)
class _SearchResult:
    """The outcome of a search: the moves away from the relaxed solution, and the gap that they lead to."""

    moves: Ints  # indices into the problem's choices
    gap: float
    complete: bool  # every solution within reach was seen, or one at least as good
    effort: int  # candidate states


def _search(near: _Neighbourhood, reach: float) -> _SearchResult:
    """The best of the solutions within reach (and of some beyond): two lists of half the groups each, the best pair."""
    groups = near.groups(reach)
    one, other = (_States.of(half, near.multiplier, reach) for half in (groups[0::2], groups[1::2]))
    partner = np.searchsorted(other.weight, near.slack - one.weight, side="right") - 1  # the heaviest costs least
    cost = np.where(partner >= 0, one.cost + other.cost[partner], math.inf)
    best = int(cost.argmin())
    return _SearchResult(
        moves=np.array(one.moves(best) + other.moves(int(partner[best])), dtype=np.intp),
        gap=max(0.0, float(cost[best]) + near.multiplier * near.slack),
        complete=one.complete and other.complete,
        effort=one.effort + other.effort,
    )


@dataclass(frozen=True)
class _States:
    """Undominated sums of the groups' moves within reach: ascending weight, strictly descending cost."""

    weight: Floats  # [states]
    cost: Floats  # [states]
    groups: list[_Group]
    steps: list[tuple[Ints, int]]  # per group: [states] = entry of the group · count + index before; count before
    effort: int  # candidate states

    @staticmethod
    def of(groups: list[_Group], multiplier: float, reach: float) -> _States:
        weight, cost = np.zeros(1), np.zeros(1)
        steps: list[tuple[Ints, int]] = []
        effort = 0
        for group in groups:
            before, candidates = len(weight), len(weight) * len(group.weight)
            if candidates > MERGE_EFFORT or effort + candidates > EFFORT:
                break
            effort += candidates
            kept, weight, cost = _merge(weight, cost, group, multiplier, reach)
            steps.append((kept, before))
        return _States(weight, cost, groups, steps, effort)

    @property
    def complete(self) -> bool:
        return len(self.steps) == len(self.groups)

    def moves(self, state: int) -> list[int]:
        """The moves that lead to a state, as indices into the problem's choices."""
        moves = []
        for (kept, before), group in zip(reversed(self.steps), reversed(self.groups[: len(self.steps)]), strict=True):
            entry, state = divmod(int(kept[state]), before)
            if entry:
                moves.append(int(group.choice[entry - 1]))
        return moves


def _merge(weight: Floats, cost: Floats, group: _Group, multiplier: float, reach: float) -> tuple[Ints, Floats, Floats]:
    """Every state with every entry of the group, less what is out of reach or dominated: (flat index, weight, cost)."""
    weight = (group.weight[:, None] + weight).ravel()
    cost = (group.cost[:, None] + cost).ravel()
    kept = np.flatnonzero(cost + multiplier * weight <= reach)
    kept = kept[np.lexsort((cost[kept], weight[kept]))]
    cheaper = np.ones(len(kept), dtype=bool)
    cheaper[1:] = cost[kept[1:]] < np.minimum.accumulate(cost[kept])[:-1]
    kept = kept[cheaper]
    return kept, weight[kept], cost[kept]


def _hull(problem: Problem) -> Ints:
    """Vertices of every class's lower-left convex hull, class by class, ascending weight, strictly descending cost.

    All classes at once: a point goes when it costs no less than the point before it, or lies on or above the line
    between its neighbours. Both neighbours are choices, so no vertex ever goes, and what remains is convex.
    """
    hull = np.lexsort((problem.cost, problem.weight, problem.owner))
    while True:
        owner = problem.owner[hull]
        heavier, dearer = np.diff(problem.weight[hull]), np.diff(problem.cost[hull])
        same = owner[1:] == owner[:-1]
        dropped = np.zeros(len(hull), dtype=bool)
        dropped[1:] = same & (dearer >= 0)
        chord = same[1:] & same[:-1] & (dearer[1:] < 0)
        dropped[1:-1] |= chord & (dearer[:-1] * heavier[1:] >= dearer[1:] * heavier[:-1])
        if not dropped.any():
            return hull
        hull = hull[~dropped]
