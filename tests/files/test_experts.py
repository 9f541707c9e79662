"""Which 3-D parameters are experts, and which way round."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from waterfill.files.experts import fused_experts


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.zeros(2, 4, 4)) for _ in range(2))
        self.gate = nn.Parameter(torch.zeros(4, 4))


class Declared(Experts):
    is_transposed = True


class OneByOne(Experts):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(self.up.shape[0]):
            x = nn.functional.linear(nn.functional.linear(x, self.up[i]), self.down[i]) @ self.gate
        return x


class AllAtOnce(Experts):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.view(self.up.size(0), -1, 4)
        return x if self.down is None else torch.bmm(torch.bmm(x, self.up), self.down)


class InAnotherWayToo(Experts):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(torch.bmm(x, self.up) * self.down, self.down)


class BothWays(Experts):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(nn.functional.linear(x, self.up[0]), self.up) + torch.bmm(self.down, x)


Unseen = type("Unseen", (Experts,), {"forward": eval("lambda self, x: torch.bmm(x, self.up)")})


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (Declared, {"up": True, "down": True}),
        (OneByOne, {"up": False, "down": False}),
        (AllAtOnce, {"up": True, "down": True}),
        (InAnotherWayToo, {"up": True}),
        (BothWays, {}),
        (Unseen, {}),
        (Experts, {}),
    ],
)
def test_experts_by_declaration_or_by_use(module: type[Experts], expected: dict[str, bool]) -> None:
    assert fused_experts(module()) == expected


def test_nothing_is_sought_where_no_parameter_has_three_axes() -> None:
    assert fused_experts(nn.Linear(4, 4)) == {}
