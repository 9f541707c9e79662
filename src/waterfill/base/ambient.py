"""torch as it starts, whatever the caller has set: modes and defaults that would change a measurement, or forbid it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def own_torch_modes() -> Iterator[None]:
    """Inside, or in a function that it decorates: gradients on, float32, the CPU, no autocast; outside as it was."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.device("cpu"),
            torch.autocast("cpu", enabled=False),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)
