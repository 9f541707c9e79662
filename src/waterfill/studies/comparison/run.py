"""The comparison: every method on one model, one text and one context, at its true bytes.

    subject + methods + budgets ──► cases ──► (cached?) weights into a copy of the model ──► divergence ──► rows
                                      └──► one more case per peer: our plan within its bytes

The copy's matrices are replaced method by method, its code never: what differs between two rows is the weights alone.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import product
from typing import Any

import torch
from torch import Tensor

from waterfill.base.errors import BudgetError, first_line
from waterfill.base.progress import PLANNING, Progress, stage, step_of
from waterfill.base.records import Record, frame
from waterfill.evaluation import divergence
from waterfill.files.architecture import parameters_of
from waterfill.planning.budget import Budget
from waterfill.planning.costs import matrix_view
from waterfill.planning.planner import USUAL, Request
from waterfill.studies.comparison.base import FED_BACK, OURS, UNIFORM, Method, Row, StudiedModel, Unavailable
from waterfill.studies.comparison.cache import VERSION, Results
from waterfill.studies.comparison.curve import CurvePoint, predicted_curve
from waterfill.studies.comparison.ours import packed, plan_for
from waterfill.studies.comparison.stored import original_bytes

DEFAULT_BITS = (2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Comparison(Record):
    """One model stored in many ways."""

    model: str
    fingerprint: str
    text: str  # name of the text
    context: int  # tokens per window
    windows: int
    tokens: int  # positions scored
    original_bytes: int
    ppl_reference: float | None
    rows: tuple[Row, ...]
    curve: tuple[CurvePoint, ...]  # what our plans promise over a range of sizes

    @property
    def measured(self) -> tuple[Row, ...]:
        """The rows that have figures, by their size."""
        return tuple(sorted((row for row in self.rows if row.kl is not None), key=lambda row: row.size_bytes or 0))

    @property
    def ahead(self) -> tuple[Row, ...]:
        """Peers that lose less than our plan within their bytes, by more than the two errors."""
        return tuple(row for row in self.measured if _ahead(row))

    def to_dict(self) -> dict[str, Any]:
        """The fields by name; each row with its `ratio`."""
        return {**super().to_dict(), "rows": [row.to_dict() for row in self.rows]}

    def to_pandas(self) -> Any:
        """A pandas DataFrame, one row per method."""
        return frame(self.rows)


def compare_methods(
    subject: StudiedModel,
    ids: Tensor,
    *,
    text: str,
    context: int,
    methods: Sequence[Method],
    ours: Sequence[str] = OURS[:1],
    budgets: Sequence[Budget],
    request: Request = USUAL,
    match: bool = True,
    batch: int = 1,
    progress: Progress | None = None,
) -> Comparison:
    """Measure methods on token ids [tokens], windows of `context`.

    Args:
        text: name of the text, for the result.
        ours: which of `OURS` to run, at every budget.
        request: what else our plans are asked for.
        match: also measure our plan within each peer's bytes.
        progress: called with (what is being done, done, in all).
    """
    bench = _Bench(subject, ids, context, batch, progress)
    cases = [*_budget_cases(subject, request, ours, budgets, progress), *methods]
    rows: list[Row] = []
    with stage(progress, "comparing", len(cases)) as advance:
        for case in cases:
            row = case if isinstance(case, Row) else bench.row(case)
            if match and row.kl is not None and row.family != "waterfill":
                row = bench.matched(row, request)
            rows.append(row)
            advance()
    return Comparison(
        model=subject.name,
        fingerprint=subject.checkpoint.fingerprint,
        text=text,
        context=context,
        windows=len(ids) // context,
        tokens=len(ids) // context * (context - 1),
        original_bytes=original_bytes(subject.architecture),
        ppl_reference=bench.ppl_reference,
        rows=tuple(rows),
        curve=predicted_curve(subject.architecture, subject.sensitivity, request, progress=progress),
    )


def _budget_cases(
    subject: StudiedModel,
    request: Request,
    ours: Sequence[str],
    budgets: Sequence[Budget],
    progress: Progress | None,
) -> Iterator[Method | Row]:
    """Our methods at every budget."""
    packing = step_of(progress, "packing")
    with stage(progress, PLANNING, len(ours) * len(budgets)) as advance:
        for name, budget in product(ours, budgets):
            yield _budget_case(subject, request, name, budget, packing)
            advance()


def _budget_case(
    subject: StudiedModel, request: Request, name: str, budget: Budget, packing: Callable[[int, int], None] | None
) -> Method | Row:
    """One of our methods at a budget, or the row that says why there is no such plan."""
    request = replace(request, uniform=name == UNIFORM)
    asked = f"{budget.bits:g} bits" if budget.bits is not None else f"{budget.size_bytes:,} bytes"
    fed_back = name == FED_BACK
    kinds = "uniform" * request.uniform, "with feedback" * fed_back, "for memory" * (request.purpose == "memory")
    facts = ("waterfill", *kinds, asked)
    title = ", ".join(filter(None, facts))
    try:
        plan = plan_for(subject, budget, request, fed_back=fed_back)
        return packed(plan, title=title, name=name, progress=packing)
    except Unavailable as reason:
        return Row(name, title, "waterfill", None, True, problem=str(reason))
    except BudgetError as error:
        return Row(name, title, "waterfill", None, False, problem=first_line(error))


@dataclass
class _Bench:
    """What all methods are measured on."""

    subject: StudiedModel
    ids: Tensor
    context: int
    batch: int
    progress: Progress | None
    ppl_reference: float | None = None
    _copy: Any = None

    def __post_init__(self) -> None:
        self.results = Results(self.subject.checkpoint.fingerprint)
        whole = self.ids[: len(self.ids) // self.context * self.context]
        self.text = blake2b(whole.numpy().tobytes(), digest_size=8).hexdigest()
        names = "\n".join(matrix.name for matrix in self.subject.architecture.matrices)
        self.matrices = blake2b(names.encode(), digest_size=8).hexdigest()  # what is kept is no part of a method
        tokens = self.subject.calibration
        self.calibration = None if tokens is None else blake2b(tokens.numpy().tobytes(), digest_size=8).hexdigest()

    def key(self, method: Method) -> dict[str, Any]:
        """What decides a result: the same key, the same row."""
        return {
            "adapters": VERSION,
            "method": method.name,
            "options": method.options,
            "version": method.version,
            "matrices": self.matrices,
            "calibration": self.calibration if method.calibrated else None,
            "dtype": str(self.subject.model.dtype),
            "text": self.text,
            "context": self.context,
        }

    def row(self, method: Method) -> Row:
        """Measure a method, unless that was done before; a failure of its library becomes a row that tells it."""
        key = self.key(method)
        known = self.results.get(key)
        if known is not None:
            self.ppl_reference = self.ppl_reference or known.ppl_reference
            return replace(known, title=method.title)
        row = Row(method.name, method.title, method.family, method.version, method.calibrated)
        try:
            row = self._measure(method, row)
        except Unavailable as reason:
            return replace(row, problem=str(reason))
        except Exception as error:  # a peer's library may fail in any way, and the others shall go on
            _log.debug("%s failed", method.name, exc_info=True)
            return replace(row, problem=f"{type(error).__name__}: {first_line(error)}")
        self.results.put(key, row)
        return row

    def matched(self, row: Row, request: Request) -> Row:
        """The row with our own plan beside it, which takes at most its bytes."""
        try:
            with stage(self.progress, PLANNING):
                plan = plan_for(self.subject, Budget(size_bytes=row.size_bytes), replace(request, uniform=False))
        except BudgetError:
            return row
        packing = step_of(self.progress, "packing")
        ours = self.row(packed(plan, title="waterfill", name="waterfill", progress=packing))
        return replace(row, ours_size_bytes=ours.size_bytes, ours_kl=ours.kl, ours_kl_stderr=ours.kl_stderr)

    def _measure(self, method: Method, row: Row) -> Row:
        matrices = {matrix.name: matrix for matrix in self.subject.architecture.matrices}
        storing = stage(self.progress, "storing the weights", len(matrices))
        with torch.no_grad(), storing as advance:
            model = self._restored()
            parameters = parameters_of(model)

            def put(name: str, weight: Tensor) -> None:
                matrix = matrices[name]
                matrix_view(parameters[matrix.parameter], matrix).copy_(weight)
                advance()

            candidate = method.run(self.subject, put)
        measured = divergence(
            self.subject.model,
            model,
            self.ids,
            context=self.context,
            batch=self.batch,
            progress=step_of(self.progress, "measuring"),
        )
        self.ppl_reference = measured.ppl_reference
        predicted = candidate.predicted or (None, None, None)
        return replace(
            row,
            size_bytes=candidate.size_bytes,
            bits=candidate.bits,
            kl=measured.kl,
            kl_stderr=measured.kl_stderr,
            top1_agreement=measured.top1_agreement,
            ppl=measured.ppl,
            ppl_reference=measured.ppl_reference,
            predicted_kl=predicted[0],
            predicted_low=predicted[1],
            predicted_high=predicted[2],
            note=candidate.note,
        )

    def _restored(self) -> Any:
        """The copy, with the weights of the original."""
        if self._copy is None:
            self._copy = copy.deepcopy(self.subject.model)
        for own, original in zip(self._copy.parameters(), self.subject.model.parameters(), strict=True):
            own.copy_(original)
        return self._copy


def _ahead(row: Row) -> bool:
    if row.family == "waterfill" or row.kl is None or row.ours_kl is None:
        return False
    return row.kl + 2 * (row.kl_stderr or 0.0) < row.ours_kl - 2 * (row.ours_kl_stderr or 0.0)
