"""The budget that was asked for, met by allocations: bytes of files or of matrices, a loss, a speed, or two of these.

--size, --bits             least loss within the bytes, and with --speed within the time as well
--max-kl                   fewest bytes within the loss; streamed: least time
--speed                    least loss within the time
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from waterfill.base.errors import BudgetError
from waterfill.files.artifact import lay_out
from waterfill.planning.allocate import Allocation, Task
from waterfill.planning.budget import Budget
from waterfill.planning.menu import Menus
from waterfill.planning.plan import KeptPlan, TensorPlan
from waterfill.planning.refine import refine
from waterfill.planning.speed import UNITS_PER_S, Timing
from waterfill.planning.timed import allocate_timed, least_time

ROUNDS = 8  # of settling headers against choices; two or three are enough in practice


@dataclass(frozen=True)
class Solver:
    """Of one model: allocations, and bytes of whole artifacts."""

    menus: Menus
    kept: tuple[KeptPlan, ...]
    ties: tuple[tuple[int, ...], ...]
    budget: Budget
    shard_bytes: int
    timing: Timing | None  # by which choices take time; None: time does not matter
    _sizes: dict[tuple[int, ...], int] = field(default_factory=dict)  # of artifacts, by choices

    @cached_property
    def task(self) -> Task:
        """Menus and ties, for any budget."""
        return Task.of(self.menus.choices, self.ties)

    @property
    def timed(self) -> bool:
        """Whether time is what is limited, or what is to be least."""
        return self.budget.speed is not None or (self.timing is not None and self.budget.max_kl is not None)

    def solve(self) -> Allocation:
        """The choices for the budget.

        Raises:
            BudgetError: there are none; says what there is.
        """
        budget = self.budget
        if budget.max_kl is not None:
            if self.timing is None:
                return self.task.smallest(budget.max_kl)
            self.task.check_loss(budget.max_kl)
            return self._by_bytes(self.task.by_time.smallest(budget.max_kl))
        if budget.bits is not None:
            return self._within_payload(int(budget.bits * self.menus.weights / 8), f"--bits {budget.bits:g}")
        if budget.size_bytes is not None:
            return self._within_size(budget.size_bytes)
        time = self._most_time()
        self._check_time(self.task.by_time.smallest_bytes, "")
        return self._by_bytes(self.task.by_time.allocate(time))

    def refined(self, allocation: Allocation) -> tuple[TensorPlan, ...]:
        """The allocation with the rates that a menu cannot name; as it is where time decides, which refining does not
        look at."""
        budget, chosen = self.budget, allocation.choices
        if self.timed:
            return self.menus.tensors(chosen)
        if budget.max_kl is not None:
            return self.menus.plans(refine(self.menus, chosen, self.ties, max_kl=budget.max_kl))
        if budget.bits is not None:
            spare_bytes = int(budget.bits * self.menus.weights / 8) - allocation.size_bytes
        else:
            assert budget.size_bytes is not None
            spare_bytes = budget.size_bytes - self.artifact_bytes(chosen)
        return self.menus.plans(refine(self.menus, chosen, self.ties, spare_bytes=spare_bytes))

    def artifact_bytes(self, choices: tuple[int, ...]) -> int:
        """All weight files, exactly."""
        if choices not in self._sizes:
            self._sizes[choices] = self.bytes_of(self.menus.tensors(choices))
        return self._sizes[choices]

    def bytes_of(self, tensors: Sequence[TensorPlan]) -> int:
        """The same, of plans."""
        specs = [*(kept.spec() for kept in self.kept), *(tensor.spec() for tensor in tensors)]
        return lay_out(specs, shard_bytes=self.shard_bytes).size_bytes

    def _least_loss(self, limit_bytes: int) -> Allocation:
        """Within the bytes of matrices, and the time if there is a limit on it."""
        if self.budget.speed is None:
            return self.task.allocate(limit_bytes)
        self._check_time(least_time(self.task, limit_bytes), " within these bytes")
        return allocate_timed(self.task, limit_bytes, self._most_time())

    def _most_time(self) -> int:
        assert self.budget.speed is not None
        return int(UNITS_PER_S / self.budget.speed)

    def _check_time(self, least: int, where: str) -> None:
        if least > self._most_time():
            assert self.timing is not None
            speeds = self.timing.speeds
            raise BudgetError(
                f"--speed {self.budget.speed:g} is more than products allow{where}: at most "
                f"{UNITS_PER_S / least:.4g} tokens per second on {speeds.machine} with {speeds.isa}; ask for less"
            )

    def _by_bytes(self, by_time: Allocation) -> Allocation:
        return replace(by_time, size_bytes=int(self.task.size[self.task.picks(by_time)].sum()))

    def _within_payload(self, limit: int, asked: str) -> Allocation:
        least, most = self.task.smallest_bytes, self.task.largest_bytes
        if limit < least:
            rates = [8 * size / self.menus.weights for size in (least, most)]
            raise BudgetError(
                f"{asked} is less than this model needs: the smallest feasible is {rates[0]:.4f} and the largest "
                f"{rates[1]:.4f} bits per weight, scales included; ask for more",
                least,
                most,
            )
        return self._least_loss(limit)

    def _within_size(self, limit: int) -> Allocation:
        """Allocate what headers and kept tensors leave; they depend on the choices, so repeat until that settles."""
        least = self.task.allocate(self.task.smallest_bytes)
        smallest_bytes = self.artifact_bytes(least.choices)
        if limit < smallest_bytes or limit >= self.task.largest_bytes:
            most = self.task.allocate(self.task.largest_bytes)
            largest_bytes = self.artifact_bytes(most.choices)
            if limit < smallest_bytes:
                raise BudgetError(
                    f"--size {limit:,} bytes is less than this model needs: the smallest feasible artifact has "
                    f"{smallest_bytes:,} bytes and the largest {largest_bytes:,}; ask for more, or keep fewer tensors",
                    smallest_bytes,
                    largest_bytes,
                )
            if limit >= largest_bytes:
                return self._least_loss(self.task.largest_bytes)
        best: Allocation | None = None
        around = smallest_bytes - least.size_bytes
        for _ in range(ROUNDS):
            trial = self._least_loss(max(limit - around, least.size_bytes))
            settled = self.artifact_bytes(trial.choices) - trial.size_bytes
            if trial.size_bytes + settled <= limit:
                best = trial if best is None else min(best, trial, key=lambda allocation: allocation.loss)
                if settled >= around:
                    break
            around = settled
        return best or self._least_loss(least.size_bytes)
