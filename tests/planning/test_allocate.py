"""The allocator against brute force, against an integer-programming solver, and against what a budget promises."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from waterfill.base.errors import BudgetError, WaterfillError
from waterfill.planning import knapsack as _knapsack
from waterfill.planning.allocate import (
    Allocation,
    Choice,
    ChoiceTable,
    Task,
    allocate,
    certificate,
    feasible_bytes,
    relax,
    smallest,
)

Menus = list[list[Choice]]
Ties = list[list[int]]

# (p, n, t²) of published Gaussian grids: rate log2(n)/p bits per weight, and 16 bits of scale per 1024 weights.
PUBLISHED_GRIDS = [
    *((1, 4, 0.11748), (1, 8, 0.034548), (1, 9, 0.027853), (1, 16, 0.009501), (1, 19, 0.006848), (1, 32, 0.002505)),
    *((1, 64, 0.000644), (1, 128, 0.000163), (1, 256, 0.0000411)),
    *((2, 16, 0.10767), (2, 64, 0.029620), (2, 88, 0.021903), (2, 256, 0.007753), (2, 361, 0.005526)),
    *((2, 1024, 0.002040), (2, 4096, 0.000589)),
    *((3, 64, 0.10120), (3, 512, 0.027062), (3, 830, 0.019723), (3, 4096, 0.006903), (3, 6600, 0.005037)),
    *((4, 256, 0.09592), (4, 4096, 0.025540), (4, 7800, 0.018434), (6, 4096, 0.09142)),
]


def grid_menu_points() -> list[tuple[float, float]]:
    """43 points (bits per weight, t²): the published grids, and one point between neighbours of equal p ≤ 3."""
    points = []
    for p, group in itertools.groupby(PUBLISHED_GRIDS, key=lambda grid: grid[0]):
        published = [(math.log2(n) / p + 16 / 1024, t2) for _, n, t2 in group]
        points += published
        if p <= 3:
            points += [((a + c) / 2, math.sqrt(b * d)) for (a, b), (c, d) in itertools.pairwise(published)]
    return points


def grid_menus(alphas: Sequence[float], weights: Sequence[int]) -> Menus:
    points = grid_menu_points()
    return [
        [Choice(math.ceil(bits * count / 8), alpha * t2) for bits, t2 in points]
        for alpha, count in zip(alphas, weights, strict=True)
    ]


def sizes_and_losses(menus: Menus, choices: Sequence[int]) -> tuple[int, float]:
    chosen = [menu[choice] for menu, choice in zip(menus, choices, strict=True)]
    return sum(choice.size_bytes for choice in chosen), math.fsum(choice.loss for choice in chosen)


def every_allocation(menus: Menus, ties: Ties) -> list[tuple[int, float]]:
    """(bytes, loss) of each allocation in which tied tensors agree."""
    everything = itertools.product(*(range(len(menu)) for menu in menus))
    return [
        sizes_and_losses(menus, choices)
        for choices in everything
        if all(len({choices[tensor] for tensor in group}) == 1 for group in ties)
    ]


def assert_consistent(menus: Menus, ties: Ties, found: Allocation) -> None:
    assert sizes_and_losses(menus, found.choices) == (found.size_bytes, found.loss)
    assert all(len({found.choices[tensor] for tensor in group}) == 1 for group in ties)


# Losses in eighths add without rounding, so that equal sums are equal; any sign, and zero and ties happen often.
EIGHTHS = st.integers(-12, 40).map(lambda eighths: eighths / 8)
REALS = st.floats(-1, 4, allow_subnormal=False).map(lambda loss: round(loss, 9))


@st.composite
def instances(draw: st.DrawFn, losses: st.SearchStrategy[float] = EIGHTHS) -> tuple[Menus, Ties]:
    choice = st.builds(Choice, size_bytes=st.integers(0, 30), loss=losses)
    if draw(st.booleans()):
        return draw(st.lists(st.lists(choice, min_size=1, max_size=5), min_size=1, max_size=5)), []
    length = draw(st.integers(1, 4))
    menus = draw(st.lists(st.lists(choice, min_size=length, max_size=length), min_size=2, max_size=6))
    order = draw(st.permutations(range(len(menus))))
    cut = draw(st.integers(0, len(menus)))
    return menus, [group for group in (order[:cut], order[cut : cut + 2]) if group]


@given(instances(), st.integers(0, 180))
@settings(max_examples=250)
def test_equals_brute_force(instance: tuple[Menus, Ties], budget: int) -> None:
    menus, ties = instance
    feasible = [(loss, -size) for size, loss in every_allocation(menus, ties) if size <= budget]
    if not feasible:
        with pytest.raises(BudgetError):
            allocate(menus, budget, ties=ties)
        return
    found = allocate(menus, budget, ties=ties)
    assert_consistent(menus, ties, found)
    assert (found.loss, -found.size_bytes) == min(feasible)  # least loss, and of equal losses the most bytes
    assert found.exact
    assert found.loss - 1e-9 <= found.bound <= found.loss


@given(instances(losses=REALS), st.integers(0, 180))
@settings(max_examples=120)
def test_equals_brute_force_with_losses_that_round(instance: tuple[Menus, Ties], budget: int) -> None:
    menus, ties = instance
    feasible = [loss for size, loss in every_allocation(menus, ties) if size <= budget]
    if feasible:
        found = allocate(menus, budget, ties=ties)
        assert found.loss == pytest.approx(min(feasible), abs=1e-10)
        assert found.exact
        assert found.size_bytes <= budget


@given(instances(), st.integers(-60, 200))
@settings(max_examples=250)
def test_smallest_equals_brute_force(instance: tuple[Menus, Ties], eighths: int) -> None:
    menus, ties = instance
    max_loss = eighths / 8
    feasible = [(size, loss) for size, loss in every_allocation(menus, ties) if loss <= max_loss]
    if not feasible:
        with pytest.raises(BudgetError):
            smallest(menus, max_loss, ties=ties)
        return
    found = smallest(menus, max_loss, ties=ties)
    assert_consistent(menus, ties, found)
    assert (found.size_bytes, found.loss) == min(feasible)
    assert found.exact


@given(instances(losses=REALS), st.data())
@settings(max_examples=120)
def test_smallest_meets_a_limit_that_only_one_allocation_meets(
    instance: tuple[Menus, Ties], data: st.DataObject
) -> None:
    """The limit is some allocation's own loss, to the last bit."""
    menus, ties = instance
    everything = every_allocation(menus, ties)
    max_loss = data.draw(st.sampled_from(everything))[1]
    found = smallest(menus, max_loss, ties=ties)
    assert found.loss <= max_loss
    assert found.size_bytes >= min(size for size, loss in everything if loss <= max_loss + 1e-12)
    assert found.size_bytes <= min(size for size, loss in everything if loss <= max_loss - 1e-12 or loss == max_loss)


@given(instances(), st.integers(0, 180))
@settings(max_examples=120)
def test_relaxation_brackets_the_optimum(instance: tuple[Menus, Ties], budget: int) -> None:
    menus, ties = instance
    feasible = [loss for size, loss in every_allocation(menus, ties) if size <= budget]
    if feasible:
        relaxed = relax(menus, budget, ties=ties)
        assert_consistent(menus, ties, relaxed.allocation)
        assert relaxed.allocation.size_bytes <= budget
        assert relaxed.allocation.bound <= min(feasible) <= relaxed.allocation.loss
        assert relaxed.price >= 0
        unused = budget - relaxed.allocation.size_bytes
        assert relaxed.allocation.loss - relaxed.allocation.bound <= relaxed.price * unused + 1e-9


@given(instances(), st.lists(st.integers(0, 180), min_size=2, max_size=6))
@settings(max_examples=100)
def test_more_bytes_never_lose_more(instance: tuple[Menus, Ties], budgets: list[int]) -> None:
    menus, ties = instance
    least = min(size for size, _ in every_allocation(menus, ties))
    losses = [allocate(menus, budget, ties=ties).loss for budget in sorted(budgets) if budget >= least]
    assert losses == sorted(losses, reverse=True)


@pytest.fixture(scope="module")
def llama(shared_data: Path) -> tuple[Menus, int]:
    """Menus of Llama-3.1-8B's 224 matrices from published sensitivities, and its number of weights."""
    tensors = json.loads((shared_data / "llama-3.1-8b-alphas.json").read_text())["tensors"].values()
    weights = [math.prod(tensor["shape"]) for tensor in tensors]
    alphas = [max(0.0, tensor["alpha"]) for tensor in tensors]
    return grid_menus(alphas, weights), sum(weights)


def milp_loss(menus: Menus, budget: int) -> tuple[int, float]:
    """(bytes, loss) that HiGHS finds, with a relative gap of 3e-7."""
    tensors, length = len(menus), len(menus[0])
    size = np.array([choice.size_bytes for menu in menus for choice in menu], dtype=np.float64)
    loss = np.array([choice.loss for menu in menus for choice in menu])
    one_each = csr_array((np.ones(len(loss)), (np.repeat(np.arange(tensors), length), np.arange(len(loss)))))
    # The solver's tolerances are 1e-6, absolute: below a byte in kB, and below 1e-7 of the loss in these units.
    units = 100 / loss.reshape(tensors, length).min(axis=1).sum()
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(size[None] / 1e3, -np.inf, budget / 1e3)]
    options = {"mip_rel_gap": 3e-7, "time_limit": 60}
    result = milp(
        loss * units, constraints=constraints, integrality=np.ones(len(loss)), bounds=Bounds(0, 1), options=options
    )
    return sizes_and_losses(menus, result.x.reshape(tensors, length).argmax(axis=1).tolist())


@pytest.mark.parametrize("bits", [2.5, 3, 3.25, 3.5, 4, 4.25, 5, 6])
def test_equals_milp_on_published_sensitivities(llama: tuple[Menus, int], bits: float) -> None:
    menus, weights = llama
    budget = int(weights * bits / 8)
    found = allocate(menus, budget)
    assert found.exact
    assert 0.999 * budget <= found.size_bytes <= budget
    solver_bytes, solver_loss = milp_loss(menus, budget)
    assert solver_bytes <= budget
    assert found.bound <= solver_loss
    assert found.loss == pytest.approx(solver_loss, rel=1e-6)


def test_smallest_inverts_allocate_on_published_sensitivities(llama: tuple[Menus, int]) -> None:
    menus, weights = llama
    for bits in (2.5, 3.25, 4.25):
        allocated = allocate(menus, int(weights * bits / 8))
        found = smallest(menus, allocated.loss)
        assert found.exact
        assert found.loss <= allocated.loss
        assert found.size_bytes == allocated.size_bytes


def random_model(seed: int, tensors: int) -> tuple[Menus, int]:
    """Menus and number of weights: log-normal sensitivities over three decades, every tenth zero, and a few shapes."""
    generator = np.random.default_rng(seed)
    alphas = np.exp(generator.normal(scale=1.2, size=tensors)) / tensors
    alphas[::10] = 0.0
    weights = generator.choice([2**20, 3 * 2**19, 896 * 4864, 1_000_003], size=tensors).tolist()
    return grid_menus(alphas.tolist(), weights), sum(weights)


@pytest.mark.parametrize("bits", [2.2, 3.1, 4.0, 7.9, 8.1])
def test_a_larger_model_is_solved_and_leaves_nothing_over(bits: float) -> None:
    menus, weights = random_model(seed=1, tensors=600)
    budget = int(weights * bits / 8)
    found = allocate(menus, budget)
    assert found.exact
    assert_consistent(menus, [], found)
    everything = sum(max(choice.size_bytes for choice in menu) for menu in menus)
    assert 0.999 * min(budget, everything) <= found.size_bytes <= budget
    for menu, choice in zip(menus, found.choices, strict=True):
        now = menu[choice]
        room = budget - found.size_bytes + now.size_bytes
        assert not any(other.loss < now.loss and other.size_bytes <= room for other in menu)


def test_losses_fall_over_a_fine_ladder_of_budgets() -> None:
    menus, _ = random_model(seed=2, tensors=60)
    low, high = (sum(f(choice.size_bytes for choice in menu) for menu in menus) for f in (min, max))
    found = [allocate(menus, budget) for budget in range(low, high, (high - low) // 60)]
    assert all(allocation.exact for allocation in found)
    losses = [allocation.loss for allocation in found]
    assert losses == sorted(losses, reverse=True)


def test_bytes_left_over_go_where_they_cost_nothing() -> None:
    dead = [Choice(size, 0.0) for size in (10, 20, 35, 80)]
    live = [Choice(10, 1.0), Choice(100, 0.5)]
    found = allocate([dead, live, dead], 150)
    assert found.choices == (2, 1, 0) or found.choices == (0, 1, 2)
    assert (found.size_bytes, found.loss, found.exact) == (145, 0.5, True)
    assert allocate([dead, dead], 1000).size_bytes == 160


def test_equal_loss_is_spent_across_tensors_too() -> None:
    """Either tensor may take its better choice; only one of the two ways uses the whole budget."""
    menus = [[Choice(1, 1.0), Choice(3, 0.0)], [Choice(2, 1.0), Choice(5, 0.0)]]
    assert allocate(menus, 6).choices == (0, 1)


def test_negative_sensitivity_takes_the_smallest_choice() -> None:
    menus = [[Choice(10, -0.4), Choice(20, -0.1)], [Choice(10, 0.4), Choice(20, 0.1)]]
    found = allocate(menus, 40)
    assert found.choices == (0, 1)
    assert found.loss == pytest.approx(-0.3)
    assert smallest(menus, -0.3).choices == (0, 1)


def test_ties_take_one_index() -> None:
    menu = [Choice(10, 0.9), Choice(20, 0.3), Choice(40, 0.1)]
    menus = [menu, [Choice(10, 0.0), Choice(30, 0.0), Choice(60, 0.0)], menu]
    assert allocate(menus, 90).choices == (2, 0, 2)
    assert allocate(menus, 90, ties=[(0, 1)]).choices == (1, 1, 2)
    assert allocate(menus, 90, ties=[[1, 0], [2]]).choices == (1, 1, 2)
    assert allocate(menus, 90, ties=[[2, 1, 0], []]).choices == (1, 1, 1)
    assert feasible_bytes([menus[0], menus[0][::-1]], ties=[(0, 1)]) == (40, 50)


@pytest.mark.parametrize(
    ("ties", "said"),
    [
        ([[0, 1]], "menus of [2, 1] choices"),
        ([[0, 3]], "of 3"),
        ([[-1, 0]], "of 3"),
        ([[0, 2], [2, 0]], "twice"),
        ([[0, 2], [0]], "twice"),
        ([[2, 2]], "twice"),
    ],
)
def test_impossible_ties_are_refused(ties: Ties, said: str) -> None:
    menus = [[Choice(1, 1.0), Choice(2, 0.5)], [Choice(1, 1.0)], [Choice(1, 1.0), Choice(2, 0.5)]]
    for call in (allocate, relax, smallest):
        with pytest.raises(WaterfillError) as raised:
            call(menus, 10, ties=ties)
        assert said in str(raised.value)


@pytest.mark.parametrize(
    ("menus", "said"),
    [
        ([[Choice(1, 1.0)], []], "tensor 1 has an empty menu"),
        ([[Choice(1, 1.0)], [Choice(1, 0.0), Choice(2, math.nan)]], "tensor 1 has a choice of 2 bytes and loss nan"),
        ([[Choice(1, math.inf)]], "tensor 0"),
        ([[Choice(-1, 0.0)]], "tensor 0 has a choice of -1 bytes"),
    ],
)
def test_unusable_menus_are_refused(menus: Menus, said: str) -> None:
    with pytest.raises(WaterfillError) as raised:
        allocate(menus, 10)
    assert said in str(raised.value)


def test_infeasible_budgets_say_what_is_feasible() -> None:
    menus = [[Choice(1000, 0.5), Choice(3000, 0.1)], [Choice(234, 0.2)]]
    for call in (allocate, relax):
        with pytest.raises(BudgetError) as raised:
            call(menus, 1233)
        assert "1,233" in str(raised.value)
        assert "1,234" in str(raised.value)
        assert "3,234" in str(raised.value)
        assert (raised.value.smallest_bytes, raised.value.largest_bytes) == (1234, 3234)
    assert feasible_bytes(menus) == (1234, 3234)
    assert allocate(menus, 1234).size_bytes == 1234
    with pytest.raises(BudgetError) as raised:
        smallest(menus, 0.29)
    assert "0.3" in str(raised.value)
    assert (raised.value.smallest_bytes, raised.value.largest_bytes) == (1234, 3234)


def test_no_tensors_need_no_bytes() -> None:
    assert allocate([], 0) == smallest([], 0.0) == Allocation((), 0, 0.0, 0.0, exact=True)
    with pytest.raises(BudgetError):
        allocate([], -1)


def test_equal_inputs_give_equal_plans() -> None:
    menus, weights = random_model(seed=3, tensors=100)
    budget = int(weights * 3.3 / 8)
    assert allocate(menus, budget) == allocate(menus, budget)


def test_a_search_cut_short_says_so_and_its_bound_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    menus, weights = random_model(seed=4, tensors=80)
    budget = int(weights * 3.3 / 8)
    optimum = allocate(menus, budget)
    assert optimum.exact
    assert "optimal" in certificate(optimum)
    monkeypatch.setattr(_knapsack, "EFFORT", 200)
    found = allocate(menus, budget)
    assert not found.exact
    assert found.size_bytes <= budget
    assert found.bound <= optimum.loss < found.loss <= relax(menus, budget).allocation.loss
    assert "within" in certificate(found)
    at_loss = smallest(menus, optimum.loss)
    assert not at_loss.exact
    assert at_loss.loss <= optimum.loss
    assert at_loss.size_bytes >= optimum.size_bytes


def test_identical_tensors_share_what_the_budget_allows() -> None:
    """Many optima, all with the same numbers of small and large choices."""
    menu = [Choice(20, 0.5), Choice(30, 0.2), Choice(47, 0.05)]
    found = allocate([menu] * 50, 50 * 30)
    assert found.exact
    counts = [(few, 50 - few - many, many) for few in range(51) for many in range(51 - few)]
    sums = [(a * 0.5 + b * 0.2 + c * 0.05, a * 20 + b * 30 + c * 47) for a, b, c in counts]
    assert found.loss == pytest.approx(min(loss for loss, size in sums if size <= 50 * 30))


def test_one_task_serves_every_budget_and_menus_may_be_arrays() -> None:
    menus = grid_menus([0.3, 0.02, 1.5, 0.3], [4096, 1024, 65536, 4096])
    size, loss = np.array([[(choice.size_bytes, choice.loss) for choice in menu] for menu in menus]).transpose(2, 0, 1)
    task = Task.of(ChoiceTable(size, loss), [(0, 3)])
    assert feasible_bytes(menus, ties=[(0, 3)]) == (task.smallest_bytes, task.largest_bytes)
    for budget in range(task.smallest_bytes, task.largest_bytes, 997):
        found = allocate(menus, budget, ties=[(0, 3)])
        assert task.allocate(budget) == found
        assert task.smallest(found.loss) == smallest(menus, found.loss, ties=[(0, 3)])
