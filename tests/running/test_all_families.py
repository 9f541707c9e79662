"""Every causal family that the installed transformers knows: planned, packed, loaded, compared, generating, streamed.

A sample runs by default, the others with `-m families`; `benchmarks.families` makes docs/families.md of the same
code.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import family_check, tiny_configs
from tests.support.family_check import SAMPLE


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.families) for name in family_check.FAMILIES],
)
def test_a_family_packs_or_is_refused(family: str, tmp_path: Path) -> None:
    outcome = family_check.check(family, tmp_path)
    assert outcome.status != "failed", f"{outcome.stage}: {outcome.reason}\n{outcome.trace}"
    assert family not in SAMPLE or outcome.status == "passed", f"{outcome.status}: {outcome.reason}"


def test_the_sample_is_of_known_families() -> None:
    assert set(family_check.FAMILIES) >= SAMPLE


@pytest.mark.families  # which is run with the newest transformers
def test_what_was_fitted_exists() -> None:
    assert set(tiny_configs.FITTING) <= set(family_check.FAMILIES)
