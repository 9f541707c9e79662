"""Results that the comparison keeps: found again, measured again, and what failed tried again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.comparisons import CONTEXT, as_half, compared, method
from waterfill.files.architecture import describe
from waterfill.studies.comparison import (
    Method,
    StudiedModel,
    Unavailable,
    base,
    cache,
)
from waterfill.studies.comparison.stored import run_quantiser


def counted() -> tuple[list[str], Callable[[str], Method]]:
    """A list of the methods that ran, and a maker of methods that write themselves into it."""
    ran: list[str] = []

    def make(name: str, **options: Any) -> Method:
        def run(subject: StudiedModel, put: base.Put) -> base.Candidate:
            ran.append(name)
            return run_quantiser(as_half, subject, put)

        return Method(name, name, "test", run, **options)

    return ran, make


def test_results_are_found_again(subject: StudiedModel, ids: Tensor) -> None:
    ran, make = counted()
    first = compared(subject, ids, make("a"))
    again = compared(subject, ids, make("a"))
    assert ran == ["a"]
    assert again == first
    compared(subject, ids[: CONTEXT * 3], make("a"))
    compared(subject, ids, make("a", options="other"))
    compared(subject, ids.flip(0), make("a"))
    assert ran == ["a"] * 4, "another text, or other options, are another result"
    one, two = replace(subject, calibration=torch.ones(1, 8).long()), replace(subject, calibration=None)
    compared(one, ids, make("a"), make("b", calibrated=True))
    compared(two, ids, make("a"), make("b", calibrated=True))
    assert ran == ["a"] * 4 + ["b"] * 2, "calibration tokens matter to calibrated methods only"


def test_what_is_kept_is_part_of_a_result(subject: StudiedModel, ids: Tensor) -> None:
    ran, make = counted()
    kept = describe(subject.checkpoint, ["*mlp*"])
    for some in (subject, replace(subject, architecture=kept), subject):
        compared(some, ids, make("a"))
    assert ran == ["a", "a"]


def test_a_broken_off_comparison_goes_on(subject: StudiedModel, ids: Tensor) -> None:
    ran, make = counted()

    def interrupted(subject: StudiedModel, put: base.Put) -> base.Candidate:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compared(subject, ids, make("a"), Method("b", "b", "test", interrupted), make("c"))
    compared(subject, ids, make("a"), make("b"), make("c"))
    assert ran == ["a", "b", "c"]


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"version": 0}', None])
def test_a_damaged_result_is_measured_again(damage: bytes | None, subject: StudiedModel, ids: Tensor) -> None:
    ran, make = counted()
    first = compared(subject, ids, make("a"))
    file = next(cache.cache_folder().rglob("*.json"))
    if damage is None:
        content = json.loads(file.read_text())
        content["key"]["method"] = "another"
        damage = json.dumps(content).encode()
    file.write_bytes(damage)
    assert compared(subject, ids, make("a")) == first
    assert ran == ["a", "a"]


def test_failures_become_rows_and_are_tried_again(subject: StudiedModel, ids: Tensor) -> None:
    reasons: list[Exception] = [Unavailable("not on this machine"), RuntimeError("boom\nsecond line"), ValueError("")]

    def run(subject: StudiedModel, put: base.Put) -> base.Candidate:
        raise reasons[0]

    said = []
    while reasons:
        found = compared(subject, ids, Method("m", "m", "test", run), method("half", as_half))
        said.append(found.rows[0].problem)
        assert found.rows[1].kl is not None
        assert [row.method for row in found.measured] == ["half"]
        reasons.pop(0)
    assert said == ["not on this machine", "RuntimeError: boom", "ValueError: ValueError"]
