"""Which parts stay: as many as a target allows, the best of each layer, of the two kinds in the best proportion.

    scores ──► number of KV groups: each is tried ──► channels fill what is left ──► least loss of what goes

Every layer keeps as many parts as every other, since that is what a config.json can say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from waterfill.base.errors import BudgetError
from waterfill.tuning.pruning.structure import Sizes, Structure

What = Literal["parts", "heads", "channels", "layers"]
WHATS: tuple[What, ...] = ("parts", "heads", "channels", "layers")


@dataclass(frozen=True)
class Scores:
    """How much each part matters, float64."""

    heads: Tensor  # [layers, KV groups]
    channels: Tensor  # [layers, channels]
    nats: bool  # whether they are losses, in nats per token, that add up

    @property
    def layers(self) -> Tensor:
        """`[layers]`: what their parts do together."""
        return self.heads.sum(1) + self.channels.sum(1)


@dataclass(frozen=True)
class Shape:
    """Numbers of what stays, the same in every layer that does."""

    layers: int
    kv_heads: int
    channels: int


@dataclass(frozen=True)
class Selection:
    """Numbers of what stays, ascending; of heads and channels by layer that stays."""

    layers: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...]
    channels: tuple[tuple[int, ...], ...]

    @property
    def shape(self) -> Shape:
        return Shape(len(self.layers), len(self.heads[0]), len(self.channels[0]))

    def parts(self, place: int, kind: str) -> tuple[int, ...]:
        """Those of a kind that stay, in the layer at this place among those that stay."""
        return self.heads[place] if kind == "heads" else self.channels[place]


Fits = Callable[[Shape], bool]
"""Whether a shape is within the target."""


def full(sizes: Sizes) -> Shape:
    """Of the model as it is."""
    return Shape(sizes.layers, sizes.kv_heads, sizes.channels)


def shapes(structure: Structure, what: What, fits: Fits, multiple: int, kv_heads: int | None) -> list[Shape]:
    """The largest shape within the target for every number of KV groups; or the one with fewer layers.

    Raises:
        BudgetError: nothing that small can be made, or with so many KV heads.
    """
    sizes, counts = structure.sizes, structure.group_counts
    if kv_heads is not None and kv_heads not in counts:
        raise BudgetError(
            f"--kv-heads {kv_heads} is not what a {structure.config.model_type} of this width may have; choose of "
            f"{', '.join(map(str, counts))}"
        )
    found = list(_shapes(sizes, what, fits, multiple, counts if kv_heads is None else [kv_heads]))
    if not found:
        least = {
            "parts": f"{kv_heads or counts[0]} KV heads and {min(multiple, sizes.channels)} channels in every layer",
            "heads": f"{kv_heads or counts[0]} KV heads in every layer",
            "channels": f"{min(multiple, sizes.channels)} channels in every layer",
            "layers": "one layer",
        }[what]
        raise BudgetError(f"the model is too large for that even with {least}; ask for more, or for another --what")
    return found


def _shapes(sizes: Sizes, what: What, fits: Fits, multiple: int, counts: Sequence[int]) -> Iterator[Shape]:
    if what == "layers":
        fewer = (Shape(count, sizes.kv_heads, sizes.channels) for count in range(sizes.layers, 0, -1))
        yield from [shape for shape in fewer if fits(shape)][:1]
        return
    for count in reversed(counts) if what in ("parts", "heads") else [sizes.kv_heads]:
        widths = [sizes.channels]
        if what != "heads":
            widths += range((sizes.channels - 1) // multiple * multiple, 0, -multiple)
        shape = next((s for width in widths if fits(s := Shape(sizes.layers, count, width))), None)
        if shape is not None:
            yield shape
            if what == "heads":
                return


def nearest(sizes: Sizes, found: Sequence[Shape]) -> Shape:
    """The shape that leaves about the same share of both kinds, as LLM-Pruner does."""
    return min(found, key=lambda s: abs(math.log(s.kv_heads / sizes.kv_heads) - math.log(s.channels / sizes.channels)))


def select(scores: Scores, shape: Shape, of_layers: Tensor | None = None) -> Selection:
    """The best parts of every layer, or the best layers (`of_layers` where they were scored by themselves)."""
    layers = _best(scores.layers if of_layers is None else of_layers, shape.layers)
    return Selection(
        layers,
        tuple(_best(scores.heads[layer], shape.kv_heads) for layer in layers),
        tuple(_best(scores.channels[layer], shape.channels) for layer in layers),
    )


def lost(scores: Scores, selection: Selection) -> float:
    """Sum of the scores of what goes."""
    total = float(scores.layers.sum())
    for place, layer in enumerate(selection.layers):
        total -= float(scores.heads[layer][list(selection.heads[place])].sum())
        total -= float(scores.channels[layer][list(selection.channels[place])].sum())
    return max(total, 0.0)


def _best(scores: Tensor, count: int) -> tuple[int, ...]:
    """The numbers of the `count` highest, ascending; of equal ones the first."""
    order = torch.argsort(scores, descending=True, stable=True)[:count]
    return tuple(sorted(order.tolist()))


def check_target(keep_share: float | None, size: str | float | None) -> None:
    """Refuse what is no target.

    Raises:
        BudgetError: not one of both, or a share that is none.
    """
    if (keep_share is None) == (size is None):
        raise BudgetError("pruning needs exactly one of --keep-share and --size; give one of them")
    if keep_share is not None and not 0 < keep_share < 1:
        raise BudgetError(f"--keep-share {keep_share} is not a share to keep; give a number above 0 and below 1")


def limit_of(
    structure: Structure, keep_share: float | None, size_bytes: int | None, bytes_of: Callable[[Shape], int]
) -> Fits:
    """A target that `check_target` has passed, as a question to a shape.

    Args:
        keep_share: of the weights of all decoder layers, what may stay; or
        size_bytes: of all weight files.
        bytes_of: what these take, by shape.

    Raises:
        BudgetError: a size that the model is within as it is.
    """
    whole = full(structure.sizes)
    if size_bytes is not None:
        most = bytes_of(whole)
        if not 0 < size_bytes < most:
            raise BudgetError(
                f"--size {size_bytes} leaves nothing to do or nothing over: the model takes {most} bytes; ask for fewer"
            )
        return lambda shape: bytes_of(shape) <= size_bytes
    assert keep_share is not None
    weights = keep_share * whole.layers * structure.layer_weights(whole.kv_heads, whole.channels)
    return lambda shape: shape.layers * structure.layer_weights(shape.kv_heads, shape.channels) <= weights
