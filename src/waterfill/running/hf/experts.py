"""The experts of one fused 3-D parameter as one module, each of them a packed matrix of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch

from waterfill.running.hf.packed import PackedMatrix
from waterfill.running.hf.stand_in import StandIn
from waterfill.running.hf.tensor_module import TensorModule


class PackedExperts(TensorModule):
    """The experts of one fused 3-D parameter, which the model's code indexes one by one."""

    def __init__(self, count: int, transposed: bool, dtype: torch.dtype) -> None:
        super().__init__()
        for expert in range(count):
            matrix = self._modules[str(expert)] = PackedMatrix()
            matrix.transposed, matrix.dtype = transposed, dtype
        self.transposed = transposed
        self._weights: dict[
            int, StandIn
        ] = {}  # of the experts used, which keeps them from being made for every product

    def expert(self, index: int) -> PackedMatrix:
        return cast(PackedMatrix, self._modules[str(index)])

    @property
    def experts(self) -> list[PackedMatrix]:
        return [self.expert(index) for index in range(len(self))]

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, index: Any) -> Any:
        """One expert's weight, `[out, in]`, or `[in, out]` where the model keeps it so; else what the tensor has."""
        if not isinstance(index, int) and not (isinstance(index, torch.Tensor) and index.ndim == 0):
            return self.stand_in()[index]
        number = range(len(self))[int(index)]
        weight = self.expert(number).weight
        if isinstance(weight, StandIn):
            self._weights[number] = weight
        return weight

    def __iter__(self) -> Iterator[StandIn]:
        return (expert.weight for expert in self.experts)

    def stand_in(self) -> StandIn:
        """For all of them, `[expert, out, in]` or `[expert, in, out]`."""
        first = self.expert(0)
        shape = (len(self), *first.stored_shape)
        return StandIn(self, shape, self.dtype, first.device, transposed=self.transposed)

    @property
    def dtype(self) -> torch.dtype:
        return self.expert(0).dtype

    @property
    def loading(self) -> bool:
        return self.expert(0).loading

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_weights": {}}

    def dense(self) -> torch.Tensor:
        """float32 `[expert, out, in]`."""
        return torch.stack([expert.dense() for expert in self.experts])

    def multiply_each(self, x: torch.Tensor) -> torch.Tensor:
        """One product per expert: `[expert, tokens, in]` -> `[expert, tokens, out]`, of the dtype of x."""
        return torch.stack([expert.multiply(part) for expert, part in zip(self.experts, x, strict=True)])

    def scale_by_power(self, power: int) -> None:
        """Multiply every expert by 2^power from now on."""
        for expert in self.experts:
            expert.scale_by_power(power)
