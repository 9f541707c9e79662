"""Streams that `benchmarks.fuzz_streams` found worth keeping: the shortest of every kind, and all that were bugs."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.stream_cases import CORPUS, Case, DisagreementError, judge, read_cases
from waterfill.base import native

CASES = read_cases()
CORPUS_BYTES = 100_000


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}-{case.numbers}-{len(case.data)}")
def test_all_decoders_do_with_it_what_they_did(case: Case) -> None:
    said = judge(case, native.library()).partition(";")[0]
    assert said == case.name.removeprefix("found: ")


def test_the_corpus_is_small_and_has_both_kinds_decoded_and_refused() -> None:
    assert CORPUS.stat().st_size < CORPUS_BYTES
    outcomes = {(case.kind, case.name.removeprefix("found: ") == "decoded") for case in CASES}
    assert outcomes == {("rans", True), ("rans", False), ("trellis", True), ("trellis", False)}
    assert sum(case.name.startswith("found") for case in CASES) >= 3


@pytest.mark.skipif(native.library() is None, reason="the native library is not built")
def test_a_decoder_that_differs_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge itself: a reference that reads another table than the library disagrees with it."""
    case = next(case for case in CASES if case.kind == "trellis" and case.name == "decoded" and len(case.data) > 100)
    monkeypatch.setattr("waterfill.codecs.trellis.bitstream._EIGHTHS", np.full(8, 2, np.float32))
    with pytest.raises(DisagreementError, match="decodes to something else"):
        judge(case, native.library())
