"""The head's product, some rows of it in memory at a time, in both directions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from waterfill.files.block_division import Table


class Rows(Protocol):
    """Who reads the rows of a table, and takes their gradients."""

    def chunks(self, table: Table) -> Iterator[tuple[slice, Tensor]]:
        """Rows of a table, and their weights `[rows, width]`."""

    def consume_rows(self, table: Table, rows: slice, weight: Tensor, x: Tensor, slope: Tensor, back: Tensor) -> None:
        """Of weights `[rows, in]`: what was multiplied with them `[tokens, in]`, the gradient of the product
        `[tokens, rows]`, and its part of that of the input `[tokens, in]`."""


class HeadProduct(torch.autograd.Function):
    """x `[..., in]` times the head, some of its rows at a time, both ways."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Rows, table: Table, wanted: bool, anchor: Tensor | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weights, ctx.table, ctx.wanted = weights, table, wanted
        logits = x.new_empty(*x.shape[:-1], table.shape[0])
        for rows, weight in weights.chunks(table):
            logits[..., rows] = nn.functional.linear(x, weight)
        return logits

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (x,) = ctx.saved_tensors
        total = torch.zeros_like(x).flatten(0, -2)
        slope = gradients[0].flatten(0, -2)
        counting = slope.any(1)  # tokens whose predictions do; others are context alone
        slope, flat = slope[counting], x.flatten(0, -2)[counting]
        back = torch.zeros_like(flat)
        for rows, weight in ctx.weights.chunks(ctx.table):
            part = slope[:, rows] @ weight
            back += part
            if ctx.wanted:
                ctx.weights.consume_rows(ctx.table, rows, weight, flat, slope[:, rows], part)
        total[counting] = back
        return total.view_as(x), None, None, None, None
