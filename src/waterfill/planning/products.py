"""Who multiplies with which matrix in a pass: tokens are counted, and gradients taken where products are.

    forward     x W^T, whatever module's code asks for it ──► tokens of W; x is kept, W is not
    backward    W, read again ──► gradient of x; with x, what is wanted of the gradient of W (`Costs`)

A matrix that other functions use as well, or that is one of several in a parameter, has its whole gradient taken by
automatic differentiation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from waterfill.files.architecture import Matrix, parameters_of
from waterfill.files.blockwise import Watcher, itself
from waterfill.planning.costs import Costs, stored_part

# Functions that multiply with a weight, or look its rows up, and where their two operands are.
_PRODUCTS = {"linear": (0, 1), "embedding": (0, 1), "matmul": (0, 1), "mm": (0, 1), "addmm": (1, 2)}


class _Held(NamedTuple):
    """A matrix whose weights are in memory, and where to get them later."""

    matrix: Matrix
    again: Callable[[], Tensor]


class _Arrival(NamedTuple):
    """The gradient of one product."""

    x: Tensor  # what was multiplied, [tokens, in]
    slope: Tensor  # the product's, [tokens, out]
    back: Tensor  # that of x, [tokens, in]


class Products(TorchFunctionMode, Watcher):
    """Watches the products inside of the block; with `costs`, takes the gradients of those that are linear."""

    def __init__(self, matrices: Sequence[Matrix], costs: Costs | None = None) -> None:
        super().__init__()
        self._costs, self._returning = costs, False
        self._by_parameter: dict[str, list[Matrix]] = {}
        for matrix in matrices:
            self._by_parameter.setdefault(matrix.parameter, []).append(matrix)
        self._held: dict[int, _Held] = {}  # by where their memory begins
        self._rows = {matrix.name: 0 for matrix in matrices}
        self._calls: Counter[str] = Counter()  # of linear products
        self._multiplied_with: dict[str, _Held] = {}
        self._arrived: dict[str, list[_Arrival]] = {}  # of matrices that others are still to come of
        self._anchor = torch.zeros((), requires_grad=True)  # a product may have no other input to differentiate by

    # -----------------------------------------------------------------------------------------------------------------
    # What is in memory

    def read(self, name: str, weight: Tensor, again: Callable[[], Tensor]) -> None:
        # Experts are views into one parameter, told apart by where they begin.
        for matrix in self._by_parameter.get(name, ()):
            self._held[stored_part(weight, matrix).data_ptr()] = _Held(matrix, again)

    def forgotten(self, name: str, weight: Tensor) -> None:
        for matrix in self._by_parameter.get(name, ()):
            self._held.pop(stored_part(weight, matrix).data_ptr(), None)

    def multiplied(self, name: str, tokens: int) -> None:
        if not self._returning:
            for matrix in self._by_parameter.get(name, ()):
                self._rows[matrix.name] += tokens

    # -----------------------------------------------------------------------------------------------------------------
    # Products

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        places = _PRODUCTS.get(name)
        if places is not None and len(args) > places[1]:
            if not self._returning:
                self._count(*(args[place] for place in places))
            if name == "linear" and (held := self._alone(args[1])) is not None:
                return self._linear(held, *args, **kwargs)
        return function(*args, **kwargs)

    def _count(self, a: Any, b: Any) -> None:
        for weight, tokens in ((a, b), (b, a)):
            if isinstance(weight, Tensor) and isinstance(tokens, Tensor):
                held = self._held.get(weight.data_ptr())
                if held is not None:
                    width = held.matrix.shape[1] if tokens.is_floating_point() else 1
                    self._rows[held.matrix.name] += tokens.numel() // width

    def _alone(self, weight: Any) -> _Held | None:
        """A matrix that is all of its parameter, and that nothing looks up."""
        held = self._held.get(weight.data_ptr()) if self._costs is not None and isinstance(weight, Tensor) else None
        if held is None or held.matrix.role in ("embedding", "expert") or held.matrix.transposed:
            return None
        return held if tuple(weight.shape) == tuple(held.matrix.shape) else None

    def _linear(self, held: _Held, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not self._returning:
            self._calls[held.matrix.name] += 1
            self._multiplied_with[held.matrix.name] = held
        weight = weight.detach()
        if not torch.is_grad_enabled():
            return torch.nn.functional.linear(x, weight, bias)
        # On the way back it is in memory, for as long as what is computed again.
        again = partial(itself, weight) if self._returning else held.again
        product: Callable[..., Tensor] = _Product.apply
        return product(x, weight, bias, again, partial(self._arrive, held.matrix), self._anchor)

    def _arrive(self, matrix: Matrix, weight: Tensor, x: Tensor, slope: Tensor, back: Tensor) -> None:
        """The gradient of one product; that of a matrix is the sum of all."""
        arrivals = self._arrived.setdefault(matrix.name, [])
        arrivals.append(_Arrival(x, slope, back))
        if len(arrivals) == self._calls[matrix.name]:
            self._hand_out(matrix, weight)

    def _hand_out(self, matrix: Matrix, weight: Tensor) -> None:
        assert self._costs is not None
        arrivals = self._arrived.pop(matrix.name)
        whole = arrivals[0] if len(arrivals) == 1 else _Arrival(*map(torch.cat, zip(*arrivals, strict=True)))
        self._costs.add_product(matrix.parameter, weight, *whole)

    @contextmanager
    def returning(self) -> Iterator[None]:
        """Gradients come back inside of the block, for what was multiplied before it."""
        self._returning = True
        try:
            with self:
                yield
            for name in list(self._arrived):  # some of their products were not used
                held = self._multiplied_with[name]
                self._hand_out(held.matrix, held.again())
        finally:
            self._returning = False
            self._arrived.clear()

    def tokens(self, measured: Mapping[str, float], positions: int) -> dict[str, int]:
        """By matrix. What was multiplied in a way that is not counted, but has an effect, counts as met by all."""
        return {name: rows or (positions if measured[name] else 0) for name, rows in self._rows.items()}


class _Product(torch.autograd.Function):
    """x `[..., in]` times a weight `[out, in]`, which is not kept for the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        again: Callable[[], Tensor],
        arrive: Callable[[Tensor, Tensor, Tensor, Tensor], None],
        anchor: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.again, ctx.arrive = again, arrive
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (x,) = ctx.saved_tensors
        weight, slope = ctx.again(), gradients[0].flatten(0, -2)
        back = slope @ weight
        ctx.arrive(weight, x.flatten(0, -2), slope, back)
        return back.view_as(x), None, None, None, None, None


@contextmanager
def gradients(model: Any, wanted: Set[str], costs: Costs, *, kept_bytes: int = 0) -> Iterator[None]:
    """Tell costs of gradients that come by no product, inside of the block; of a model in memory, whose parameters must
    require them, or of one that is read block by block."""
    if (blockwise := getattr(model, "blockwise", None)) is not None:
        with blockwise.gradients(wanted, costs.add, consume_product=costs.add_product, kept_bytes=kept_bytes):
            yield
        return

    def arrived(name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        costs.add(name, parameter.detach(), parameter.grad, 1)
        parameter.grad = None  # one tensor's at a time

    parameters = parameters_of(model)
    handles = [
        parameters[name].register_post_accumulate_grad_hook(partial(arrived, name))
        for name in wanted
        if parameters[name].requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watched(model: Any, products: Products) -> Iterator[None]:
    """Tell them what is in memory inside of the block."""
    if (blockwise := getattr(model, "blockwise", None)) is not None:
        with blockwise.watched(products):
            yield
        return
    parameters = parameters_of(model)
    for name, parameter in parameters.items():
        products.read(name, parameter, partial(itself, parameter.detach()))
    yield
