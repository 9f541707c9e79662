"""ApiQ's start of an adapter (arXiv 2402.05147): outputs are to be the original's, given what really flows in.

A layer of the packed model multiplies X_q, which is what its packed and adapted predecessors made of the text, where
the original multiplies X. Its adapter is to make up for both, its own noise and theirs:

    min | W X - (W_packed + B A) X_q |²    over B A of a rank

ApiQ searches by gradients. Given the moments G = X_q X_q' and C = X X_q', there is a solution in closed form: with
G = L L' and Z = (W C - W_packed G) G^-1, what is best without a rank, it is the best approximation of Z L of that rank,
times L^-1. Blocks are taken in order, and layers of a block by what they wait for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from waterfill.base.errors import WaterfillError
from waterfill.base.progress import Progress, stage
from waterfill.tuning.loftq import low_rank
from waterfill.tuning.parts import Adapter

DAMPING = 0.01  # of the mean of G's diagonal, added to it


@dataclass(frozen=True)
class BlockLoss:
    """Mean squared error of a block's outputs, against the original's: where its adapter adds nothing, and as it is."""

    before: float
    after: float


class Blocks:
    """The decoder layers of a model, and what they are called with besides hidden states."""

    def __init__(self, model: Any, ids: Tensor) -> None:
        count = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
        lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count and count]
        if not lists:
            raise WaterfillError(f"the blocks of {type(model).__name__} are not known; use --init loftq")
        self.layers: Sequence[nn.Module] = list(lists[0])
        self._model = model
        self._called: dict[int, dict[str, Any]] = {}
        self._first: list[Tensor] = []
        handles = [
            layer.register_forward_pre_hook(self._note(number), with_kwargs=True)
            for number, layer in enumerate(self.layers)
        ]
        try:
            model(input_ids=ids[None], use_cache=False)
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, number: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._called[number] = {name: value for name, value in kwargs.items() if name != "hidden_states"}

        return hook

    def inputs(self, ids: Tensor) -> Tensor:
        """Hidden states before the first block, `[1, tokens, hidden]`, of as many tokens as were noted."""
        seen: list[Tensor] = []

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])
            raise _Enough

        handle = self.layers[0].register_forward_pre_hook(hook, with_kwargs=True)
        try:
            self._model(input_ids=ids[None], use_cache=False)
        except _Enough:
            pass
        finally:
            handle.remove()
        return seen[0]

    def run(self, number: int, hidden: Tensor) -> Tensor:
        """Hidden states after a block."""
        result = self.layers[number](hidden, **self._called[number])
        after: Tensor = result[0] if isinstance(result, tuple) else result
        return after


class _Enough(Exception):  # noqa: N818  # ends a pass whose rest is not needed
    pass


@contextmanager
def _watching(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """What modules were called with last, float32 `[tokens, in]`."""
    seen: dict[nn.Module, Tensor] = {}

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[module] = args[0].detach().flatten(0, -2).to(torch.float32)

    handles = [module.register_forward_pre_hook(hook) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def nearest(target: Tensor, moments: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B and A that make | D - B A X | least, given D X' `[out, in]` and X X' `[in, in]`, whose diagonal is damped."""
    moments = moments.double()
    damped = moments + torch.diag(torch.full((len(moments),), DAMPING * float(moments.diagonal().mean()) + 1e-12))
    factor = torch.linalg.cholesky(damped)
    weighed = torch.linalg.solve_triangular(factor, target.double().T, upper=False).T  # D X' L^-T
    b, a = low_rank(weighed, rank)
    return b.float(), torch.linalg.solve_triangular(factor, a, upper=False, left=False).float()


@torch.no_grad()
def start_by_apiq(
    adapter: Adapter,
    model: Any,
    original: Any,
    texts: Sequence[Tensor],
    rank: int,
    progress: Progress | None = None,
) -> list[BlockLoss]:
    """Give every layer of the adapter that solution, on texts of token ids [tokens], all of one length.

    Args:
        model: the packed model that the adapter is beside.
        original: what it was packed from.
    """
    packed, exact = Blocks(model, texts[0]), Blocks(original, texts[0])
    hidden = [packed.inputs(ids) for ids in texts]
    wanted = [exact.inputs(ids) for ids in texts]
    names = {module: name for name, module in adapter.layers.items()}
    losses = []
    with stage(progress, "starting from the original's activations", len(packed.layers)) as advance:
        for number, layer in enumerate(packed.layers):
            outputs = [exact.run(number, h) for h in wanted]
            layers = {names[module]: module for module in layer.modules() if module in names}
            for name in layers:
                _clear(adapter, name)
            before = _error(packed, number, hidden, outputs)
            for group in _in_order(packed, number, layers, hidden[0]):
                _solve(adapter, group, original, packed, exact, number, hidden, wanted, rank)
            hidden, wanted = [packed.run(number, h) for h in hidden], outputs
            losses.append(BlockLoss(before, _mean_square(hidden, wanted)))
            advance()
    return losses


def _solve(
    adapter: Adapter,
    group: Sequence[str],
    original: Any,
    packed: Blocks,
    exact: Blocks,
    number: int,
    hidden: Sequence[Tensor],
    wanted: Sequence[Tensor],
    rank: int,
) -> None:
    """Of layers with one input."""
    mine, its = adapter.layers[group[0]], original.get_submodule(group[0])
    width = mine.in_features
    moments, crossed = torch.zeros(width, width), torch.zeros(width, width)
    with _watching([mine, its]) as seen:
        for h, w in zip(hidden, wanted, strict=True):
            packed.run(number, h)
            exact.run(number, w)
            moments += seen[mine].T @ seen[mine]
            crossed += seen[its].T @ seen[mine]
    for name in group:
        weight, coded = original.get_submodule(name).weight, adapter.layers[name].base_layer.dense()
        weight = weight.T if weight.shape != coded.shape else weight
        adapter.set_layer(name, *nearest(weight.float() @ crossed - coded @ moments, moments, rank))


def _in_order(blocks: Blocks, number: int, layers: dict[str, Any], hidden: Tensor) -> list[list[str]]:
    """Names of layers by the order of their calls, those together that are called with the same tensor."""
    calls: list[tuple[int, str]] = []
    kept: list[Tensor] = []  # so that no address is used twice

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            kept.append(args[0])
            calls.append((args[0].data_ptr(), name))

        return hook

    handles = [module.register_forward_pre_hook(note(name)) for name, module in layers.items()]
    blocks.run(number, hidden)
    for handle in handles:
        handle.remove()
    groups: dict[int, list[str]] = {}
    for address, name in calls:
        groups.setdefault(address, []).append(name)
    return list(groups.values())


def _clear(adapter: Adapter, name: str) -> None:
    """Have a layer add nothing."""
    layer = adapter.layers[name]
    (active,) = layer.active_adapters
    layer.lora_B[active].weight.zero_()


def _error(blocks: Blocks, number: int, hidden: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    return _mean_square([blocks.run(number, h) for h in hidden], wanted)


def _mean_square(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    return sum(float((a - b).square().mean()) for a, b in zip(some, others, strict=True)) / len(some)
