"""What planning asks of a model: names, shapes and dtypes of its tensors, and no way to the weights.

Architecture of a checkpoint ──┐
Plan that was made before    ──┴──► Inventory ──► menus, evidence, the next plan
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from waterfill.files.architecture import Role


class KeptTensor(Protocol):
    """A tensor that stays as it is."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...  # safetensors name


class PlannedMatrix(Protocol):
    """A matrix `[out, in]`, and how the model holds it."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def dtype(self) -> str: ...  # of the checkpoint, safetensors name
    @property
    def role(self) -> Role: ...
    @property
    def parameter(self) -> str: ...  # the model's state-dict name
    @property
    def stored_shape(self) -> tuple[int, ...]: ...  # of a Conv1D: [in, out]


class Inventory(Protocol):
    """All tensors of a model, in execution order."""

    @property
    def matrices(self) -> Sequence[PlannedMatrix]: ...
    @property
    def kept(self) -> Sequence[KeptTensor]: ...
