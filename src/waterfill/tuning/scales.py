"""Scales of packed matrices as parameters: W = gain * scale * codes, with one gain per row and group that is trained.

PEQA (arXiv 2305.14152) trains the scales of integers that stay what they are. Here codes are of any kind, of a grid or
a trellis, since a group's scale multiplies whatever they stand for. Products go through the kernels with the scales
rounded to the fp16 that is stored, so that what is trained is what will be loaded; the gradient passes that rounding.

    y = x W^T    dy/dx: from the codes    dL/dgain_rg = sum_t dy_tr y_trg / gain_rg    (`kernels.scale_gradient`)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from waterfill import kernels
from waterfill.base.errors import WaterfillError
from waterfill.codecs.groups import group_sums
from waterfill.codecs.hadamard import rotate
from waterfill.codecs.table import MAX_SCALE
from waterfill.running.hf.packed import PackedMatrix

GAINS = "gains"  # the parameter's name in its module


class TrainedScales:
    """A packed matrix whose scales follow a parameter, float32 `[out, groups]` of ones at first.

    Stands between a module and its buffers, which are changed in place as the parameter changes.
    """

    def __init__(self, packed: kernels.Packed, gains: nn.Parameter) -> None:
        self.packed, self.gains = packed, gains
        self._first = kernels.scales_of(packed).to(torch.float32)
        self._version = gains._version

    @property
    def scales(self) -> Tensor:
        """As they are to be stored, float16 `[out, groups]`."""
        scaled = self._first * self.gains.detach()
        return scaled.clamp(-MAX_SCALE, MAX_SCALE).to(torch.float16)

    def follow(self) -> None:
        """Bring the buffers to what the parameter says now."""
        if self._version != self.gains._version:
            kernels.set_scales(self.packed, self.scales)
            self._version = self.gains._version

    def multiply(self, x: Tensor) -> Tensor:
        """x W^T: `[..., in]` -> `[..., out]`, of the dtype of x."""
        self.follow()
        y: Tensor = _Product.apply(x, self.gains, self.packed)  # type: ignore[no-untyped-call]
        return y

    def rows(self, ids: Tensor) -> Tensor:
        """int64 `[...]` -> float32 `[..., in]`."""
        self.follow()
        looked_up: Tensor = _Rows.apply(ids, self.gains, self.packed)  # type: ignore[no-untyped-call]
        return looked_up

    def dense(self) -> Tensor:
        """W itself, float32 `[out, in]`; without gradient."""
        self.follow()
        return kernels.dense(self.packed)

    def scaled(self, power: int) -> TrainedScales:
        """Not while its scales are trained."""
        raise WaterfillError("a packed weight whose scales are trained cannot be scaled by its model as well")


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gains: Tensor, packed: kernels.Packed) -> Tensor:
        y = kernels.matmul(x.detach(), packed)
        ctx.save_for_backward(y if gains.shape[1] == 1 else x, gains)
        ctx.packed = packed
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        known, gains = ctx.saved_tensors
        of_x = of_gains = None
        if ctx.needs_input_grad[0]:
            of_x = kernels.matmul_backward(gradient, ctx.packed)
        if ctx.needs_input_grad[1]:
            if gains.shape[1] == 1:  # the only group's part is all of y
                products = known.to(torch.float32) * gradient.to(torch.float32)
                of_logarithms = products.reshape(-1, len(gains)).sum(0)[:, None]
            else:
                of_logarithms = kernels.scale_gradient(known, gradient, ctx.packed)
            of_gains = _by_gain(of_logarithms, gains)
        return of_x, of_gains, None


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, gains: Tensor, packed: kernels.Packed) -> Tensor:
        ctx.save_for_backward(ids, gains)
        ctx.packed = packed
        return kernels.rows(packed, ids)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        ids, gains = ctx.saved_tensors
        flat, width = ids.reshape(-1), ctx.packed.shape[1]
        products = rotate(gradient.reshape(-1, width).to(torch.float32)) * rotate(kernels.rows(ctx.packed, flat))
        of_logarithms = torch.zeros_like(gains).index_add_(0, flat, group_sums(products))
        return None, _by_gain(of_logarithms, gains), None


def _by_gain(of_logarithms: Tensor, gains: Tensor) -> Tensor:
    """The gradient by gains, given that by their logarithms: 0 for a gain of 0, which nothing leads back from."""
    return torch.where(gains == 0, 0, of_logarithms / gains)


def train_scales(model: nn.Module) -> dict[str, TrainedScales]:
    """Make the scales of a loaded model parameters, by the names of their matrices, and the only ones: all others are
    frozen. What has no scale per row and group in its file, as entropy-coded matrices have not, is left as it is.

    Raises:
        WaterfillError: no matrix has such scales, or they are streamed or trained already.
    """
    every = {name: module for name, module in model.named_modules() if isinstance(module, PackedMatrix)}
    if any(module.source is not None for module in every.values()):
        raise WaterfillError(
            "the model is streamed, or its scales are trained already; load it into memory, with waterfill.load"
        )
    found = {name: module for name, module in every.items() if module.stored is module.codec}
    if not found:
        kinds = sorted({module.stored.name.partition("-")[0] for module in every.values()}) or ["lossless"]
        raise WaterfillError(
            f"no matrix of this model is stored with a scale per row and group (they are {', '.join(kinds)}), so there "
            "are none to train; train norms or an adapter, or pack with --for memory"
        )
    model.requires_grad_(False)
    trained = {}
    for name, module in found.items():
        gains = nn.Parameter(torch.ones(module.shape[0], kernels.scales_of(module.packed).shape[1]))
        module.register_parameter(GAINS, gains)
        trained[name] = TrainedScales(module.packed, gains)
        module.source = trained[name]
    return trained
