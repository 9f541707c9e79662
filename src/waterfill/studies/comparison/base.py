"""What comparing is made of: methods, what each gives back, and one row of the table per method.

A method takes a `StudiedModel`, gives back its matrices one by one, and says how many bytes store them. Methods are
listed in `methods`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from waterfill.base.machine import package_version
from waterfill.base.records import Record
from waterfill.files.architecture import Architecture
from waterfill.files.checkpoint import Checkpoint
from waterfill.planning.calibration import Calibrated, on_tokens
from waterfill.planning.moments import second_moments
from waterfill.planning.plan import Calibration
from waterfill.planning.sensitivity import Sensitivity


class Unavailable(Exception):  # noqa: N818  # not an error: it becomes a row of the table
    """A method cannot run here; the message says why, in a few words."""


@dataclass(frozen=True)
class StudiedModel:
    """The model under study, whole and dense; what is measured and planned on it is done once."""

    name: str
    checkpoint: Checkpoint
    architecture: Architecture
    model: Any  # the original
    sensitivity: Sensitivity
    calibration: Tensor | None = None  # token ids [sequences, length] for the methods that need activations
    calibrated_on: Calibration | None = None  # what those are

    def calibration_tokens(self) -> Tensor:
        """Token ids [sequences, length].

        Raises:
            Unavailable: there are none.
        """
        if self.calibration is None:
            raise Unavailable("it needs calibration tokens")
        return self.calibration

    @cached_property
    def feedback(self) -> Calibrated:
        """Error feedback by those tokens; their moments are taken once, for all plans."""
        tokens, record = self.calibration_tokens(), self.calibrated_on
        if record is None:
            raise Unavailable("it needs to know what it is calibrated on")
        return on_tokens(self.checkpoint, self.architecture, tokens, record)

    @cached_property
    def moments(self) -> dict[str, Tensor]:
        """Mean square of each input, float32 [in], by matrix; measured once, for several methods."""
        return second_moments(self.model, self.architecture, self.calibration_tokens())


OURS = PLAIN, UNIFORM, FED_BACK = "waterfill", "waterfill-uniform", "waterfill-feedback"  # names of our own methods

Put = Callable[[str, Tensor], None]
"""Takes a matrix by its name, float32 [out, in], as a method gives it back. What is not put stays as it was."""


@dataclass(frozen=True)
class Candidate:
    """What a method says of the model whose matrices it has `put`."""

    size_bytes: int  # one weight file with everything that the method stores, headers and kept tensors included
    bits: float  # stored bits per weight of the matrices
    predicted: tuple[float, float, float | None] | None = None  # KL, its lower and its upper bound
    note: str = ""  # what a reader must know, as matrices that did not fit the method


@dataclass(frozen=True)
class Method:
    """One way to store a model."""

    name: str  # as it is asked for
    title: str  # as tables call it
    family: str  # the library
    run: Callable[[StudiedModel, Put], Candidate]
    package: str | None = None  # distribution whose version belongs to the result
    calibrated: bool = False  # whether it looks at activations, not at the weights alone
    options: str = ""  # what else decides the result, for the cache

    @property
    def version(self) -> str | None:
        """Of its library; None where that is not installed."""
        return package_version(self.package) if self.package else None


@dataclass(frozen=True)
class Row(Record):
    """One method, measured; `problem` says why there are no figures."""

    method: str
    title: str
    family: str
    version: str | None
    calibrated: bool
    size_bytes: int | None = None  # of the weight files
    bits: float | None = None  # stored bits per weight of the matrices
    kl: float | None = None  # KL(original || method), nats per token
    kl_stderr: float | None = None
    top1_agreement: float | None = None
    ppl: float | None = None
    ppl_reference: float | None = None
    predicted_kl: float | None = None  # of our own plans
    predicted_low: float | None = None
    predicted_high: float | None = None
    ours_size_bytes: int | None = None  # our plan within the method's bytes
    ours_kl: float | None = None
    ours_kl_stderr: float | None = None
    note: str = ""
    problem: str | None = None

    @property
    def ratio(self) -> float | None:
        """Our KL over the method's, at no more bytes."""
        return self.ours_kl / self.kl if self.kl and self.ours_kl is not None else None

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, and `ratio`."""
        return {**super().to_dict(), "ratio": self.ratio}
